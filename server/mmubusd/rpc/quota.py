"""How much of the server one principal may have at a time, so that it cannot take all of it from the others.

| what | option | refused with |
|---|---|---|
| calls and streams | `calls_per_principal_max` | RESOURCE_EXHAUSTED, LIMIT_REACHED |
| operations on pipelined streams | `operations_per_principal_max` | EAGAIN of the operation |
| sessions | `sessions_per_principal_max` | RESOURCE_EXHAUSTED, LIMIT_REACHED (EMFILE) |
| registrations of all its sessions | `registrations_per_principal_max` | the registration's EMFILE |
| address spaces | `address_spaces_per_principal_max` | EAGAIN, as fork(2) at RLIMIT_NPROC |
| files | `files_per_principal_max` | EMFILE, as open(2) at RLIMIT_NOFILE |
| page frames | `frames_per_principal_max` | its own pages are reclaimed; ENOMEM, or `oom_kill` ends one of its own |
| slots in swap | `swap_slots_per_principal_max` | its pages stay in memory |

These stand beside the limits of the whole server, which are several times as high. Administrators have only those, and
so has everybody where nobody is asked who calls. Memory is counted by `mmubusd.mm.memcontrol`, which knows groups: a
principal's has its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from mmubusd.mm.addr import MmId
from mmubusd.mm.errno import MmError
from mmubusd.notify import LimitReached, State
from mmubusd.notify.notice import SessionId
from mmubusd.rpc.config import Settings
from mmubusd.rpc.identity import Principal
from mmubusd.rpc.methods import Context

if TYPE_CHECKING:
    from mmubusd.rpc.driver import Driver

__all__ = ["Quotas"]

A = TypeVar("A")


class Quotas:
    """Counts what each principal has, and refuses more."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._authority = driver.authority
        self._calls: Counter[str] = Counter()
        self._operations: Counter[str] = Counter()

    @property
    def _settings(self) -> Settings:
        return self._driver.settings

    def _bound(self, who: Principal) -> bool:
        return not self._authority.open and not self._authority.administers(who)

    # Calls and streams.

    def enter(self, context: Context) -> Principal:
        """A call begins. Returns: whose it is, for `leave`. Raises: Unauthenticated, LimitReached."""
        who = self._authority.caller(context)
        limit = self._settings.calls_per_principal_max
        if self._calls[who.name] >= limit and self._bound(who):
            raise LimitReached("EAGAIN", "calls_per_principal_max", limit)
        self._calls[who.name] += 1
        return who

    def leave(self, who: Principal) -> None:
        """It has ended."""
        _take_one(self._calls, who.name)

    def operation(self, who: Principal, ended: Callable[[A], None]) -> Callable[[A], None]:
        """An operation of a pipelined stream begins. Returns: `ended`, to be called once with its answer.

        Raises: LimitReached.
        """
        if self._authority.open:
            return ended
        limit = self._settings.operations_per_principal_max
        if self._operations[who.name] >= limit and self._bound(who):
            raise LimitReached("EAGAIN", "operations_per_principal_max", limit)
        self._operations[who.name] += 1

        def give_back(answer: A) -> None:
            _take_one(self._operations, who.name)
            ended(answer)

        return give_back

    # What stays.

    def check_session(self, who: Principal) -> None:
        """One more session. Raises: LimitReached."""
        sessions, limit = self._driver.bus.sessions, self._settings.sessions_per_principal_max
        if not self._authority.sessions.count_below(who.name, limit, sessions) and self._bound(who):
            mine = self._authority.sessions.things(who.name, sessions)
            standing = [one for one in mine if sessions[SessionId(one)].state in (State.LIVE, State.LOST)]
            if len(standing) >= limit:
                raise LimitReached("EMFILE", "sessions_per_principal_max", limit)

    def check_registration(self, who: Principal) -> None:
        """One more registration. Raises: LimitReached."""
        if self._authority.open:
            return
        sessions, limit = self._driver.bus.sessions, self._settings.registrations_per_principal_max
        mine = self._authority.sessions.things(who.name, sessions)
        has = sum(len(sessions[SessionId(one)].registrations) for one in mine)
        if has >= limit and self._bound(who):
            raise LimitReached("EMFILE", "registrations_per_principal_max", limit)

    def check_address_space(self, who: Principal) -> None:
        """One more address space. Raises: MmError EAGAIN."""
        limit = self._settings.address_spaces_per_principal_max
        below = self._authority.mms.count_below(who.name, limit, self._driver.memory.mms)
        if not below and self._bound(who):
            raise MmError(
                "EAGAIN",
                f"{who.name} has {limit} address spaces, which is the limit (address_spaces_per_principal_max); let "
                "one exit first",
            )

    def check_file(self, who: Principal) -> None:
        """One more file. Raises: MmError EMFILE."""
        limit = self._settings.files_per_principal_max
        below = self._authority.files.count_below(who.name, limit, self._driver.memory.files)
        if not below and self._bound(who):
            raise MmError(
                "EMFILE",
                f"{who.name} has {limit} files, which is the limit (files_per_principal_max); a file goes with its "
                "name and its last mapping",
            )

    # Memory.

    def memcg(self, who: Principal) -> str:
        """The group that pays for what this principal makes, limited as is configured; "": nobody counts it."""
        if not self._bound(who):
            return ""
        frames, swap_slots = self._memory_limits()
        memcg = self._driver.memory.memcgs.get(who.name)
        if memcg is None or (memcg.limit, memcg.swap_limit) != (frames, swap_slots):
            self._driver.bus.limit_memcg(who.name, frames, swap_slots)
        return who.name

    def forked(self, who: Principal, child: int) -> None:
        """A child, which was its parent's so far, is this principal's."""
        mm, name = self._driver.memory.mms.get(MmId(child)), self.memcg(who)
        if mm is not None and name != (mm.memcg.name if mm.memcg is not None else ""):
            self._driver.bus.join_memcg(child, name)

    def limit_memory(self) -> None:
        """The configuration may be another one than that under which the groups were made."""
        limits = self._memory_limits()
        for name, memcg in self._driver.memory.memcgs.items():
            if (memcg.limit, memcg.swap_limit) != limits:
                self._driver.bus.limit_memcg(name, *limits)

    def _memory_limits(self) -> tuple[int, int]:
        settings = self._settings
        return (
            settings.frames_per_principal_max or settings.frames_nr // 2,
            settings.swap_slots_per_principal_max or settings.swap_slots_nr // 2,
        )


def _take_one(counts: Counter[str], name: str) -> None:
    """A principal that has nothing is forgotten: there may be many over the time."""
    counts[name] -= 1
    if not counts[name]:
        del counts[name]
