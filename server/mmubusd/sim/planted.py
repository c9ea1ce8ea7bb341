"""Planted bugs: a list of mistakes that somebody could make, each of which the simulation must find.

Each one replaces a piece of the real cores for as long as it is planted. `mmubus sim --planted NAME` switches one on;
`--planted all` goes through the list and says how many seeds each took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmubusd.mm.range_lock import Ticket
from mmubusd.notify import merging
from mmubusd.notify.barred import BarredRanges
from mmubusd.notify.chain import Chain, RmapChain
from mmubusd.notify.clock import NEVER, Clock
from mmubusd.notify.intervals import IntervalIndex
from mmubusd.notify.notice import Notice, Op
from mmubusd.notify.operation import Operation
from mmubusd.notify.outbox import Outbox
from mmubusd.notify.registry import Registry
from mmubusd.notify.round import Round
from mmubusd.notify.rounds import Rounds
from mmubusd.notify.runner import Runner
from mmubusd.notify.session import Session
from mmubusd.notify.sessions import Sessions
from mmubusd.notify.translation import NOTHING, TranslationTable

Patch = Callable[[object, str, object], None]
"""Replaces an attribute until the bug is taken out again."""


@dataclass(frozen=True, slots=True)
class Planted:
    """A bug. what: in one sentence; plant: puts it in."""

    name: str
    what: str
    plant: Callable[[Patch], None]

    @contextmanager
    def planted(self) -> Iterator[None]:
        """While the context lasts, the bug is there."""
        undo: list[tuple[object, str, object]] = []

        def patch(owner: object, name: str, value: object) -> None:
            undo.append((owner, name, vars(owner)[name]))
            setattr(owner, name, value)

        try:
            self.plant(patch)
            yield
        finally:
            for owner, name, value in reversed(undo):
                setattr(owner, name, value)


PLANTED: dict[str, Planted] = {}


def bug(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
    """Put a bug on the list, under the function's name; its docstring says what it is."""
    name = plant.__name__.replace("_", "-")
    PLANTED[name] = Planted(name, (plant.__doc__ or "").strip().rstrip("."), plant)
    return plant


def _nothing(*args: Any, **options: Any) -> None:
    """Instead of what should have been done."""


# Rounds.


@bug
def never_barred(patch: Patch) -> None:
    """Translations are handed out of a range while it is being taken."""
    patch(BarredRanges, "covers", lambda self, start, end: False)


@bug
def one_bar_for_all(patch: Patch) -> None:
    """A flag instead of a count: the end of one round opens what another still covers."""
    lift = BarredRanges.lift

    def careless(self: BarredRanges, serial: int, start: int, end: int) -> Any:
        self.covers(start, end)
        for other, _ in self._bars.overlapping(start, end):
            if other != serial:
                self._bars.remove(other)
        return lift(self, serial, start, end) if serial in self._bars else []

    patch(BarredRanges, "lift", careless)


@bug
def acked_on_sending(patch: Patch) -> None:
    """Rounds do not wait: whoever is told counts as done."""
    tell_each = Rounds._tell_each

    def eager(self: Rounds, round_: Round, notice: Notice, deliveries: Any) -> None:
        tell_each(self, round_, notice, deliveries)
        for session, targets in deliveries:
            if session in round_.waiting:
                self.answer(session, notice, targets, None)
        notice.origin = None

    def apart(self: Rounds, round_: Round, notice: Notice, deliveries: Any) -> None:
        round_.count()
        eager(self, round_, notice, deliveries)

    patch(Rounds, "_tell_each", eager)
    patch(Rounds, "_tell_together", apart)


@bug
def first_answer_ends_it(patch: Patch) -> None:
    """A round ends with the first answer instead of the last."""
    answer = Rounds.answer

    def hasty(self: Rounds, session: Session, notice: Notice, targets: Any, result: Any, *, gone: bool = False) -> None:
        round_ = notice.origin
        if round_ is not None:
            for other in [one for one in round_.waiting if one is not session]:
                del round_.waiting[other]
            if session not in round_.waiting:
                return
        answer(self, session, notice, targets, result, gone=gone)

    patch(Rounds, "answer", hasty)


@bug
def dirty_forgotten(patch: Patch) -> None:
    """What a device says that it wrote is not put on the frames."""
    patch(Rounds, "dirty", _nothing)


@bug
def dirty_of_one_address_space_only(patch: Patch) -> None:
    """A page that several registrations hold at the same address is marked dirty for the newest of them alone."""
    dirty = Rounds.dirty

    def first_only(self: Rounds, session: Session, notice: Notice, targets: tuple[int, ...], pages: Any) -> None:
        for page in pages:
            held = [one for one in self.voiding.registrations(targets) if one.table.get(page) is not None]
            dirty(self, session, notice, (held[0].id,) if held else targets, (page,))

    patch(Rounds, "dirty", first_only)


