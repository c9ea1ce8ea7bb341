"""Explaining over the wire: a round, the holders of a range, what drivers did wrong, what an unmap would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmu.v1 import inspection_pb2 as pb

from mmubusd.mm.addr import PAGE_MASK, PAGE_SIZE, TASK_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.mm import Mm
from mmubusd.notify import Registration, Session
from mmubusd.notify.errors import RequestError
from mmubusd.rpc.codec import REASONS
from mmubusd.rpc.driver import Driver
from mmubusd.rpc.identity import Principal
from mmubusd.rpc.methods import Context
from mmubusd.rpc.roles import Role

if TYPE_CHECKING:
    from mmubusd.notify.explain import Part
    from mmubusd.notify.round import Round
    from mmubusd.notify.sanitizer import Offence

__all__ = ["Explanations", "registration_message", "round_message"]

CHECK_FRAMES_MAX = 1 << 14
"""Free frames that one request looks at: 64 MiB, some milliseconds."""
RUNS_MAX = 1 << 12
"""Runs of pages that are told of one holder: 64 KiB of the answer."""
US = 1e6


class Explanations:
    """The part of mmu.v1.InspectionService that answers "why" and "what if"."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._bus = driver.bus
        self._authority = driver.authority

    def _sees(self, who: Principal, mm: int) -> bool:
        """Whether somebody may see what happens on an address space; on the rmap list (0) only administrators."""
        if not mm:
            return self._authority.administers(who)
        return bool(self._authority.roles_on_mm(who, mm) & Role.OBSERVE)

    def _now(self) -> float:
        return self._bus.clock(self._driver.now())

    async def explain_round(self, request: pb.ExplainRoundRequest, context: Context) -> pb.ExplainRoundResponse:
        explain, now = self._bus.explain, self._now()
        found = explain.find(request.round)
        if not self._sees(self._authority.caller(context), found.mm):
            raise RequestError("ENOENT", f"round {request.round} is not open, nor remembered", reason="NO_SUCH_ROUND")
        parts = explain.parts(found, now)
        return pb.ExplainRoundResponse(
            round=round_message(found, now, found.open),
            answers=[_answer(part) for part in parts],
            story=explain.story(found, parts, now),
        )

    async def explain_page(self, request: pb.ExplainPageRequest, context: Context) -> pb.ExplainPageResponse:
        page = request.address & PAGE_MASK
        mm, _, _ = self._range(context, request.mm, page, page + PAGE_SIZE)
        return pb.ExplainPageResponse(
            stories=[
                pb.PageStory(
                    session=story.session,
                    session_name=story.name,
                    registration=story.registration,
                    holds=story.holds,
                    story=story.lines,
                )
                for story in self._bus.explain.page(mm, page)
            ],
            now_s=self._now(),
        )

    async def list_holders(self, request: pb.ListHoldersRequest, context: Context) -> pb.ListHoldersResponse:
        mm, start, end = self._range(context, request.mm, request.start, request.end or TASK_SIZE)
        runs_max = min(request.runs_max, RUNS_MAX)
        return pb.ListHoldersResponse(
            holders=[
                pb.Holder(
                    session=holder.registration.session.id,
                    session_name=holder.registration.session.name,
                    state=holder.registration.session.state.value,
                    registration=registration_message(holder.registration),
                    pages=holder.pages,
                    run_starts=[low for low, _ in runs],
                    run_ends=[high for _, high in runs],
                )
                for holder in self._bus.explain.holders(mm, start, end)
                for runs in [holder.registration.runs(start, end, runs_max)]
            ]
        )

    async def list_violations(self, request: pb.ListViolationsRequest, context: Context) -> pb.ListViolationsResponse:
        """A caller sees what concerns address spaces that it may see, and its own sessions."""
        who = self._authority.caller(context)
        offences = self._bus.offences(min(request.check_frames, CHECK_FRAMES_MAX))
        self._driver.pump()
        seen = [each for each in reversed(offences) if self._sees_offence(who, each)]
        now = self._now()
        counts = self._bus.sanitizer.counts if self._authority.administers(who) else {}
        return pb.ListViolationsResponse(
            violations=[_violation(each, now) for each in seen[: request.count or len(seen)]],
            counts={breach.value: count for breach, count in counts.items()},
        )

    def _sees_offence(self, who: Principal, offence: Offence) -> bool:
        session = next((one for one in self._bus.sessions.values() if one.id == offence.session), None)
        own = session is not None and self._authority.may_use(who, session)
        return own or self._authority.administers(who) or bool(offence.mm and self._sees(who, offence.mm))

    async def dry_run(self, request: pb.DryRunRequest, context: Context) -> pb.DryRunResponse:
        mm, start, end = self._range(context, request.mm, request.start, request.end)
        explain = self._bus.explain
        held: dict[Session, int] = {}
        for holder in explain.holders(mm, start, end):
            session = holder.registration.session
            held[session] = held.get(session, 0) + holder.pages
        costs = [
            _cost(session, registrations, held.get(session, 0))
            for session, registrations in explain.concerned(mm, start, end).items()
        ]
        pages, shared = explain.shared(mm, start, end)
        return pb.DryRunResponse(
            costs=sorted(costs, key=lambda cost: -cost.ack_us_p99),
            pages=pages,
            shared_frames=shared,
            waits_for=explain.working_on(mm, start, end),
        )

    def _range(self, context: Context, mm: int, start: int, end: int) -> tuple[Mm, int, int]:
        """Raises: MmError ESRCH, EACCES, EINVAL."""
        self._authority.check_mm(self._authority.caller(context), Role.OBSERVE, mm)
        found = self._bus.explain.mm(mm)
        if start % PAGE_SIZE or end % PAGE_SIZE or not 0 <= start < end <= TASK_SIZE:
            raise MmError("EINVAL", f"[{start:#x}, {end:#x}) is not a range of whole pages below {TASK_SIZE:#x}")
        return found, start, end


