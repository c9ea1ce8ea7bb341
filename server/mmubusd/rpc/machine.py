"""The server's machine: made anew, or as a directory of state has it."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from structlog.typing import FilteringBoundLogger

from mmubusd.mm import khugepaged
from mmubusd.mm.frame import FrameTable
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.memory import Memory
from mmubusd.mm.shmem_huge import ShmemHuge
from mmubusd.notify import Limits
from mmubusd.rpc.commits import Commits
from mmubusd.rpc.config import Settings
from mmubusd.rpc.errors import Alarm
from mmubusd.rpc.store import FrameStore
from mmubusd.state import Core, Directory, ObservedFrames, RecordedCore, open_state

__all__ = ["Machine", "limits_of"]

RESPONSE_PAGE_BYTES = 16
"""Bytes that one page takes in a message of translations."""


class Machine:
    """Frames and a core, and with a directory of state what keeps them.

    Attributes: store, core; commits: None when nothing is kept; recovered: it goes on where another server ended.
    """

    def __init__(self, settings: Settings, alarm: Alarm, log: FilteringBoundLogger) -> None:
        """Raises: OSError, StateError; nothing is held then."""
        self._settings = settings
        self.commits: Commits | None = None
        self.recovered = False
        self._directory = Directory(settings.state) if settings.state is not None else None
        try:
            if self._directory is not None:
                _remove_left_over(self._directory, settings.store)
            self.store = FrameStore(settings.frames_nr, settings.store)
        except BaseException:
            self._let_go()
            raise
        try:
            if self._directory is None:
                self.core = Core(self._memory(FrameTable), limits_of(settings), _epoch())
            else:
                self.core = self._recover(self._directory, alarm, log)
        except BaseException:
            self.store.close()
            self._let_go()
            raise

    def _let_go(self) -> None:
        if self._directory is not None:
            self._directory.close()

    def _memory(self, frame_table: type[FrameTable]) -> Memory:
        return Memory(store=memoryview(self.store.map), frame_table=frame_table, **self._parameters())

    def _parameters(self) -> dict[str, Any]:
        """What the machine is made of; a state that was made with others is refused."""
        settings = self._settings
        return {
            "frames_nr": settings.frames_nr,
            "swap_slots_nr": settings.swap_slots_nr,
            "nodes_nr": settings.nodes_nr,
            "thp": Thp(settings.thp),
            "shmem_enabled": ShmemHuge(settings.shmem_enabled),
            "tmpfs_huge": ShmemHuge(settings.tmpfs_huge),
            "khugepaged_limits": khugepaged.Limits(
                settings.khugepaged_max_ptes_none,
                settings.khugepaged_max_ptes_swap,
                settings.khugepaged_max_ptes_shared,
            ),
            "hugetlb_nr": settings.hugetlb_nr,
            "profile": settings.profile,
            "oom_kill": settings.oom_kill,
            "max_map_count": settings.max_map_count,
        }

    def _recover(self, directory: Directory, alarm: Alarm, log: FilteringBoundLogger) -> Core:
        def make() -> RecordedCore:
            return RecordedCore(self._memory(ObservedFrames), limits_of(self._settings), _epoch())

        parameters = {
            name: str(value) if isinstance(value, Thp | ShmemHuge | khugepaged.Limits) else value
            for name, value in self._parameters().items()
        }
        keeper, core, new = open_state(directory, parameters, make, lambda _: memoryview(self.store.map))
        self.commits = Commits(core, keeper, directory, alarm, log, self._settings.checkpoint_bytes)
        if not new:
            self.recovered = True
            core.restart(core.seen)
            core.change_limits(limits_of(self._settings))
        return core

    def close(self) -> None:
        """The frames go. The directory is let go of by commits."""
        self.store.close()


def _epoch() -> int:
    """A machine that is made anew is another epoch; nothing of an earlier one is to be taken for it."""
    return secrets.randbits(62) | 1


def _remove_left_over(directory: Directory, store: Path | None) -> None:
    """A server that was killed has left its file of frames; the next one makes its own."""
    left = directory.frames_file()
    if left and store is not None and left == str(store.absolute()):
        store.unlink(missing_ok=True)
    directory.note_frames_file(str(store.absolute()) if store is not None else "")


def limits_of(settings: Settings) -> Limits:
    """The notifier core's bounds: the configuration's, and what fits a message."""
    return Limits(
        ack_budget_s=settings.ack_budget_s,
        ack_budget_min_s=settings.ack_budget_min_s,
        ack_budget_max_s=settings.ack_budget_max_s,
        lease_s=settings.lease_s,
        grace_s=settings.grace_s,
        fault_wait_s=settings.fault_wait_s,
        sessions_max=settings.sessions_max,
        registrations_max=settings.registrations_max,
        pages_max=(settings.message_bytes_max - 4096) // RESPONSE_PAGE_BYTES,
        dma_bytes_max=settings.message_bytes_max - 4096,
    )