@bug
def written_is_lost_with_its_registration(patch: Patch) -> None:
    """What a registration could write when it ended does not count as written."""
    patch(Registry, "_dirty", _nothing)


@bug
def ends_forgotten(patch: Patch) -> None:
    """invalidate_range_end is never sent."""
    patch(Rounds, "_put_ends", _nothing)


@bug
def end_for_the_refuser(patch: Patch) -> None:
    """Who refused a non-blockable start gets its end all the same."""
    put_ends = Rounds._put_ends

    def polite(self: Rounds, round_: Any) -> None:
        refusers, round_.refusers = round_.refusers, {}
        put_ends(self, round_)
        round_.refusers = refusers

    patch(Rounds, "_put_ends", polite)


@bug
def no_end_after_any_refusal(patch: Patch) -> None:
    """Who refused the second op of a notification does not get the end of the first."""
    hear = Round.hear
    patch(Round, "hear", lambda self, session, op, result: hear(self, session, Op.INVALIDATE_RANGE_START, result))


@bug
def unregistered_is_awaited(patch: Patch) -> None:
    """Unregistering leaves the rounds waiting that wait for it."""
    patch(Rounds, "withdraw", lambda self, registration, because: self.registry.remove(registration, because))


# Who is told.


@bug
def one_is_not_told(patch: Patch) -> None:
    """The oldest on the list is forgotten."""
    plan_of = Chain.plan

    def short(self: Chain, kind: Any, spans: Any) -> Any:
        plan = plan_of(self, kind, spans)
        if len(plan.counts) < 2:
            return plan
        left_out = list(plan.counts)[-1]
        steps = tuple((op, tuple(one for one in told if one.session is not left_out)) for op, told in plan.steps)
        return plan._replace(steps=steps, counts={one: n for one, n in plan.counts.items() if one is not left_out})

    patch(Chain, "plan", short)


@bug
def first_exporter_only(patch: Patch) -> None:
    """Two exporters of one frame: only one of them is told."""
    plan_of = RmapChain.plan
    patch(RmapChain, "plan", lambda self, exporters: plan_of(self, set(sorted(exporters)[:1])))


@bug
def intervals_end_too_early(patch: Patch) -> None:
    """Whatever overlaps only the last page of an interval is not found."""
    overlapping = IntervalIndex.overlapping

    def short(self: IntervalIndex[Any], start: int, end: int) -> Any:
        return [
            (serial, item) for serial, item in overlapping(self, start, end) if self.by_serial[serial][1] > start + 4096
        ]

    patch(IntervalIndex, "overlapping", short)


@bug
def tables_kept_after_the_ack(patch: Patch) -> None:
    """What is given back still counts as held."""
    patch(Registry, "void", _nothing)


@bug
def void_one_page_too_few(patch: Patch) -> None:
    """An ack voids all pages of a range but the last."""
    drop = TranslationTable.drop

    def short(self: TranslationTable, start: int, end: int, generation: Any) -> Any:
        return (
            drop(self, start, end - 4096, generation)
            if 4096 < end - start < 1 << 40
            else drop(self, start, end, generation)
        )

    patch(TranslationTable, "drop", short)


# The outbox.


@bug
def never_sent_again(patch: Patch) -> None:
    """After a resume nothing is sent again."""
    patch(Outbox, "send_again", _nothing)


@bug
def resumed_one_too_late(patch: Patch) -> None:
    """After a resume the first notice that is not acknowledged is left out."""

    def short(self: Outbox) -> None:
        self._sent = min(1, len(self._window))

    patch(Outbox, "send_again", short)


@bug
def busy_is_done(patch: Patch) -> None:
    """A handler that asks for time counts as finished."""
    acknowledge = Outbox.acknowledge

    def eager(self: Outbox, ack: Any, clock: float) -> Any:
        busy = [result.seq for result in ack.results if result.busy]
        if not busy:
            return acknowledge(self, ack, clock)
        ack = type(ack)(ack.through, (*ack.also, *busy), [one for one in ack.results if not one.busy])
        return acknowledge(self, ack, clock)

    patch(Outbox, "acknowledge", eager)


@bug
def failed_is_done(patch: Patch) -> None:
    """A handler that failed counts as finished."""
    acknowledge = Outbox.acknowledge

    def eager(self: Outbox, ack: Any, clock: float) -> Any:
        failed = [result.seq for result in ack.results if result.failed]
        if not failed:
            return acknowledge(self, ack, clock)
        ack = type(ack)(ack.through, (*ack.also, *failed), [one for one in ack.results if not one.failed])
        return acknowledge(self, ack, clock)

    patch(Outbox, "acknowledge", eager)


