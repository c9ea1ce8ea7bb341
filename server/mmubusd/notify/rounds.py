"""Rounds: opening them, hearing answers, closing them.

runner            rounds                            sessions
notification ───► begin: bar, plan, put notices ──► outboxes
                  answer ◄───────────────────────── acks, fences, unregistering
resume       ◄─── ended
over         ───► close: lift the bar, put ends ──► outboxes, without waiting
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mmubusd.mm.addr import MmId
from mmubusd.mm.notification import InvalidateRange, Notification, RmapInvalidatePage
from mmubusd.notify.barred import BarredFrames
from mmubusd.notify.chain import Chain
from mmubusd.notify.clock import Clock
from mmubusd.notify.dispatch import Delivery, Kind, Plan
from mmubusd.notify.history import What
from mmubusd.notify.log import Log
from mmubusd.notify.notice import AGING, VOIDING, Notice, Op, RegistrationId, Result, RoundId, Targets
from mmubusd.notify.operation import Operation
from mmubusd.notify.outbox import Answered
from mmubusd.notify.page_history import MM_ENDED
from mmubusd.notify.registration import Registration
from mmubusd.notify.registry import Registry
from mmubusd.notify.round import Round
from mmubusd.notify.sanitizer import Breach
from mmubusd.notify.session import Session, State
from mmubusd.notify.telling import KINDS, end_of, notices_of, range_notice, spans_of
from mmubusd.notify.translation import WRITE
from mmubusd.notify.voiding import Voiding

_START, _END = Op.INVALIDATE_RANGE_START, Op.INVALIDATE_RANGE_END


class Rounds:
    """Every round of the bus.

    Attributes:
        open: by number, oldest first, while someone has to answer. past: ended ones, newest last, bounded.
        ended: rounds whose operation is to be resumed; woken: operations whose range has opened. The runner takes both.
        ready: sessions that have something to send.
    """

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self.registry = registry
        self.clock = clock
        self.history = registry.history
        self.counters = registry.counters
        self.open: dict[RoundId, Round] = {}
        self.past: deque[Round] = deque(maxlen=registry.limits.rounds_ended_max)
        self.ended: deque[Round] = deque()
        self.woken: deque[Operation[object]] = deque()
        self.barred_frames = BarredFrames()
        self.ready: list[Session] = []
        self._last_id = 0
        self._log: Log | None = None
        self.voiding = Voiding(registry, clock)

    # Opening.

    def begin(self, notification: Notification, operation: Operation[object]) -> Round | None:
        """Tell everyone concerned. Returns: the round; None when nobody has to answer."""
        kind = KINDS[type(notification)]
        chain: Chain | None = None
        spans: Sequence[tuple[int, int]] = ()
        if isinstance(notification, RmapInvalidatePage):
            memory = self.registry.memory
            plan = self.registry.rmap.plan({one for pfn in notification.pfns for one in memory.exporters(pfn)})
        else:
            if kind is Kind.RELEASE:
                self.registry.exiting.add(notification.mm.id)
                operation.exiting = notification.mm.id
            chain = self.registry.chains.get(notification.mm.id)
            if chain is None:
                if kind is Kind.RELEASE:
                    self._forget_demoted(notification.mm.id)
                return None
            spans = spans_of(notification)
            plan = chain.plan(kind, spans)
        self._last_id += 1
        round_ = Round(RoundId(self._last_id), kind, notification, operation, plan, chain, spans, self.clock.time)
        if not plan.counts:
            self._bar(round_)  # nobody has to answer now; but somebody could come before the operation has ended
            operation.bars.append(round_)
            if plan.deaf:
                self._void_deaf(round_)
            self.release_ended(round_)
            if self.history.recording:
                self.history.note(What.ROUND_ENDED, round_id=round_.id)
            return None
        self.counters.rounds += 1
        self.open[round_.id] = round_
        self._bar(round_)
        if plan.deaf:
            self._void_deaf(round_)
        self._tell(round_, plan)
        return round_

    def _void_deaf(self, round_: Round) -> None:
        if round_.voids:
            self.registry.void_deaf(round_.plan, round_.spans, round_)

    def _bar(self, round_: Round) -> None:
        chain = round_.chain
        if chain is not None:
            chain.rounds_open += 1
            if round_.voids:
                round_.bars = [chain.barred.bar(start, end) for start, end in round_.spans]
        elif isinstance(round_.notification, RmapInvalidatePage):
            self.barred_frames.bar(round_.notification.pfns)
        if self.history.recording:
            self.history.note(
                What.ROUND_OPENED, round_id=round_.id, mm=round_.mm, ranges=round_.spans, text=round_.kind.value,
                pfns=getattr(round_.notification, "pfns", ()),
            )  # fmt: skip

    def _tell(self, round_: Round, plan: Plan) -> None:
        """One notice an op (a page batch told as ranges: one a run), into the outbox of each session concerned."""
        if len(plan.steps) == 1 and isinstance(round_.notification, InvalidateRange):
            ((op, deliveries),) = plan.steps
            self._tell_together(round_, range_notice(round_, op, round_.notification), deliveries)
            return
        round_.count()
        for op, deliveries in plan.steps:
            notices = notices_of(round_, op)
            if len(notices) > 1:
                for session, _ in deliveries:
                    round_.waiting[session] += len(notices) - 1
            for notice in notices:
                self._tell_each(round_, notice, deliveries)

    def _tell_together(self, round_: Round, notice: Notice, deliveries: tuple[Delivery, ...]) -> None:
        """A round of one notice: written once for all whom it goes to, if all of them have room for it."""
        log = self._log
        if log is None or not log.open or log.deliveries is not deliveries:
            log = self._log = Log(deliveries)
        if not log.write(notice):
            log.open = False
            round_.count()
            self._tell_each(round_, notice, deliveries)
            return
        if notice.op is _START:
            round_.starts = (*round_.starts, (notice, deliveries))
        round_.notices_nr = len(deliveries)
        self.counters.notices += len(deliveries)
        if not round_.position:
            for session, _ in deliveries:
                self._announce(session)
        if self.history.recording:
            for session, targets in deliveries:
                self._note_put(session, notice, targets)

    def _tell_each(self, round_: Round, notice: Notice, deliveries: tuple[Delivery, ...]) -> None:
        if notice.op is _START:
            round_.starts = (*round_.starts, (notice, deliveries))
        round_.notices_nr += len(deliveries)
        self.counters.notices += len(deliveries)
        for session, targets in deliveries:
            self.deliver(session, notice, targets)

    def deliver(self, session: Session, notice: Notice, targets: Targets) -> None:
        """Put a notice into a session's outbox. Who has much unread is not asked about age at all."""
        if notice.op in AGING and session.outbox.unread_nr >= self.registry.limits.unread_asked_max:
            self.counters.unasked += 1
            session.outbox.pass_over()
            self.answer(session, notice, targets, None)
            return
        if session.outbox.put(notice, targets):
            self._merge(session)
        self._announce(session)
        if self.history.recording:
            self._note_put(session, notice, targets)

    def _announce(self, session: Session) -> None:
        """It has something to read, and half its budget for that from now on."""
        if not session.in_ready:
            session.in_ready = True
            self.ready.append(session)
        half = self.clock.time + session.shortest_budget_s / 2
        if half < session.armed_at:
            self.clock.arm(session, half)

    def _note_put(self, session: Session, notice: Notice, targets: Targets) -> None:
        if notice.op in VOIDING or notice.op is _END:
            what = What.END_PUT if notice.op is _END else What.PUT
            for target in targets:
                self.history.note(
                    what, round_id=notice.round, session=session.id, registration=target, text=notice.op.name.lower()
                )

    def _merge(self, session: Session) -> None:
        """The session does not read as fast as it is told."""
        outbox = session.outbox
        before, flushes, wholes = outbox.merged_nr, outbox.flushes_nr, outbox.wholes_nr
        waiting, unasked = outbox.merge_waiting()
        self.counters.merged += outbox.merged_nr - before
        self.counters.flushes_overload += outbox.flushes_nr - flushes
        self.counters.flushes_mm += outbox.wholes_nr - wholes
        for merged, _ in waiting:
            for original, _ in merged.merged or ():
                if original.op is _START and original.origin is not None:
                    if original.origin.merged is None:
                        original.origin.merged = {}
                    original.origin.merged[session, original] = merged
                    if self.history.recording:
                        number = merged.round if merged.op is _START else 0
                        self.history.note(What.MERGED, round_id=original.round, session=session.id, number=number)
        for notice, targets in unasked:
            self.counters.unasked += 1
            self.answer(session, notice, targets, None)

    # Answering.

    def answer(
        self, session: Session, notice: Notice, targets: Targets, result: Result | None, *, gone: bool = False
    ) -> None:
        """A notice is answered. Args: gone: nobody did; those whom it went to are fenced off, or have left."""
        round_ = notice.origin
        if round_ is None:
            for original, original_targets in notice.merged or ():
                self.answer(session, original, original_targets, result, gone=gone)
            return
        if result is not None and not gone:
            round_.hear(session, notice.op, result)
        round_.part()
        left = round_.waiting[session]
        if left > 1:
            round_.waiting[session] = left - 1
            return
        if round_.voids and (session.holding or self.history.recording):
            if not gone:
                self.voiding.void(session, round_, notice, targets, result, ())
            elif len(round_.plan.steps) > 1 and session.state in (State.LIVE, State.LOST):
                self.voiding.void(session, round_, notice, targets, result, targets)  # others of it have answered
        del round_.waiting[session]
        round_.answered.append((session, self.clock.time, gone))
        self._has_answered(session, round_)

    def answer_plainly(self, session: Session, done: Answered) -> None:
        """`answer`, for what one acknowledgement says is done and nothing else."""
        holds = session.holding > 0 or self.history.recording
        log = done.log
        if log is None:
            for notice, targets in zip(done.notices, done.targets, strict=True):
                self.answer(session, notice, targets, None)
            return
        if holds:
            for notice, targets in zip(done.notices, done.targets, strict=True):
                if notice.origin is not None and notice.origin.voids:
                    self.voiding.void(session, notice.origin, notice, targets, None, ())
        for notice in log.answer(session, done.through, self.clock.time):
            round_, notice.origin = notice.origin, None  # round, log and notice would hold each other for ever
            assert round_ is not None
            self._end(round_)

    def _has_answered(self, session: Session, round_: Round) -> None:
        """A session has answered all of a round that counts for itself: see whether it was the last."""
        if not round_.waiting:
            session.harm_s += self.clock.time - round_.alone_since
            self._end(round_)

    def _end(self, round_: Round) -> None:
        """Everyone has answered, or is gone."""
        round_.ended_at = self.clock.time
        self.ended.append(round_)
        del self.open[round_.id]
        self.past.append(round_)
        if self.history.recording:
            self.history.note(What.ROUND_ENDED, round_id=round_.id)

    def dirty(self, session: Session, notice: Notice, targets: Targets, pages: Sequence[int]) -> None:
        """The device wrote to these pages: on the frames before the ack counts (rule DirtyIsNotLost).

        A FLUSH_ALL has targets on several address spaces, which may all hold a page of that address: each counts as
        written, for one that is called dirty and is not costs nothing.
        """
        memory = self.registry.memory
        generation = memory.frames.generation
        registrations = self.voiding.registrations(targets)
        for page in pages:
            held_by = [(one, held) for one in registrations if (held := one.table.get(page)) is not None]
            written = [
                (one, held.pfn)
                for one, held in held_by
                if held.rights & WRITE and int(generation[held.pfn]) == held.generation
            ]
            memory.set_dirty([pfn for _, pfn in written])
            if self.history.recording:
                for one, pfn in written:
                    self.history.note(What.DIRTIED, session=session.id, registration=one.id, start=page, pfns=(pfn,))
            if not written:
                self.counters.dirty_unheld += 1
                known = any(one.uncached for one in registrations)  # what was demoted, or ended, counts as written
                if not known and not self.registry.pages.ended_since(session.id, notice.opened_at):
                    self.dirty_too_late(session, targets[0], page)

    def dirty_too_late(self, session: Session, registration_id: int, page: int) -> None:
        """A page (or frame) is said to be dirty, and its holder has no right to write it: what it wrote may be lost.

        What was taken with a demotion counts as written already.
        """
        registration = self.registry.registrations.get(RegistrationId(registration_id))
        if registration is not None and registration.uncached:
            return
        self.registry.sanitizer.page(
            Breach.DIRTY_LOST, session,
            f"{session.name} reports {page:#x} as written and holds no translation to write it with: it was handed "
            "over too late, or it is not the page that was written",
            registration_id, page,
        )  # fmt: skip

    # Closing.

    def close(self, round_: Round) -> None:
        """The operation has gone on: what the round covered may be handed out again, and starts get their ends."""
        chain = round_.chain
        if chain is not None:
            chain.rounds_open -= 1
            for serial, (start, end) in zip(round_.bars, round_.spans, strict=False):
                woken = chain.barred.lift(serial, start, end)
                if woken:
                    self.woken.extend(woken)
            if round_.starts:
                self._put_ends(round_)
            if not chain.rounds_open:
                self.registry.forget_chain_if_unused(chain)
        elif isinstance(round_.notification, RmapInvalidatePage):
            self.barred_frames.lift(round_.notification.pfns)
        if self.history.recording:
            self.history.note(What.LIFTED, round_id=round_.id)

    def _put_ends(self, round_: Round) -> None:
        """An end for each start that was sent, to those who have the op; not to those who refused the start.

        Kernel: mn_hlist_invalidate_range_start(), which ends it for those who did not refuse when another one does.
        """
        for start, deliveries in round_.starts:
            end: Notice | None = None
            for session, targets in deliveries:
                if session.state not in (State.LIVE, State.LOST):
                    continue
                refused = round_.refusers.get(session, False)
                told = self.voiding.registrations(targets)
                wanting = tuple(one.id for one in told if _END in one.ops and one.flushed_round < round_.id)
                if not wanting:
                    continue
                merged = round_.merged.get((session, start)) if round_.merged is not None else None
                if merged is None:
                    if refused:
                        continue
                    if end is None:
                        end = end_of(start, self.clock.time)
                    self.deliver(session, end, wanting)
                    self.counters.notices += 1
                    continue
                merged.ends_left -= 1
                merged.owes_end |= not refused
                if not merged.ends_left and merged.op is _START and merged.owes_end:
                    self.deliver(session, end_of(merged, self.clock.time), wanting)
                    self.counters.notices += 1

    def release_ended(self, round_: Round) -> None:
        """Everyone has answered a release: their registrations are gone before the operation goes on."""
        if round_.kind is Kind.RELEASE and round_.chain is not None:
            for registration in round_.chain.members():
                self.withdraw(registration, MM_ENDED)
            self._forget_demoted(round_.mm)

    def _forget_demoted(self, mm: int) -> None:
        """The address space ends. What tells them that they hold nothing stays in their outbox."""
        for registration in [one for one in self.registry.registrations.values() if one.uncached and one.mm == mm]:
            self.registry.remove(registration, MM_ENDED)

    def withdraw(self, registration: Registration, because: str) -> None:
        """Take a registration off its list; what waits for it counts as answered."""
        session = registration.session
        for notice, targets in session.outbox.withdraw(registration.id):
            self.answer(session, notice, targets, None, gone=True)
            session.flushes_due -= notice.op is Op.FLUSH_ALL and not notice.round
        self.registry.remove(registration, because)

    def demote(self, registration: Registration) -> None:
        """Instead of a fence: it holds nothing any more, is told to drop everything, and is waited for no longer."""
        session = registration.session
        for notice, targets in session.outbox.withdraw(registration.id):
            self.answer(session, notice, targets, None, gone=True)
        self.registry.demote(registration)
        registration.flushed_round = self._last_id
        session.flushes_due += 1
        flush = Notice(Op.FLUSH_ALL, RoundId(0), None, self.clock.time)
        self.deliver(session, flush, (registration.id,))

    def flush(self, session: Session, targets: Targets) -> None:
        """Everything that these hold is void; nobody waits for them to drop it."""
        self._last_id += 1
        self.deliver(session, Notice(Op.FLUSH_ALL, RoundId(self._last_id), None, self.clock.time), targets)

    def exited(self, mm_id: int) -> None:
        """The operation that raised a release has ended."""
        self.registry.exiting.discard(MmId(mm_id))