def _answer(part: Part) -> pb.Answer:
    return pb.Answer(
        session=part.session.id,
        name=part.session.name,
        state=part.state,
        seconds=part.seconds,
        blame=part.blame,
        registrations=part.registrations,
        said=part.said,
    )


def _violation(offence: Offence, now: float) -> pb.Violation:
    return pb.Violation(
        number=offence.number,
        age_s=max(0.0, now - offence.at),
        kind=offence.breach.value,
        session=offence.session,
        session_name=offence.name,
        registration=offence.registration,
        mm=offence.mm,
        address=offence.address,
        pfn=offence.pfn,
        generation=offence.generation,
        refused=offence.refused,
        message=offence.message,
        story=offence.story,
    )


def _cost(session: Session, registrations: list[int], held: int) -> pb.Cost:
    return pb.Cost(
        session=session.id,
        name=session.name,
        state=session.state.value,
        registrations=registrations,
        held_pages=held,
        ack_us_p50=session.ack_latency.quantile(0.5) * US,
        ack_us_p99=session.ack_latency.quantile(0.99) * US,
        waiting=session.waiting_nr,
        late=session.late_nr,
        harm_s=session.harm_s,
    )


def registration_message(registration: Registration) -> pb.Registration:
    """The contract's message of a registration."""
    return pb.Registration(
        registration=registration.id,
        name=registration.name,
        mm=registration.mm,
        start=registration.start,
        end=registration.end,
        ops=sorted(int(op) for op in registration.ops),  # type: ignore[misc]
        held_pages=registration.held_pages,
        uncached=registration.uncached,
    )


def round_message(each: Round, now: float, is_open: bool) -> pb.Round:
    """The contract's message of a round. Args: now: the bus's clock."""
    return pb.Round(
        round=each.id,
        mm=each.mm,
        start=each.start,
        end=each.end,
        notification=each.kind.value,
        reason=REASONS[each.reason],
        operation=each.operation.label,
        age_s=max(0.0, now - each.opened_at),
        open=is_open,
        waiting_for=each.waiting_for(),
        notices=each.notices_nr,
        took_s=max(0.0, each.age(now)),
        last="" if is_open or not each.answered else each.answered[-1][0].name,
    )
