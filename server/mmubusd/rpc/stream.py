"""The session stream: one reader task, one writer task, nothing else touches it.

    reader   Hello, then every message of the client, each an input of the bus
    writer   answers first, then notices: everything that is ready in one message
    lane     the notices and their acknowledgements instead, while there is one (see `mmubusd.rpc.lane`)

How a stream ends, and what becomes of its session:

| end | session | status |
|---|---|---|
| Leave | left | OK |
| the stream breaks, or the client half-closes | lost; may be resumed within its grace | (nobody reads it) |
| its lease runs out while the stream stands | lost, the same | ABORTED, LEASE_EXPIRED |
| the client breaks the protocol | fenced | INVALID_ARGUMENT, PROTOCOL_VIOLATION |
| it is fenced | fenced; Fenced is the last message | FAILED_PRECONDITION, FENCED |
| another stream resumes it | goes on there | ABORTED, SUPERSEDED |
| the server stops | ends with the server | UNAVAILABLE |

A write that has finished says nothing about delivery, and a read must never be timed: grpc.aio would end the stream. So
there are no time-outs here but the bus's own deadlines, and only an acknowledgement counts.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from random import Random

import grpc.aio
from mmu.v1 import session_pb2 as pb

from mmubusd.notify import Ack, PeerError, Session, State
from mmubusd.notify.limits import RUNS
from mmubusd.notify.notice import Batch, SessionId
from mmubusd.rpc.chaos import CHAOS_KEY, Chaos, Dropped, Knobs
from mmubusd.rpc.codec import acknowledgement, batch_messages, through_of
from mmubusd.rpc.driver import Driver
from mmubusd.rpc.errors import LeaseExpired, Superseded, failure
from mmubusd.rpc.identity import Principal, session_key
from mmubusd.rpc.lane import Lane, Lanes, is_local
from mmubusd.rpc.methods import Context
from mmubusd.rpc.session_requests import HEARTBEAT, answer, decoded, fenced_bytes, finding_bytes, hello_of

__all__ = ["SessionService"]

HELLO_S = 10.0
"""How long a client may be connected without saying Hello."""
REPLIES_MAX = 16_384
"""Answers that a client may leave unread; one that asks for more without reading breaks the contract."""
TOKEN_BYTES = 32
"""Random bytes of a session's token."""


class SessionService:
    """Implements mmu.v1.SessionService."""

    def __init__(self, driver: Driver, frames_path: str, lanes: Lanes | None) -> None:
        self._driver = driver
        self._frames_path = frames_path
        self._lanes = lanes
        self._draws: dict[SessionId, Random] = {}  # of chaos

    async def attach(self, context: Context) -> None:
        """Carry one client's session until the stream ends."""
        local = is_local(context)
        who = self._driver.authority.caller(context)
        # The window shows every frame of every address space.
        window = self._frames_path if local and self._driver.authority.administers(who) else ""
        lanes = self._lanes if local and not self._driver.settings.chaos else None  # chaos is made on the stream
        stream = Stream(self._driver, context, who, window, lanes, self._draws)
        await stream.serve()


