"""The rules that always hold (design, section 3), each judged from a recording alone.

A validator reads the events of a `History` in order and says where its rule was broken. It keeps its own account of
who holds what, from what was granted and what was acknowledged, and does not look at the bus. Unit tests, simulations
and runs of real processes share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.notify.history import Event, What

_VOIDING = frozenset({"invalidate_range", "invalidate_page", "rmap_invalidate_page", "release"})
Frame = tuple[int, int]
"""A pfn and its generation."""


@dataclass(frozen=True, slots=True)
class Violation:
    """Where a rule was broken. at: the bus's clock; index: of the event."""

    rule: str
    index: int
    at: float
    message: str

    def __str__(self) -> str:
        return f"{self.rule} at {self.at:.6f} s (event {self.index}): {self.message}"


class Account:
    """Who holds what, by the recording.

    held: for each registration its pages (by address; exports by pfn) and their frames; holders: the other way round.
    rounds: what each covers. longest_s: the longest that a round may take.
    """

    def __init__(self, longest_s: float = 2.0) -> None:
        self.longest_s = longest_s
        self.held: dict[int, dict[int, Frame]] = {}
        self.holders: dict[Frame, set[int]] = {}
        self.rounds: dict[int, Event] = {}
        self.registered: dict[int, Event] = {}
        self.fenced: set[int] = set()

    def see(self, event: Event) -> None:
        """Take the event into account."""
        match event.what:
            case What.REGISTERED:
                self.registered[event.registration] = event
            case What.ROUND_OPENED:
                self.rounds[event.round] = event
            case What.GRANTED:
                for at, (pfn, generation) in enumerate(zip(event.pfns, event.generations, strict=True)):
                    if pfn >= 0:
                        key = event.start + at * PAGE_SIZE if event.end else pfn
                        self._drop(event.registration, key)
                        self.held.setdefault(event.registration, {})[key] = (pfn, generation)
                        self.holders.setdefault((pfn, generation), set()).add(event.registration)
            case What.ACKED | What.DEAF | What.RETURNED:
                for key in list(self.covered(event)):
                    self._drop(event.registration, key)
            case What.WITHDRAWN:
                for key in list(self.held.get(event.registration, ())):
                    self._drop(event.registration, key)
            case What.FENCED:
                self.fenced.add(event.session)

    def covered(self, event: Event) -> Iterator[int]:
        """The pages of the event's registration that the event's round, or the event itself, names."""
        held = self.held.get(event.registration, {})
        if event.pfns:
            yield from (pfn for pfn in event.pfns if pfn in held)
            return
        opened = self.rounds.get(event.round)
        for start, end in event.ranges or (opened.ranges if opened is not None else ()):
            yield from (key for key in held if start <= key < end)

    def _drop(self, registration: int, key: int) -> None:
        frame = self.held.get(registration, {}).pop(key, None)
        if frame is not None and frame not in self.held[registration].values():
            self.holders[frame].discard(registration)


class Rule:
    """One rule. `see` is called with each event of the kinds that it `sees`, before the account has taken it in, and
    yields what is wrong."""

    sees: ClassVar[tuple[What, ...]]

    def __init__(self, account: Account) -> None:
        self.account = account

    def see(self, event: Event) -> Iterator[str]:
        raise NotImplementedError

    def end(self) -> Iterator[str]:
        """The recording is over, and everything in it should be."""
        yield from ()


class NoUseAfterFree(Rule):
    """A frame returns to the allocator only when every translation to it is acked away or fenced."""

    sees = (What.FREED, What.CLIENT_USES)

    def __init__(self, account: Account) -> None:
        super().__init__(account)
        self._ended: set[Frame] = set()

    def see(self, event: Event) -> Iterator[str]:
        if event.what is What.FREED:
            for frame in zip(event.pfns, event.generations, strict=True):
                self._ended.add(frame)
                holders = self.account.holders.get(frame)
                if holders:
                    yield f"frame {frame[0]} was freed while registrations {sorted(holders)} held it"
        elif event.what is What.CLIENT_USES and event.session not in self.account.fenced:
            for frame in zip(event.pfns, event.generations, strict=True):
                if frame in self._ended:
                    yield f"registration {event.registration} used frame {frame[0]} after it was freed"


