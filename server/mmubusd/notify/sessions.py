"""All sessions: hello, resuming, signs of life, and the ways in which one ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite

from mmubusd.notify.clock import NEVER, Clock
from mmubusd.notify.errors import FencedError, LimitReached, RequestError
from mmubusd.notify.history import What
from mmubusd.notify.limits import CONTRACT_VERSION, FEATURES, FINDINGS, WITHIN, Limits
from mmubusd.notify.notice import Notice, SessionId, Targets
from mmubusd.notify.outbox import Outbox
from mmubusd.notify.registration import Registration
from mmubusd.notify.rounds import Rounds
from mmubusd.notify.session import Hello, Session, State


class Sessions:
    """Every session that is remembered.

    Args: gone: called with a session that will never come back, to give back its pins.
    Attributes: by_id; suspect: called with a session and its notice that is late, when its client does not say which
            requests come from its handlers.
    """

    def __init__(self, limits: Limits, epoch: int, rounds: Rounds, gone: Callable[[Session], None]) -> None:
        self.limits = limits
        self.epoch = epoch
        self.rounds = rounds
        self.clock: Clock = rounds.clock
        self.by_id: dict[SessionId, Session] = {}
        self._by_token: dict[str, Session] = {}
        self._gone = gone
        self._last_id = 0
        self._fenced_nr = 0
        self.suspect: Callable[[Session, int], None] = lambda session, seq: None

    # Beginning.

    def open(self, hello: Hello, token: str) -> Session:
        """A new session, or the one of the token. Raises: RequestError, LimitReached, FencedError."""
        if hello.version != CONTRACT_VERSION:
            raise RequestError(
                "EPROTONOSUPPORT",
                f"version {hello.version} of the contract is not spoken here, version {CONTRACT_VERSION} is",
                reason="VERSION",
                version=hello.version,
                supported=CONTRACT_VERSION,
            )
        if hello.confirms:
            self.confirm(hello.confirms)
        if hello.token:
            return self._resume(self.by_token(hello.token), hello)
        limits = self.limits
        budget = _within(
            "ack_budget_s", hello.ack_budget_s, limits.ack_budget_s, limits.ack_budget_min_s, limits.ack_budget_max_s
        )
        lease = _within("lease_s", hello.lease_s, limits.lease_s, limits.lease_min_s, limits.lease_max_s)
        if len(self.by_id) - self._fenced_nr >= limits.sessions_max:
            raise LimitReached("EMFILE", "sessions_max", limits.sessions_max)
        if not token or token in self._by_token:
            raise RequestError("EINVAL", "a new session needs a token of its own", reason="TOKEN")
        self._last_id += 1
        outbox = Outbox(
            window_max=limits.window_notices_max, batch_max=limits.batch_notices_max,
            waiting_max=limits.outbox_notices_max, ranges_max=limits.outbox_ranges_max, busy_s=budget,
            busy_max_s=max(limits.ack_budget_max_s, budget),
        )  # fmt: skip
        session = Session(
            SessionId(self._last_id), token, self.epoch, hello.name or f"session {self._last_id}", outbox,
            features=hello.features & FEATURES, ack_budget_s=budget, lease_s=lease, grace_s=limits.grace_s,
            clock=self.clock.time,
        )  # fmt: skip
        session.window = hello.window
        session.on_finding = self._found
        self.by_id[session.id] = session
        self._by_token[token] = session
        self.rearm(session)
        return session

    def _resume(self, session: Session, hello: Hello) -> Session:
        if hello.handled_through > session.outbox.last_seq:
            raise RequestError(
                "EINVAL",
                f"notice {hello.handled_through} cannot have been handled, the last one is {session.outbox.last_seq}",
                reason="HANDLED_THROUGH",
                handled_through=hello.handled_through,
                last_seq=session.outbox.last_seq,
            )
        session.state = State.LIVE
        session.state_since = session.seen_at = self.clock.time
        session.resumed = True
        session.late_told = 0
        session.outbox.send_again()
        session.in_ready = False  # it may have been announced while there was nobody to take anything
        self.make_ready(session)
        self.rearm(session)
        return session

    def by_token(self, token: str) -> Session:
        """Raises: RequestError NO_SUCH_SESSION; FencedError."""
        session = self._by_token.get(token)
        if session is None:
            raise RequestError(
                "ENOENT", "there is no session with this token (any more); begin a new one", reason="NO_SUCH_SESSION"
            )
        self.check(session)
        return session

    def check(self, session: Session) -> None:
        """Raises: FencedError when its rights are void (rule FencedStaysFenced)."""
        if session.fenced is not None:
            raise session.fenced
        if session.state is State.LEFT:
            raise FencedError(f"{session.name} has left")

    def _found(self, session: Session) -> None:
        """There is something to tell it about its behaviour."""
        if session.state is State.LIVE and FINDINGS in session.features:
            self.make_ready(session)

    def make_ready(self, session: Session) -> None:
        """The room above is to look at it."""
        if not session.in_ready:
            session.in_ready = True
            self.rounds.ready.append(session)

    # Ending.

    def lost(self, session: Session) -> None:
        """Its stream is gone; it has its grace period to come back."""
        if session.state is State.LIVE:
            session.state = State.LOST
            session.state_since = self.clock.time
            self.rearm(session)

    def leave(self, session: Session) -> None:
        """It goes for good."""
        if session.state in (State.LIVE, State.LOST):
            self._void(session, "its session has left")
            self._let_go(session)
            session.state = State.LEFT
            session.state_since = self.clock.time
            self.clock.arm(session, NEVER)
            self._forget(session)

    def fence(self, session: Session, because: str, *, seq: int = 0, notice: Notice | None = None) -> None:
        """Its rights are void from here on, and rounds no longer wait for it. Its pins stay until it is forgotten."""
        if session.state not in (State.LIVE, State.LOST):
            return
        session.state = State.FENCED
        held = [(registration.id, registration.held_pages) for registration in session.registrations.values()]
        pages = sum(count for _, count in held)
        session.fenced = FencedError(
            f"{session.name} was fenced: {because}; it lost {pages} pages of {len(held)} registrations",
            seq=seq,
            round_id=notice.round if notice is not None else 0,
            waited_s=self.clock.time - notice.opened_at if notice is not None else 0.0,
            registrations=[registration for registration, _ in held],
            held_pages=[pages for _, pages in held],
        )
        if self.rounds.history.recording:
            self.rounds.history.note(What.FENCED, session=session.id, text=because)
        self._withhold(session, session.registrations.values())
        self._void(session, "its session was fenced")
        session.state_since = self.clock.time
        self._fenced_nr += 1
        self._forget_oldest_fenced()
        self.rounds.counters.fenced += 1
        session.in_ready = False
        self.make_ready(session)
        self.rearm(session)

    def _void(self, session: Session, because: str) -> None:
        """Its registrations end, and only then what waits for it counts as answered."""
        registry = self.rounds.registry
        for registration in list(session.registrations.values()):
            registry.remove(registration, because)
        for notice, targets in session.outbox.clear():
            self.rounds.answer(session, notice, targets, None, gone=True)

    def _forget_oldest_fenced(self) -> None:
        if self._fenced_nr <= self.limits.fenced_max:
            return
        for session in self.by_id.values():
            if session.state is State.FENCED and not session.withheld:
                self.clock.arm(session, NEVER)
                self._forget(session)
                return

    def _forget(self, session: Session) -> None:
        self.by_id.pop(session.id, None)
        self._by_token.pop(session.token, None)
        if session.state is State.FENCED:
            self._fenced_nr -= 1
        self.rounds.counters.ack_latency_before.merge(session.ack_latency)
        self._gone(session)

    # Time.

    def budget_added(self, session: Session, ack_budget_s: float) -> None:
        """A registration came. One that went makes us look too early at most, until the last has gone."""
        if len(session.registrations) == 1:
            session.shortest_budget_s = session.ack_budget_s
        session.shortest_budget_s = min(session.shortest_budget_s, ack_budget_s)

    def rearm(self, session: Session) -> None:
        """Set its next deadline from what it is waiting for, or awaited for, now."""
        if session.state is State.FENCED:
            ends_at = session.state_since + self.limits.remember_s
            self.clock.arm(session, max(ends_at, self.clock.time + 1.0) if session.withheld else ends_at)
            return
        if session.withheld and not session.flushes_due:
            self._let_go(session)
        at = session.state_since + session.grace_s if session.state is State.LOST else session.seen_at + session.lease_s
        for seq, notice, targets in session.outbox.unanswered():
            if notice.opened_at + session.shortest_budget_s / 2 >= at:
                break
            half, whole = self._deadlines(session, seq, notice, targets)
            at = min(at, whole if half <= self.clock.time else half)
        self.clock.arm(session, at)

    def expired(self, session: Session) -> None:
        """A deadline of the session has come. Requires: `Runner.run` is called afterwards."""
        time = self.clock.time
        if session.state is State.FENCED:
            if session.state_since + self.limits.remember_s <= time and not session.withheld:
                self._forget(session)
                return
        elif session.state in (State.LIVE, State.LOST):
            self._judge_notices(session)
            if session.state is State.LIVE and session.seen_at + session.lease_s <= time:
                self.lost(session)
                self.make_ready(session)
            if session.state is State.LOST and session.state_since + session.grace_s <= time:
                self.fence(session, f"its stream was lost and not resumed within {session.grace_s:g} s")
        if session.state is not State.LEFT:
            self.rearm(session)
            assert session.armed_at > time, f"{session} was judged, and is to be judged again at once"

    def _judge_notices(self, session: Session) -> None:
        """Half a budget: late. A whole one: fenced."""
        time = self.clock.time
        late_seq = 0
        for seq, notice, targets in session.outbox.unanswered():
            if notice.opened_at + session.shortest_budget_s / 2 > time:
                break
            half, whole = self._deadlines(session, seq, notice, targets)
            if whole <= time:
                slow = [session.registrations[one] for one in targets if one in session.registrations]  # type: ignore[index]
                if slow and all(registration.demotable for registration in slow):
                    self._demote(session, slow, self._because(session, seq, notice))
                    self._judge_notices(session)
                    return
                self.fence(session, self._because(session, seq, notice), seq=seq, notice=notice)
                return
            if half <= time and not late_seq:
                late_seq = seq or session.outbox.last_seq + 1
        if late_seq and late_seq != session.late_seq:
            if WITHIN not in session.features and late_seq <= session.outbox.last_seq:
                self.suspect(session, late_seq)
            session.late_seq = late_seq
            session.late_nr += 1
            self.rounds.counters.late += 1
            self.make_ready(session)

    def _demote(self, session: Session, slow: list[Registration], because: str) -> None:
        self._withhold(session, slow)
        for registration in slow:
            self.rounds.demote(registration)
        self.rounds.counters.demoted += len(slow)
        if self.rounds.history.recording:
            self.rounds.history.note(What.DEMOTED, session=session.id, text=because)

    def flushed(self, session: Session, targets: Targets) -> None:
        """Demoted registrations say that they hold nothing any more."""
        for one in targets:
            registration = session.registrations.get(one)  # type: ignore[call-overload]
            if registration is not None and registration.uncached:
                registration.flushed_at = self.clock.time
        session.flushes_due -= 1
        if not session.flushes_due:
            self._let_go(session)

    def may_cache(self, registration: Registration) -> bool:
        """Whether it gets translations; a demoted one that has behaved well for long enough is promoted here."""
        if not registration.uncached:
            return True
        good_since = registration.flushed_at
        if good_since is None or registration.session.late_seq or self.clock.time - good_since < self.limits.promote_s:
            return False
        self.rounds.registry.promote(registration)
        self.rounds.counters.promoted += 1
        return True

    # Frames that a client can reach whatever we say.

    def _withhold(self, session: Session, registrations: Iterable[Registration]) -> None:
        """Its rights are void. If it maps the frames, what it could still reach is not used again yet."""
        if not session.window:
            return
        frames = self.rounds.registry.memory.frames
        held = {held for registration in registrations for held in registration.table.frames()}
        pfns = sorted({one.pfn for one in held if int(frames.generation[one.pfn]) == one.generation})
        frames.withhold(pfns)
        session.withheld += pfns

    def _let_go(self, session: Session) -> None:
        if session.withheld:
            withheld, session.withheld = session.withheld, []
            self.rounds.registry.memory.frames.let_go(withheld)

    def confirm(self, token: str) -> None:
        """Whoever had this session uses nothing of it any more. Unknown tokens are nobody's business."""
        session = self._by_token.get(token)
        if session is not None and session.state is State.FENCED:
            self._let_go(session)

    def restarted(self) -> None:
        """Another server goes on: no stream stands, and nobody has mapped its frames. Each session that is not fenced
        has its whole grace to come back, also one that was lost before. Requires: `Runner.run` is called afterwards."""
        for session in self.by_id.values():
            session.window = False
            self._let_go(session)
            if session.state in (State.LIVE, State.LOST):
                session.state = State.LIVE
                self.lost(session)

    def died(self, session: Session) -> None:
        """Its process has ended: it can reach nothing, and will never answer."""
        self.fence(session, "its process has ended")
        self._let_go(session)

    def _deadlines(self, session: Session, seq: int, notice: Notice, targets: Targets) -> tuple[float, float]:
        """When it is late, and too late; the longest budget of those concerned counts, as one ack is for all."""
        registrations = session.registrations
        if all(registrations[one].uncached for one in targets if one in registrations) and targets:  # type: ignore[index]
            return NEVER, NEVER  # it is told to drop what is void already: nobody waits
        budgets = [registrations[one].ack_budget_s for one in targets if one in registrations]  # type: ignore[index]
        budget = max(budgets, default=session.ack_budget_s)
        whole = max(notice.opened_at + budget, session.outbox.busy.get(seq, 0.0) if session.outbox.busy else 0.0)
        return notice.opened_at + budget / 2, whole

    def _because(self, session: Session, seq: int, notice: Notice) -> str:
        waited = self.clock.time - notice.opened_at
        failed = session.outbox.failed.get(seq)
        what = f"notice {seq or '(not read yet)'} ({notice.op.name.lower()}, round {notice.round})"
        if failed:
            return f"{what} was not done after {waited:.3f} s: its handler failed: {failed}"
        return f"{what} was not acknowledged after {waited:.3f} s"


def _within(name: str, asked: float, default: float, low: float, high: float) -> float:
    """Raises: RequestError when asked is not within the limits."""
    if not asked:
        return default
    if not isfinite(asked) or not low <= asked <= high:
        raise RequestError(
            "EINVAL", f"{name} is {low:g} to {high:g} s here, not {asked:g}", reason=name.upper(), **{name: asked}
        )
    return asked