@bug
def merged_answers_only_one(patch: Patch) -> None:
    """The ack of a merged notice answers one of the rounds that it stands for."""
    originals = merging._originals
    patch(merging, "_originals", lambda group: originals(group)[:1])


@bug
def merged_names_only_the_first(patch: Patch) -> None:
    """A merged notice covers the first of the ranges that it stands for."""
    replace = merging._replace

    def narrow(first: Notice, group: Any, start: int, end: int, pages: tuple[int, ...]) -> Notice:
        return replace(first, group, first.start, first.end, tuple(first.pages))

    patch(merging, "_replace", narrow)


# Sessions.


@bug
def nobody_is_fenced(patch: Patch) -> None:
    """A budget that is used up has no consequence."""
    deadlines = Sessions._deadlines

    def patient(self: Sessions, session: Session, seq: int, notice: Notice, targets: Any) -> Any:
        return deadlines(self, session, seq, notice, targets)[0], NEVER

    patch(Sessions, "_deadlines", patient)


@bug
def fence_forgets_rounds(patch: Patch) -> None:
    """A fence does not answer for the fenced."""

    def void(self: Sessions, session: Session, because: str) -> None:
        for registration in list(session.registrations.values()):
            self.rounds.registry.remove(registration, because)
        session.outbox.clear()

    patch(Sessions, "_void", void)


@bug
def fenced_may_go_on(patch: Patch) -> None:
    """Requests of a fenced session are served."""
    fence = Sessions.fence

    def soft(self: Sessions, session: Session, because: str, **more: Any) -> None:
        registrations = dict(session.registrations)
        fence(self, session, because, **more)
        for registration in registrations.values():
            registration.alive = True
            session.registrations[registration.id] = registration
        session.fenced = None

    patch(Sessions, "fence", soft)


@bug
def stalls_count_against_clients(patch: Patch) -> None:
    """When the server has slept, everybody's budget is over."""

    def tick(self: Clock, now: float) -> float:
        self._seen = max(self._seen, now)
        self.time = max(self.time, now)
        return self.time

    patch(Clock, "tick", tick)


@bug
def fenced_frames_are_reused(patch: Patch) -> None:
    """What a fenced client could still reach through shared memory is freed with the fence."""
    patch(Sessions, "_withhold", _nothing)


@bug
def withheld_for_ever(patch: Patch) -> None:
    """Frames that were withheld are never let go."""
    patch(Sessions, "_let_go", _nothing)


@bug
def demoted_keeps_what_it_holds(patch: Patch) -> None:
    """A demotion does not take away what the registration holds."""
    patch(Registry, "withdraw", _kept_when_demoted(Registry.withdraw))


def _kept_when_demoted(withdraw: Any) -> Any:
    def kept(self: Registry, registration: Any) -> Any:
        return NOTHING if registration.demotable else withdraw(self, registration)

    return kept


@bug
def demoted_at_once(patch: Patch) -> None:
    """A demotable registration is demoted at half its budget, and is not told to drop anything."""
    deadlines = Sessions._deadlines

    def demote(self: Rounds, registration: Any) -> None:
        session = registration.session
        for notice, targets in session.outbox.withdraw(registration.id):
            self.answer(session, notice, targets, None, gone=True)
        self.registry.demote(registration)

    def half(self: Sessions, session: Session, seq: int, notice: Notice, targets: Any) -> Any:
        late, whole = deadlines(self, session, seq, notice, targets)
        return late, min(whole, late)

    patch(Rounds, "demote", demote)
    patch(Sessions, "_deadlines", half)


# Operations.


@bug
def grants_look_newer(patch: Patch) -> None:
    """A grant says that it was made after notices that had not been sent: nobody faults again."""
    patch(Session, "as_of_seq", property(lambda self: self.outbox.last_seq + (1 << 20)))


@bug
def deadlocks_are_not_found(patch: Patch) -> None:
    """Handlers that wait for themselves are fenced for it."""
    patch(Runner, "_break_deadlock", lambda self: False)


@bug
def locks_are_granted_at_once(patch: Patch) -> None:
    """Calls on the same range run at the same time."""
    waits = Runner._waits

    def rude(self: Runner, operation: Operation[object], wanted: object) -> bool:
        ticket = getattr(wanted, "ticket", None)
        return False if isinstance(ticket, Ticket) else waits(self, operation, wanted)

    patch(Runner, "_waits", rude)
