"""The lists of notifiers: one for each address space, and the global rmap list.

Who is concerned by a range is found at a cost that grows with how many are:

    whole address space ──► one list, newest first; its plan of who gets what is made once and kept
    an interval         ──► IntervalIndex
    only what it holds  ──► by leaf table (2 MiB), in which something of it is held

Kernel: hlist_add_head_rcu() puts the newest first, mm/mmu_notifier.c, v6.12; interval_tree for intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mmubusd.mm.addr import TASK_SIZE
from mmubusd.mm.mm import Mm
from mmubusd.notify.barred import BarredRanges
from mmubusd.notify.dispatch import NOBODY, Kind, Plan, make_plan
from mmubusd.notify.intervals import IntervalIndex
from mmubusd.notify.notice import RegistrationId
from mmubusd.notify.registration import Registration
from mmubusd.notify.translation import TranslationTable, leaves_of


class Chain:
    """The notifiers of one address space, and what may not be handed out of it now.

    Attributes: mm: the address space; barred: its bars; rounds_open: how many rounds are open on it.
    """

    __slots__ = ("_holders", "_intervals", "_members", "_plans", "_whole", "barred", "mm", "rounds_open")

    def __init__(self, mm: Mm) -> None:
        self.mm = mm
        self.barred = BarredRanges()
        self.rounds_open = 0
        self._members: dict[RegistrationId, Registration] = {}
        self._whole: dict[RegistrationId, Registration] = {}
        self._intervals: IntervalIndex[Registration] = IntervalIndex()
        self._holders: dict[int, set[Registration]] = {}  # of those that only want to hear of what they hold
        self._plans: dict[Kind, Plan] = {}  # for exactly those that want everything

    def __len__(self) -> int:
        return len(self._members)

    def members(self) -> list[Registration]:
        """Everyone, newest first."""
        return [self._members[key] for key in sorted(self._members, reverse=True)]

    def add(self, registration: Registration) -> None:
        """Put it at the head; every later `plan` sees it."""
        self._members[registration.id] = registration
        if registration.only_held:
            assert isinstance(registration.table, TranslationTable)
            registration.table.watchers = self._holders
            registration.table.owner = registration
        elif registration.start == 0 and registration.end == TASK_SIZE:
            newest = next(reversed(self._whole), None)
            self._whole[registration.id] = registration
            if newest is not None and newest > registration.id:  # it was demoted, and comes back to its place
                self._whole = dict(sorted(self._whole.items()))
            self._plans.clear()
        else:
            self._intervals.add(registration.start, registration.end, registration.id, registration)

    def remove(self, registration: Registration) -> None:
        """Take it off; no later `plan` sees it. Requires: what it held is dropped."""
        del self._members[registration.id]
        if self._whole.pop(registration.id, None) is not None:
            self._plans.clear()
        elif not registration.only_held:
            self._intervals.remove(registration.id)

    def plan(self, kind: Kind, spans: Sequence[tuple[int, int]]) -> Plan:
        """Who is told what of a notification on these ranges. A release concerns everyone."""
        if not self._members:
            return NOBODY
        if kind is Kind.RELEASE:
            return make_plan(kind, self.members())
        if self._intervals.by_serial or self._holders:
            some = self._some(*spans[0]) if len(spans) == 1 else self._some_of_any(spans)
            if some:
                everyone = [*some, *self._whole.values()]
                everyone.sort(key=lambda registration: -registration.id)
                return make_plan(kind, everyone)
        plan = self._plans.get(kind)
        if plan is None:
            plan = self._plans[kind] = make_plan(kind, reversed(self._whole.values()))
        return plan

    def _some_of_any(self, spans: Sequence[tuple[int, int]]) -> list[Registration]:
        return list({registration: None for start, end in spans for registration in self._some(start, end)})

    def _some(self, start: int, end: int) -> list[Registration]:
        """Those that do not want everything and are concerned by [start, end)."""
        found = (
            [registration for _, registration in self._intervals.overlapping(start, end)]
            if len(self._intervals)
            else []
        )
        holders = self._holders
        if not holders:
            return found
        numbers = leaves_of(start, end)
        leaves: Iterable[int] = (
            numbers if len(numbers) < len(holders) else [leaf for leaf in holders if leaf in numbers]
        )
        candidates = {registration for leaf in leaves for registration in holders.get(leaf, ())}
        for registration in candidates:
            low, high = max(start, registration.start), min(end, registration.end)
            if low < high and isinstance(registration.table, TranslationTable) and registration.table.holds(low, high):
                found.append(registration)
        return found

    def holders(self, start: int, end: int) -> list[tuple[Registration, int]]:
        """Who holds translations of [start, end), newest first, and how many. Looks at every member."""
        found = []
        for registration in self.members():
            assert isinstance(registration.table, TranslationTable)
            pages = registration.table.count(start, end)
            if pages:
                found.append((registration, pages))
        return found


class RmapChain:
    """The global list of rmap notifiers. A frame concerns those that export it, whoever else is on the list."""

    __slots__ = ("_members",)

    def __init__(self) -> None:
        self._members: dict[int, Registration] = {}

    def __len__(self) -> int:
        return len(self._members)

    def members(self) -> list[Registration]:
        """Everyone, newest first."""
        return [self._members[key] for key in sorted(self._members, reverse=True)]

    def add(self, registration: Registration) -> None:
        self._members[registration.id] = registration

    def remove(self, registration: Registration) -> None:
        del self._members[registration.id]

    def plan(self, exporters: set[int]) -> Plan:
        """Args: exporters: ids of those that export one of the frames."""
        return make_plan(
            Kind.RMAP, [self._members[key] for key in sorted(exporters, reverse=True) if key in self._members]
        )