class BarredWhileActive(Rule):
    """While a round covers a range, no translation into that range is handed out."""

    sees = (What.ROUND_OPENED, What.LIFTED, What.GRANTED)

    def __init__(self, account: Account) -> None:
        super().__init__(account)
        self._active: dict[int, Event] = {}

    def see(self, event: Event) -> Iterator[str]:
        if event.what is What.ROUND_OPENED and event.text in _VOIDING:
            self._active[event.round] = event
        elif event.what is What.LIFTED:
            self._active.pop(event.round, None)
        elif event.what is What.GRANTED:
            given = [pfn for pfn in event.pfns if pfn >= 0]
            for round_ in self._active.values():
                inside = event.end and round_.mm == event.mm
                if (inside and any(a < event.end and event.start < b for a, b in round_.ranges)) or (
                    not event.end and set(given) & set(round_.pfns)
                ):
                    yield f"[{event.start:#x}, {event.end:#x}) was given out while round {round_.round} covered it"


class EveryRoundEnds(Rule):
    """Within the longest budget plus an allowance, whatever clients do."""

    ALLOWANCE_S = 0.05

    sees = (What.ROUND_OPENED, What.ROUND_ENDED)

    def __init__(self, account: Account) -> None:
        super().__init__(account)
        self._open: dict[int, float] = {}

    def see(self, event: Event) -> Iterator[str]:
        if event.what is What.ROUND_OPENED:
            self._open[event.round] = event.at
        elif event.what is What.ROUND_ENDED:
            took = event.at - self._open.pop(event.round)
            if took > self.account.longest_s + self.ALLOWANCE_S:
                yield f"round {event.round} took {took:.3f} s"

    def end(self) -> Iterator[str]:
        for round_ in self._open:
            yield f"round {round_} never ended"


class Complete(Rule):
    """Whoever holds something in a round's range is told, or has no op for it; and each start has its end."""

    sees = (
        What.ROUND_OPENED,
        What.ROUND_ENDED,
        What.PUT,
        What.DEAF,
        What.REFUSED,
        What.MERGED,
        What.END_PUT,
        What.WITHDRAWN,
        What.LIFTED,
    )

    def __init__(self, account: Account) -> None:
        super().__init__(account)
        self._owed: dict[int, set[int]] = {}
        self._starts: set[tuple[int, int, int]] = set()  # round, session, registration
        self._ended: set[tuple[int, int]] = set()
        self._merged: dict[tuple[int, int], int] = {}
        self._lifted: set[int] = set()

    def see(self, event: Event) -> Iterator[str]:
        match event.what:
            case What.ROUND_OPENED if event.text in _VOIDING:
                self._owed[event.round] = set(self._concerned(event))
            case What.PUT | What.DEAF | What.REFUSED:
                self._owed.get(event.round, set()).discard(event.registration)
                ops = self.account.registered[event.registration].text
                if event.text == "invalidate_range_start" and "invalidate_range_end" in ops:
                    start = (event.round, event.session, event.registration)
                    if event.what is What.REFUSED:
                        self._starts.discard(start)
                    else:
                        self._starts.add(start)
            case What.MERGED:
                self._merged[event.round, event.session] = event.number
            case What.END_PUT:
                self._ended.add((event.round, event.registration))
                if (event.round, event.session, event.registration) not in self._starts:
                    yield f"registration {event.registration} got the end of round {event.round} without its start"
            case What.WITHDRAWN:
                for owed in self._owed.values():
                    owed.discard(event.registration)
                self._starts = {start for start in self._starts if start[2] != event.registration}
            case What.LIFTED:
                self._lifted.add(event.round)
            case What.ROUND_ENDED:
                missed = self._owed.pop(event.round, set())
                if missed:
                    yield f"round {event.round} ended, and registrations {sorted(missed)} were not told"

    def _concerned(self, event: Event) -> Iterator[int]:
        account = self.account
        if event.pfns:
            for registration, held in account.held.items():
                if any(pfn in held for pfn in event.pfns) and not account.registered[registration].mm:
                    yield registration
            return
        for registration, held in account.held.items():
            if account.registered[registration].mm == event.mm and any(
                start <= key < end for key in held for start, end in event.ranges
            ):
                yield registration

    def end(self) -> Iterator[str]:
        for round_, session, registration in sorted(self._starts):
            number = self._merged.get((round_, session), round_)
            if number and round_ in self._lifted and (number, registration) not in self._ended:
                yield f"registration {registration} got the start of round {round_}, and never its end"


class Ordered(Rule):
    """A client gets its notices in order and without a gap; after a resume from an earlier one on."""

    sees = (What.CLIENT_RECEIVED,)

    def __init__(self, account: Account) -> None:
        super().__init__(account)
        self._last: dict[int, int] = {}

    def see(self, event: Event) -> Iterator[str]:
        last = self._last.get(event.session, 0)
        if event.number > last + 1:
            yield f"session {event.session} got notice {event.number} after {last}"
        self._last[event.session] = max(event.number, last)


