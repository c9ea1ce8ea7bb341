"""Explaining: why a round took as long as it did, and what an unmap would cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SHIFT, MmId
from mmubusd.mm.mm import Mm
from mmubusd.mm.pgtable import PFN_SHIFT, PRESENT
from mmubusd.notify.dispatch import Kind
from mmubusd.notify.errors import RequestError
from mmubusd.notify.registration import Registration
from mmubusd.notify.round import Round
from mmubusd.notify.session import Session

if TYPE_CHECKING:
    from mmubusd.notify.rounds import Rounds


@dataclass(frozen=True, slots=True)
class Part:
    """One session's part in a round.

    state: "answered", "waiting to be read", "read", "busy", "failed" or "gone"; seconds: from the notice to the answer,
    or until now; blame: how much of the round's time it was waited for alone, 0 to 1; registrations: whom it concerned;
    said: a failure or a refusal.
    """

    session: Session
    state: str
    seconds: float
    blame: float
    registrations: tuple[int, ...]
    said: str


@dataclass(frozen=True, slots=True)
class Holder:
    """A registration that holds translations of a range, or exports its frames; pages: of the range."""

    registration: Registration
    pages: int


@dataclass(frozen=True, slots=True)
class PageStory:
    """What became of a page with one registration; holds: it has a translation of it now."""

    session: int
    name: str
    registration: int
    holds: bool
    lines: list[str]


class Explain:
    """What people ask about rounds and ranges; looks, and changes nothing."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._registry = rounds.registry

    def find(self, number: int) -> Round:
        """A round that is open, or ended and remembered. Raises: RequestError NO_SUCH_ROUND."""
        found = self._rounds.open.get(number)  # type: ignore[call-overload]
        for ended in self._rounds.past:
            if ended.id == number:
                found = ended
        if not isinstance(found, Round):
            raise RequestError(
                "ENOENT",
                f"round {number} is not open, nor one of the last {self._rounds.past.maxlen} that have ended",
                reason="NO_SUCH_ROUND",
                round=number,
            )
        return found

    def parts(self, round_: Round, now: float) -> list[Part]:
        """Everyone whom the round concerned, slowest first. Args: now: the bus's clock."""
        whole = round_.age(now)
        registrations: dict[Session, list[int]] = {}
        for _, deliveries in round_.plan.steps:
            for session, targets in deliveries:
                registrations.setdefault(session, []).extend(targets)
        alone = (round_.ended_at if not round_.open else now) - round_.alone_since
        found = []
        last = round_.answered[-1][0] if round_.answered and not round_.open else None
        for session, at, gone in round_.answered:
            blame = alone / whole if session is last and whole else 0.0
            said = "refused" if session in round_.refusers else ""
            state = "gone" if gone else "answered"
            concerned = tuple(dict.fromkeys(registrations.get(session, ())))
            found.append(Part(session, state, at - round_.opened_at, blame, concerned, said))
        for session in round_.waiting:
            blame = alone / whole if len(round_.waiting) == 1 and whole else 0.0
            state, said = _standing(session, round_)
            concerned = tuple(dict.fromkeys(registrations.get(session, ())))
            found.append(Part(session, state, whole, blame, concerned, said))
        return sorted(found, key=lambda part: -part.seconds)

    def story(self, round_: Round, parts: list[Part], now: float) -> list[str]:
        """The same in sentences."""
        where = f"[{round_.start:#x}, {round_.end:#x}) of mm {round_.mm}" if round_.mm else "exported frames"
        by = round_.operation.label or "an operation"
        lines = [f"round {round_.id}: {by} raised {round_.kind.value} on {where} at {round_.opened_at:.6f} s"]
        lines += [
            f"{part.session.name}: {part.state} after {part.seconds * 1e3:.3f} ms"
            + (f", waited for alone during {part.blame:.0%} of the round" if part.blame else "")
            + (f": {part.said}" if part.said else "")
            for part in parts
        ]
        if round_.open:
            lines.append(f"it has been open for {round_.age(now) * 1e3:.3f} ms and waits for {len(round_.waiting)}")
        else:
            lines.append(f"it ended after {round_.age(now) * 1e3:.3f} ms")
        return lines

    def page(self, mm: Mm, address: int) -> list[PageStory]:
        """The page's history with everyone who had it: those that are registered, newest first, then those no more."""
        pages = self._registry.pages
        chain = self._registry.chains.get(mm.id)
        found = []
        for one in [] if chain is None else chain.members():
            holds = bool(one.runs(address, address + 1, 1))
            lines = pages.story(one.id, address)
            if holds or lines:
                found.append(PageStory(one.session.id, one.session.name, one.id, holds, lines))
        for number, gone in pages.gone_from(mm.id):
            lines = pages.story(number, address)
            if len(lines) > 1:  # more than that it has ended
                found.append(PageStory(gone.session, gone.name, number, False, lines))
        return found

    def holders(self, mm: Mm, start: int, end: int) -> list[Holder]:
        """Who holds something of the range: of the address space's list, newest first, then exporters of its frames."""
        chain = self._registry.chains.get(mm.id)
        found = [] if chain is None else [Holder(one, pages) for one, pages in chain.holders(start, end)]
        exported: dict[int, int] = {}
        frames = self._registry.memory.frames
        if frames.exports:
            for pfn in self._pfns(mm, start, end):
                for exporter in frames.exports.get(pfn, ()):
                    exported[exporter] = exported.get(exporter, 0) + 1
        known = self._registry.registrations
        found += [Holder(known[one], exported[one]) for one in sorted(exported, reverse=True) if one in known]  # type: ignore[index]
        return found

    def concerned(self, mm: Mm, start: int, end: int) -> dict[Session, list[int]]:
        """Who would have to answer an unmap of the range: sessions, with their registrations."""
        found: dict[Session, list[int]] = {}
        chain = self._registry.chains.get(mm.id)
        if chain is not None:
            for _, deliveries in chain.plan(Kind.RANGE, ((start, end),)).steps:
                for session, targets in deliveries:
                    found.setdefault(session, []).extend(one for one in targets if one not in found.get(session, ()))
        for holder in self.holders(mm, start, end):
            registration = holder.registration
            if not registration.mm:
                found.setdefault(registration.session, []).append(registration.id)
        return found

    def shared(self, mm: Mm, start: int, end: int) -> tuple[int, int]:
        """Pages that are present, and how many of their frames would not be freed: someone else has them too."""
        frames = self._registry.memory.frames
        pfns = [pfn for pfn in self._pfns(mm, start, end) if pfn]
        return len(pfns), sum(frames.refcount_at[pfn] > 1 for pfn in pfns)

    def working_on(self, mm: Mm, start: int, end: int) -> list[str]:
        """Rounds that are open on the range: an unmap may have to wait for their operations."""
        return [
            round_.operation.name()
            for round_ in self._rounds.open.values()
            if round_.mm == mm.id and any(low < end and start < high for low, high in round_.spans)
        ]

    def mm(self, mm: int) -> Mm:
        """Raises: MmError ESRCH."""
        return self._registry.memory.mm(MmId(mm))

    @staticmethod
    def _pfns(mm: Mm, start: int, end: int) -> list[int]:
        found = []
        for _, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
            found += [pte >> PFN_SHIFT for pte in ptes.tolist() if pte & PRESENT]
        return found


def _standing(session: Session, round_: Round) -> tuple[str, str]:
    """How far a session is that has not answered."""
    outbox = session.outbox
    for seq, notice, _ in outbox.unanswered():
        if notice.origin is round_ or any(original.origin is round_ for original, _ in notice.merged or ()):
            if not seq:
                return "waiting to be read", f"{outbox.waiting_nr} notices are not answered"
            if seq in outbox.failed:
                return "failed", outbox.failed[seq]
            return ("busy", "asked for more time") if seq in outbox.busy else ("read", "")
    return "read", ""