class Stream:
    """One stream from its Hello to its end."""

    def __init__(
        self, driver: Driver, context: Context, who: Principal, frames_path: str, lanes: Lanes | None, draws:
        dict[SessionId, Random],
    ) -> None:  # fmt: skip
        self._driver = driver
        self._draws = draws
        self._who = who
        self._bus = driver.bus
        self._context = context
        self._frames_path = frames_path
        self._loop = asyncio.get_running_loop()
        self._lanes = lanes
        self._lane: Lane | None = None
        self._lane_secret = b""
        self._session: Session | None = None
        self._replies: list[bytes] = []
        self._waiting: asyncio.Future[None] | None = None
        self._beat: asyncio.TimerHandle | None = None
        self._written_nr = self._beaten_nr = 0
        self._finished = False
        self._chaos: Chaos | None = None
        self._error: Exception | None = None

    async def serve(self) -> None:
        """Run reader and writer until the stream ends.

        The writer is the one who ends it: a status that is sent while a message still is would be lost, and the client
        would wait for ever. So the reader says how the stream ends and wakes the writer.
        Raises: what the status is made of. Cancellation: the session counts as lost.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write())
                await self._read()
        finally:
            self._lose()

    # Waking: called by the driver, on the loop.

    def wake(self) -> None:
        """There is something to send: a batch, or what only the stream says."""
        lane, session = self._lane, self._session
        if lane is not None:
            lane.wake()
            if session is None or (session.fenced is None and not session.findings):
                return
        self._wake_writer()

    def _wake_writer(self) -> None:
        waiting = self._waiting
        if waiting is not None:
            self._waiting = None
            if not waiting.done():
                waiting.set_result(None)

    def supersede(self) -> None:
        """Another stream carries the session now; this one ends."""
        self._drop_lane()
        self._finish(Superseded())

    def drain(self, seconds: float) -> None:
        """Tell the client that the server stops."""
        self._replies.append(pb.AttachResponse(draining=pb.Draining(seconds=seconds)).SerializeToString())
        self._wake_writer()

    # The reader.

    async def _read(self) -> None:
        """Read to the end, whatever it is. A broken protocol voids the session's rights at once."""
        session = None
        try:
            session = await self._hello()
            if session is not None and await self._receive(session):
                self._leave(session)
        except PeerError as error:
            self._offend(error)
            self._finish(error)
        except Exception as error:
            if failure(error) is None:
                self._driver.alarm.ring(error)
            self._finish(error)
        else:
            self._finish(None)
        self._lose()  # at once: a client that does not read can keep the writer for as long as it likes

    async def _hello(self) -> Session | None:
        """The first message. Returns: its session; None when the client went without a word."""
        silent = self._loop.call_later(HELLO_S, self._too_silent)
        try:
            data = await self._context.read()
        finally:
            silent.cancel()
        return self._open(decoded(data)) if isinstance(data, bytes) else None

    async def _receive(self, session: Session) -> bool:
        """Every further message. Returns: whether the last one was Leave; without it the stream has ended."""
        read = self._context.read
        while isinstance(data := await read(), bytes):
            if self._finished:
                return False  # another stream carries the session; nothing that comes here counts
            if not self._may_speak(session):
                continue
            message = self._heard(session, data)
            if message is not None:
                kind = message.WhichOneof("message")
                if kind == "leave":
                    return True
                if kind is None or kind in ("hello", "open_lane"):
                    raise PeerError(f"{kind or 'a message of no kind'} on a stream that is attached already")
                self._reply(answer(self._driver, self._who, session, message, kind))
            self._driver.pump()
        return False

    def _may_speak(self, session: Session) -> bool:
        """Returns: False when it is fenced; the writer says so and ends the stream. Raises: LeaseExpired."""
        if session.state is State.LOST:
            raise LeaseExpired(session.lease_s)
        return session.state is State.LIVE

    def _heard(self, session: Session, data: bytes) -> pb.AttachRequest | None:
        """Act on an acknowledgement or a sign of life, from the stream or its lane. Returns: any other message."""
        # The one message that is sent often comes first, without being made an object.
        through = through_of(data)
        if through:
            self._bus.acknowledge(session, Ack(through), self._driver.now())
            return None
        message = decoded(data)
        kind = message.WhichOneof("message")
        if kind == "acknowledge":
            self._bus.acknowledge(session, acknowledgement(message.acknowledge), self._driver.now())
        elif kind == "heartbeat":
            self._bus.heartbeat(session, self._driver.now())
        else:
            return message
        return None

    def _too_silent(self) -> None:
        self._finish(PeerError(f"no Hello within {HELLO_S} s"))

    def _open(self, message: pb.AttachRequest) -> Session:
        """The first message: begin a session or resume one."""
        if message.WhichOneof("message") != "hello":
            raise PeerError(
                f"the first message of a stream is Hello, not {message.WhichOneof('message') or 'an empty one'}"
            )
        hello = message.hello
        # The core knows a session by a hash of its token; the token itself is in Welcome and nowhere else.
        token = hello.token or secrets.token_urlsafe(TOKEN_BYTES)
        key = session_key(self._who, token)
        if not hello.token:
            self._driver.quotas.check_session(self._who)
        session = self._bus.open_session(
            hello_of(hello, self._who, key, bool(self._frames_path)),
            self._driver.now(),
            key,
        )
        self._session = session
        if self._lanes is not None:
            self._lane_secret = self._lanes.offer(self)
        self._driver.authority.session_opened(self._who, session, self._bus.sessions)
        self._reply(
            pb.AttachResponse(
                request=message.request,
                welcome=pb.Welcome(
                    session=session.id,
                    token=token,
                    epoch=session.epoch,
                    resumed=session.resumed,
                    ack_budget_s=session.ack_budget_s,
                    lease_s=session.lease_s,
                    grace_s=session.grace_s,
                    features=sorted(session.features),
                    frames_path=self._frames_path,
                    lane_path=self._lanes.path if self._lanes is not None else "",
                    lane_secret=self._lane_secret,
                ),
            )
        )
        self._driver.carry(session, self)
        if self._driver.settings.chaos:
            self._begin_chaos(session)
        if hello.process and self._frames_path:
            self._driver.processes.watch(session, hello.process)
        self._driver.log.info(
            "session resumed" if session.resumed else "session attached",
            session=session.id,
            name=session.name,
            principal=self._who.name,
            peer=self._context.peer(),
        )
        self._beat = self._loop.call_later(session.lease_s / 3, self._heartbeat)
        self._driver.pump()
        return session

    def _reply(self, message: pb.AttachResponse) -> None:
        if len(self._replies) >= REPLIES_MAX:
            raise PeerError(f"{REPLIES_MAX} answers wait to be read; a client must read its stream while it asks")
        data = message.SerializeToString()
        self._replies.append(data)
        if self._lane is not None:
            self._lane.send(data)  # there too: a registration is to be known before its notices
        self._wake_writer()

    # The lane, called by it on the loop.

    def lane_opened(self, lane: Lane) -> None:
        """What is not acknowledged comes on it, from the first: what is on its way on the stream may come twice."""
        session = self._session
        if session is None or self._finished or self._lane is not None:
            lane.close()
            return
        self._lane = lane
        self._bus.send_again(session)
        lane.wake()

    def lane_closed(self, lane: Lane) -> None:
        """What is not acknowledged comes on the stream again."""
        session = self._session
        if self._lane is lane and session is not None:
            self._lane = None
            self._bus.send_again(session)
            self._wake_writer()

    def _drop_lane(self) -> None:
        """From here on nothing is taken for it."""
        if self._lanes is not None:
            self._lanes.withdraw(self._lane_secret)
        lane, self._lane = self._lane, None
        if lane is not None:
            lane.close()

    def lane_heard(self, data: bytes) -> None:
        """An acknowledgement or a sign of life. Raises: PeerError, LeaseExpired."""
        session = self._session
        if session is None or self._finished or not self._may_speak(session):
            return
        if self._heard(session, data) is not None:
            raise PeerError("a message on a lane that is neither an acknowledgement nor a heartbeat")

    def lane_caught_up(self) -> None:
        """The bus has been told all that was read at once."""
        self._driver.pump()

    def lane_failed(self, error: Exception) -> None:
        """End the stream for it."""
        if isinstance(error, PeerError):
            self._offend(error)
        elif failure(error) is None:
            self._driver.alarm.ring(error)
        self._finish(error)

    def lane_messages(self) -> list[bytes]:
        """Take one batch; when there may be more, the lane's next turn takes it."""
        session, lane = self._session, self._lane
        batch = self._bus.take_batch(session) if session is not None and session.fenced is None else None
        if batch is None or session is None or lane is None:
            return []
        if not session.outbox.idle:
            lane.wake()
        self._written_nr += 1
        return list(self._messages(session, batch))

    # The writer.

    async def _write(self) -> None:
        write = self._context.write if self._driver.commits is None else self._write_kept
        try:
            while True:
                if self._replies:
                    replies, self._replies = self._replies, []
                    for reply in replies:
                        await write(reply)
                if self._finished:
                    if self._error is not None:
                        raise self._error
                    return
                session = self._session
                if session is not None:
                    if session.fenced is not None:
                        await write(fenced_bytes(session.fenced))
                        raise session.fenced
                    batch = self._bus.take_batch(session) if self._lane is None else None
                    if batch is not None:
                        for message in self._messages(session, batch):
                            if self._chaos is not None:
                                await self._chaos.before()
                                if self._chaos.twice():
                                    await write(message)
                            await write(message)
                        self._written_nr += 1
                        continue
                    finding = self._bus.take_finding(session) if session.findings else None
                    if finding is not None:
                        await write(finding_bytes(finding))
                        continue
                if not self._replies:
                    self._waiting = self._loop.create_future()
                    await self._waiting
        except Dropped:
            self._lose()
            raise Superseded from None
        except grpc.aio.BaseError:
            # The stream is over; the reader learns it too, and how the session goes on is decided there.
            return

    async def _write_kept(self, data: bytes) -> None:
        """What leads to a message is kept before it leaves: a client never knows more than a restarted server."""
        assert self._driver.commits is not None
        await self._driver.commits.kept()
        await self._context.write(data)

    def _messages(self, session: Session, batch: Batch) -> Iterator[bytes]:
        bytes_max = self._driver.settings.message_bytes_max
        return batch_messages(batch, bytes_max, self._driver.tally, RUNS in session.features)

    def _begin_chaos(self, session: Session) -> None:
        for key, value in self._context.invocation_metadata() or ():
            if key == CHAOS_KEY:
                self._chaos = Chaos(self._driver, session, Knobs.parse(str(value)), self._draws)

    def _heartbeat(self) -> None:
        """A third of the lease has passed: a sign of life, unless something was sent meanwhile."""
        session = self._session
        assert session is not None
        if self._written_nr == self._beaten_nr and not self._replies:
            self._replies.append(HEARTBEAT)
            self._wake_writer()
        self._beaten_nr = self._written_nr
        self._beat = self._loop.call_later(session.lease_s / 3, self._heartbeat)

    # The end.

    def _finish(self, error: Exception | None) -> None:
        """The writer is to end the stream, with the status of this error. The first reason counts."""
        if not self._finished:
            self._finished, self._error = True, error
            self._wake_writer()

    def _offend(self, error: PeerError) -> None:
        session = self._session
        if session is not None and self._driver.drop(session, self):
            because = error.message
            self._driver.log.warning(
                "session broke the protocol", session=session.id, name=session.name, because=because
            )
            self._bus.fence(session, self._driver.now(), because)
            self._driver.pump()

    def _leave(self, session: Session) -> None:
        self._driver.drop(session, self)
        self._driver.processes.forget(session)
        self._bus.leave(session, self._driver.now())
        self._driver.log.info("session left", session=session.id, name=session.name)
        self._driver.pump()

    def _lose(self) -> None:
        """The stream has ended, one way or another; unless that has been seen to, its session is lost."""
        if self._beat is not None:
            self._beat.cancel()
        self._drop_lane()
        if self._chaos is not None:
            self._chaos.close()
        session = self._session
        if session is None or not self._driver.drop(session, self):
            return
        if session.fenced is None:
            self._bus.session_lost(session, self._driver.now())
            if not self._driver.draining:
                self._driver.log.warning("session lost", session=session.id, name=session.name, grace_s=session.grace_s)
        self._driver.pump()