class FencedStaysFenced(Rule):
    """After a fence every request under the old epoch fails."""

    sees = (What.GRANTED, What.DMA_READ, What.DMA_WRITTEN, What.ACKED, What.REGISTERED)

    def see(self, event: Event) -> Iterator[str]:
        if event.session in self.account.fenced:
            yield f"session {event.session} was fenced, and {event.what} all the same"


class Isolation(Rule):
    """A round waits only for those that may hold something of its range."""

    sees = (What.PUT,)

    def see(self, event: Event) -> Iterator[str]:
        round_ = self.account.rounds.get(event.round)
        if round_ is None or round_.pfns:
            return
        registered = self.account.registered[event.registration]
        if registered.mm != round_.mm:
            yield f"round {event.round} of mm {round_.mm} waits for registration {event.registration} of another one"
        elif round_.text != "release" and not any(
            start < registered.end and registered.start < end for start, end in round_.ranges
        ):
            yield f"round {event.round} waits for registration {event.registration}, whose interval is elsewhere"


class DirtyIsNotLost(Rule):
    """What a device wrote is on the frame before its ack counts, or its registration ends."""

    sees = (What.CLIENT_WROTE, What.DIRTIED, What.DMA_WRITTEN, What.ACKED, What.WITHDRAWN)

    def __init__(self, account: Account) -> None:
        super().__init__(account)
        self._written: dict[tuple[int, int], int] = {}  # registration and page (or pfn): pfn

    def see(self, event: Event) -> Iterator[str]:
        match event.what:
            case What.CLIENT_WROTE:
                self._written[event.registration, event.start] = event.pfns[0]
            case What.DIRTIED | What.DMA_WRITTEN:
                frames = set(event.pfns)  # whichever of the session's registrations it was told for
                self._written = {key: pfn for key, pfn in self._written.items() if pfn not in frames}
            case What.ACKED:
                for pfn in self._lost(event.registration, self.account.covered(event)):
                    yield f"round {event.round} lost what registration {event.registration} wrote to frame {pfn}"
            case What.WITHDRAWN:
                for pfn in self._lost(event.registration, self.account.held.get(event.registration, ())):
                    yield f"what registration {event.registration} wrote to frame {pfn} was lost with it"

    def _lost(self, registration: int, keys: Iterable[int]) -> Iterator[int]:
        for key in keys:
            pfn = self._written.pop((registration, key), None)
            if pfn is not None:
                yield pfn


class OldPageNeverWritten(Rule):
    """A device reaches only what it holds: after its ack it is off the old frame."""

    sees = (What.DMA_READ, What.DMA_WRITTEN)

    def see(self, event: Event) -> Iterator[str]:
        if event.number:
            return  # through a pin
        held = self.account.held.get(event.registration, {})
        for at, frame in enumerate(zip(event.pfns, event.generations, strict=True)):
            key = event.start + at * PAGE_SIZE if event.mm else frame[0]
            if held.get(key) != frame:
                yield f"registration {event.registration} reached frame {frame[0]} without holding it"


RULES: tuple[type[Rule], ...] = (
    NoUseAfterFree,
    BarredWhileActive,
    EveryRoundEnds,
    Complete,
    Ordered,
    FencedStaysFenced,
    Isolation,
    DirtyIsNotLost,
    OldPageNeverWritten,
)


class Judge:
    """The rules, told of events one by one as they happen. Args: longest_s, rules: as of `judge`."""

    def __init__(self, longest_s: float = 2.0, rules: Iterable[type[Rule]] = RULES) -> None:
        self._account = Account(longest_s)
        self._rules = [rule(self._account) for rule in rules]
        self._concerned = {what: [rule for rule in self._rules if what in rule.sees] for what in What}
        self._index, self._at = -1, 0.0

    def see(self, event: Event) -> list[Violation]:
        """Returns: what is wrong with it."""
        self._index, self._at = self._index + 1, event.at
        found = [self._violation(rule, said) for rule in self._concerned[event.what] for said in rule.see(event)]
        self._account.see(event)
        return found

    def end(self) -> list[Violation]:
        """Nothing is under way any more. Returns: what never ended."""
        return [self._violation(rule, said) for rule in self._rules for said in rule.end()]

    def _violation(self, rule: Rule, message: str) -> Violation:
        return Violation(type(rule).__name__, self._index, self._at, message)


def judge(
    events: Iterable[Event], *, over: bool = True, longest_s: float = 2.0, rules: Iterable[type[Rule]] = RULES
) -> list[Violation]:
    """Read a recording.

    Args: over: it ends with nothing under way, so that what never ended is a violation too; longest_s: the longest
            that a round may take: the longest budget, or with BUSY its cap.
    Returns: every violation, in order.
    """
    one = Judge(longest_s, rules)
    violations = [violation for event in events for violation in one.see(event)]
    return violations + one.end() if over else violations
