"""The core: the bus, with the inputs that reach past it. Everything that changes it goes in here, as plain values.

A `Bus` takes generators, and the rooms above could change the memory by hand. A core takes the name and the arguments
of a call, so that what was done to it can be written down and done again: the two rooms below are deterministic, and
the same inputs in the same order give the same state, with the same operations under way and the same rounds open.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from typing import Any

from mmubusd.mm import memcontrol
from mmubusd.mm.addr import FileId, MmId
from mmubusd.mm.errno import MmError
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.memory import Memory
from mmubusd.mm.mm import Mapping, Mm
from mmubusd.mm.syscall import call as syscall
from mmubusd.notify import Batch, Bus, Limits, Operation, Session
from mmubusd.notify.finding import Finding

__all__ = ["Core"]

Calling = Generator[Any, Any, Any]
Wrap = Callable[[Calling], Calling]
Resident = Iterable[tuple[int, int, str]]


class Core(Bus):
    """A bus and its memory.

    Attributes: remembered: what the room above wants kept with the state, by kind and key: owners, names of files.
    """

    def __init__(self, memory: Memory, limits: Limits | None = None, epoch: int = 1) -> None:
        super().__init__(memory, limits, epoch)
        self.remembered: dict[str, dict[Any, Any]] = {}

    @property
    def quiet(self) -> bool:
        """No operation is under way."""
        return not self.running and not self.rounds.open

    @property
    def seen(self) -> float:
        """The `now` of the last input."""
        return self._clock.seen

    # Calls of programs.

    def call(
        self, mm: int, op: str, args: Sequence[int], now: float, *, data: bytes = b"", label: str = "",
        session: Session | None = None, within: int = 0, report: bool = False, wrap: Wrap | None = None,
        tag: object = None,
    ) -> Operation[Any]:  # fmt: skip
        """Begin a call by its name.

        Args:
            mm: the address space, 0: none (calls on files, and on the machine).
            op, args: as `mmubusd.mm.syscall`; also load (addr, length), and with data store (addr) and
                write_file (file, offset). label, session, within, report, tag: as `Bus.start`.
            wrap: for the room above, to follow the operation; it may change nothing.
        Raises: MmError (ESRCH, EBADF, EINVAL, ENOSYS), Draining; no operation has begun then.
        """
        work = self._work(mm, op, args, data)
        return self.start(
            work if wrap is None else wrap(work), now, label=label, session=session, report=report, tag=tag,
            within=within,
        )  # fmt: skip

    def _work(self, mm_id: int, op: str, args: Sequence[int], data: bytes) -> Calling:
        memory = self.memory
        if op == "write_file":
            return memory.write_file(FileId(args[0]), args[1], data)
        target: Mm | Memory = memory.mm(MmId(mm_id)) if mm_id else memory
        if op in ("load", "store"):
            wanted = 2 if op == "load" else 1
            if not isinstance(target, Mm):
                raise MmError("EINVAL", f"{op} needs an address space")
            if len(args) != wanted:
                raise MmError("EINVAL", f"{op} takes {wanted} arguments, not {len(args)}")
            return target.load(args[0], args[1]) if op == "load" else target.store(args[0], data)
        return syscall(target, op, args)

    # Address spaces and files.

    def create_mm(
        self, name: str, thp: Thp | None = None, mappings: Sequence[tuple[Mapping, Resident]] = (), brk: int = 0,
        memcg: str = "",
    ) -> Mm:  # fmt: skip
        """Make an address space, with mappings that have been checked.

        Args: thp: None: as the machine has it; memcg: the group that pays for its memory, "": nobody counts.
        Raises: MmError ESRCH: there is no such group.
        """
        payer = self.memory.memcg(memcg)
        mm = self.memory.create_mm(name)
        memcontrol.join(mm, payer)
        mm.thp, mm.thp_disabled = thp or mm.thp, thp is Thp.NEVER
        for mapping, resident in mappings:
            mm.adopt(mapping, resident)
            if mapping.name == "[heap]":
                mm.brk_start = mapping.start
        if brk:
            mm.brk_end = brk
            mm.brk_start = mm.brk_start or brk
        return mm

    def rename_mm(self, mm: int, name: str) -> None:
        """Another name for people."""
        self.memory.mm(MmId(mm)).name = name

    def create_file(self, name: str, kind: str, pages: int, cached: bool, memcg: str = "") -> FileId:
        """As `Memory.create_file`. Raises: MmError."""
        return self.memory.create_file(name, kind, pages, cached=cached, memcg=self.memory.memcg(memcg))

    def limit_memcg(self, memcg: str, frames: int, swap_slots: int) -> None:
        """So much memory may a group have from now on; it is made if there is none. Raises: MmError EINVAL."""
        memcontrol.change_limits(self.memory, memcg, frames, swap_slots)

    def join_memcg(self, mm: int, memcg: str) -> None:
        """Another group pays for what an address space takes from now on. Raises: MmError ESRCH."""
        memcontrol.join(self.memory.mm(MmId(mm)), self.memory.memcg(memcg))

    def unlink(self, file: int) -> None:
        """As `Memory.unlink`. Raises: MmError EBADF."""
        self.memory.unlink(FileId(file))

    def read_file(self, file: int, offset: int, length: int) -> bytes:
        """As `Memory.read_file`: looking at a page may show what a device has written to it. Raises: MmError."""
        return self.memory.read_file(FileId(file), offset, length)

    def remember(self, kind: str, key: Any, value: Any) -> None:
        """Keep something with the state; None: no longer."""
        kept = self.remembered.setdefault(kind, {})
        everything: dict[str, Collection[int]] = {
            "mm": self.memory.mms, "file": self.memory.files, "session": self.sessions
        }  # fmt: skip
        standing = everything.get(kind)
        if standing is not None and len(kept) > 2 * len(standing) + 64:
            for gone in [one for one in kept if one not in standing]:
                del kept[gone]
        if value is None:
            kept.pop(key, None)
        else:
            kept[key] = value

    # What is taken from a session.

    def take_batch(self, session: Session) -> Batch | None:
        """As `Session.take_batch`: taking numbers the notices, and so changes the session."""
        return session.take_batch()

    def take_finding(self, session: Session) -> Finding | None:
        """The oldest thing to say to it about its behaviour."""
        return session.findings.popleft() if session.findings else None

    def send_again(self, session: Session) -> None:
        """What it has not acknowledged is sent again, in order, before anything else."""
        session.outbox.send_again()

    def ask_after(self, session: Session, handled_through: int) -> None:
        """Its next requests were made when it had handled so many notices."""
        session.asked_after = handled_through

    # The server's own life.

    def restart(self, now: float) -> None:
        """The server that ran this has ended, and another one goes on: no stream stands, and nobody maps its frames.

        Sessions that were attached are lost and have their whole grace to come back; operations and rounds go on.
        """
        self._tick(now)
        self._draining = False
        self._sessions.restarted()
        self.drain_ready()
        self._runner.run()
