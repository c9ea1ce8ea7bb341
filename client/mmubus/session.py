"""The session: all notifiers of one connection, whatever happens to the stream below it.

    idle ──register──► live ──stream breaks──► lost ──same token, within grace──► live
                        │                        │
                        │ fenced                 │ grace is over, or another epoch
                        ▼                        ▼
                       void: every registration is told `invalidated_everything`, then on_fenced;
                             with reattach a new session begins and everything is registered again

While it is lost, or the server has been silent for two thirds of the lease, everything that is held is in *jeopardy*:
the server may give the frames away soon, and we could not hear of it. It must not be used until the session is well
again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import warnings
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakSet

from mmu.v1 import session_pb2 as pb

from mmubus.acks import AckWindow
from mmubus.dispatch import Dispatcher
from mmubus.errors import ConnectionLost, Draining, Fenced, MmuBusError, ProtocolError
from mmubus.registration import Registration
from mmubus.requests import Requests, registering, unregistering
from mmubus.standing import Finding, SessionOptions, State
from mmubus.stream import Stream
from mmubus.voiding import all_told, tell_void

if TYPE_CHECKING:
    from mmubus.connection import Stubs
    from mmubus.tracing import Tracing
    from mmubus.window import FrameWindow

__all__ = ["Session"]

log = logging.getLogger("mmubus")

VERSION = 1
FEATURES = ("findings", "runs", "within")
FINDINGS_KEPT_MAX = 64
HELLO_TIMEOUT_S = 10.0
LEAVE_TIMEOUT_S = 2.0
STREAM_STANDS_S = 1.0  # a stream that lives for less is attached again with growing pauses
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.05, 0.5


class Session:
    """One client process as the server sees it.

    Attributes:
        state: where it stands.
        id, token, epoch, frames_path: as the server said in Welcome.
        fenced: what was lost with the last session, or None.
        draining: the server said that it stops soon.
        findings: what the server found that we did wrong, and deadlocks that we were part of; the newest last.
        windows: mappings of the server's frames, see `mmubus.window`.
    """

    def __init__(self, stubs: Stubs, options: SessionOptions, tracing: Tracing | None = None) -> None:
        self._stubs = stubs
        self._options = options
        self._tracing = tracing
        self.state = State.IDLE
        self.id = 0
        self.token = ""
        self.epoch = 0
        self.frames_path = ""
        self.fenced: Fenced | None = None
        self.draining = False
        self.findings: deque[Finding] = deque(maxlen=FINDINGS_KEPT_MAX)
        self.windows: WeakSet[FrameWindow] = WeakSet()
        self._voided = ""  # the token of a session of ours that was fenced; nothing of it is used any more
        self._lease_s = self._grace_s = 10.0
        self._again: list[Registration] = []  # of the session before, to be registered again
        self._dropped: list[Awaitable[None] | None] | None = None  # notices were lost: who drops everything for it
        self._begin_anew()
        self._stream: Stream | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed: asyncio.Future[None] | None = None
        self._endangered = False

    # What the rest of the library asks for.

    @property
    def endangered(self) -> bool:
        """True while nothing that is held may be used. It looks at the clock itself: a process that was stopped for
        longer
        than its lease must not go on with what it held before the stream has been heard again."""
        stream = self._stream
        if self.state is not State.LIVE or stream is None:
            return True
        return asyncio.get_running_loop().time() - stream.heard_at > self._lease_s * 2 / 3

    @property
    def registrations(self) -> list[Registration]:
        """The living registrations."""
        return list(self._registrations.values())

    @property
    def notices_handled(self) -> int:
        """Notices that this session has handled."""
        return self.acks.handled

    @property
    def on_lane(self) -> bool:
        """Whether notices come by the server's lane, not by gRPC."""
        return self._stream is not None and self._stream.lane is not None

    def raise_if_over(self) -> None:
        """Raises: Fenced, ConnectionLost when nothing can be asked in this session's name."""
        if self.state is State.VOID:
            raise self.fenced or ConnectionLost("the session is over")
        if self.state is State.CLOSED:
            raise ConnectionLost("the connection was closed")

    async def register(self, registration: Registration) -> Registration:
        """Register a notifier; the first one opens the session. Raises: MmError, ConnectionLost, Fenced, Draining."""
        await self._ready()
        if self.draining:
            raise Draining("the server stops soon and takes no new notifiers")
        await self._send(registering(registration), registration)
        registration.notifier.registration = registration
        for warning in registration.warnings:
            if warning.partition(" ")[0] in registration.notifier.slips:
                continue
            warnings.warn(f"{registration.spec.name}: {warning}", RuntimeWarning, stacklevel=3)
        return registration

    async def unregister(self, registration: Registration) -> None:
        """Take a notifier off; see Registration.unregister. Raises: ConnectionLost; a void session needs no telling."""
        if registration in self._again:
            self._again.remove(registration)
        if registration.registered and self.state in (State.LIVE, State.LOST):
            with suppress(Fenced):  # then it is gone with all the others
                await self._send(unregistering(registration), registration)
        registration.end(None)
        await self.dispatcher.settle(registration)

    def unregister_nowait(self, registration: Registration) -> None:
        """As `unregister`, without waiting; the answer is not looked at."""
        if not registration.registered:
            return
        self._registrations.pop(registration.id, None)
        registration.end(None)
        self._send(unregistering(registration), registration)

    async def close(self) -> None:
        """Leave for good. Handlers that are running are cancelled: what they would answer is answered by leaving."""
        task, stream, was_live = self._task, self._stream, self.state is State.LIVE
        self.state = State.CLOSED
        self._notify_changed()
        closed = ConnectionLost("the connection was closed")
        for registration in self.registrations:
            registration.end(closed)
        await self.dispatcher.stop()
        self._requests.fail(closed)
        if task is None:
            return
        if stream is not None and was_live:
            stream.send(pb.AttachRequest(leave=pb.Leave()))
            await asyncio.wait([task], timeout=LEAVE_TIMEOUT_S)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._task = None

    # The life of the session.

    def _begin_anew(self) -> None:
        self.token = ""
        self.acks = AckWindow()
        self._registrations: dict[int, Registration] = {}
        self._requests = Requests(self._registrations)
        self.dispatcher = Dispatcher(self.acks, self._registrations, self._wake, self._tracing)

    async def _ready(self) -> None:
        """Wait until requests can be sent. Raises: ConnectionLost, Draining, Fenced."""
        if self.state is State.CLOSED:
            raise ConnectionLost("the connection was closed")
        if self.state in (State.IDLE, State.VOID) and (self._task is None or self._task.done()):
            await self._open()
        while self.state is not State.LIVE:
            if self._task is None or self._task.done():
                raise self.fenced or ConnectionLost("the session is over")
            if self._changed is None:
                self._changed = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._changed)

    async def _open(self) -> None:
        """The first stream of a session: its failure is the caller's."""
        self._begin_anew()
        self.fenced = None
        attached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(attached), name="mmubus session")
        self._task.add_done_callback(lambda _: self._notify_changed())
        await asyncio.wait([attached, self._task], return_when=asyncio.FIRST_COMPLETED)
        if attached.done():
            attached.result()

    async def _run(self, attached: asyncio.Future[None]) -> None:
        """Attach, serve, and attach again until it is over."""
        lost_at = 0.0
        attempt = 0
        loop = asyncio.get_running_loop()
        while not self._is_closed():
            try:
                serving = await self._attach()
            except MmuBusError as error:
                if not attached.done():
                    attached.set_exception(error)
                    return
                if self.token and (
                    not isinstance(error, ConnectionLost | Draining)
                    or loop.time() - lost_at > self._lease_s + self._grace_s
                ):
                    await self._void(error)
                    attempt = 0
                if not self.token and not self._options.reattach:
                    return
                await asyncio.sleep(_backoff_s(attempt))
                attempt += 1
                continue
            if not attached.done():
                attached.set_result(None)
            attached_at, handled = loop.time(), self.acks.handled
            why = await serving
            lost_at = loop.time()
            self._stream = None
            if self._is_closed():
                return
            self._set_state(State.LOST)
            if isinstance(why, Fenced) or self.fenced is not None:
                await self._void(self.fenced or why or ConnectionLost("the stream ended"))
                if not self._options.reattach:
                    return
            await all_told(self._dropped or [])
            log.warning(
                "%s: the session's stream ended (%s); attaching again", self._options.name, why or "no reason given"
            )
            if lost_at - attached_at > STREAM_STANDS_S:
                attempt = 0
                continue
            if self.acks.handled != handled:  # it was of use: nobody need wait longer for the next one
                attempt = 0
            await asyncio.sleep(_backoff_s(attempt))
            attempt += 1

    async def _attach(self) -> asyncio.Task[MmuBusError | None]:
        """Open a stream and bring everything up to date on it. Returns: the task that serves it."""
        stream = Stream(self._stubs, self.acks, self._options.chaos)
        hello = pb.Hello(
            name=self._options.name,
            version=VERSION,
            token=self.token,
            handled_through=self.acks.resume(),
            ack_budget_s=self._options.ack_budget_s,
            lease_s=self._options.lease_s,
            features=FEATURES,
            process=_process(),
            confirms=self._voided,
        )
        welcome = await stream.attach(hello, HELLO_TIMEOUT_S)
        if self.token and not welcome.resumed:
            stream.give_up()
            raise Fenced(f"the server has begun a new epoch ({welcome.epoch}); everything before it is void")
        if self._options.lane:
            await stream.open_lane(welcome)
        self.id, self.token, self.epoch = welcome.session, welcome.token, welcome.epoch
        self.frames_path = welcome.frames_path
        self._have_windows_follow()
        self._voided = ""
        self._lease_s, self._grace_s = welcome.lease_s, welcome.grace_s
        self._stream = stream
        self.draining = False
        self.fenced = None
        serving = asyncio.create_task(self._serve(stream), name="mmubus reader")
        self._set_state(State.LIVE)
        for message in self._requests.messages():
            stream.send(message)
        await self._register_again()
        return serving

    def _have_windows_follow(self) -> None:
        """A server that was started again has its frames elsewhere; without them what is held cannot be reached."""
        for window in self.windows if self.frames_path else ():
            try:
                if window.follow(self.frames_path):
                    log.warning("%s: the server's frames are in another file; mapped again", self._options.name)
            except OSError as error:
                raise Fenced(f"the server's frames cannot be mapped again: {error}") from error

    async def _serve(self, stream: Stream) -> MmuBusError | None:
        watch = asyncio.create_task(self._watch(stream))
        try:
            return await stream.serve(self._receive)
        finally:
            watch.cancel()
            self._requests.stream_broke(ConnectionLost("the stream broke before the server answered"))

    async def _watch(self, stream: Stream) -> None:
        """Jeopardy by silence, and the end of a stream on which nothing has been heard for a lease."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._lease_s / 6)
            silent_s = loop.time() - stream.heard_at
            self._set_endangered(silent_s > self._lease_s * 2 / 3)
            if silent_s > self._lease_s:
                log.warning("%s: the server has been silent for %.1f s", self._options.name, silent_s)
                stream.give_up()

    def _receive(self, response: pb.AttachResponse) -> None:
        """A message of the server; notices first, they are the ones that are many."""
        kind = response.WhichOneof("message")
        if kind == "notices":
            if response.notices.late_seq:
                log.warning("notice %d has used half of its budget", response.notices.late_seq)
            self._notices(response.notices.first_seq, partial(self.dispatcher.deliver, response.notices))
        elif kind == "run":
            self._notices(response.run.first_seq, partial(self.dispatcher.deliver_run, response.run))
        elif kind in ("registered", "unregistered", "rejected"):
            self._requests.answered(response)
        elif kind == "fenced":
            fenced = response.fenced
            lost = dict(zip(fenced.registrations, fenced.held_pages, strict=False))
            self.fenced = Fenced(
                fenced.message, seq=fenced.seq, round=fenced.round, waited_s=fenced.waited_s, lost=lost
            )
        elif kind == "finding":
            self._found(response.finding)
        elif kind == "draining":
            self.draining = True
            log.warning("%s: the server stops within %.1f s", self._options.name, response.draining.seconds)
        elif kind != "heartbeat":
            raise ProtocolError(f"the server sent {kind or 'a message of an unknown kind'} on an attached stream")

    def _found(self, message: pb.Finding) -> None:
        finding = Finding(message.kind, message.message, tuple(message.lines))
        self.findings.append(finding)
        log.error("%s: %s", self._options.name, finding)

    def _notices(self, first_seq: int, deliver: Callable[[], bool]) -> None:
        """Handle notices from a seq on. When some before them are missing, everything that is held is dropped."""
        if deliver():
            self._dropped = None
        elif self._dropped is not None:
            # Attached again, and they are still missing. Everything that they could concern has been dropped.
            self.acks.begin_at(first_seq)
            deliver()
        else:
            missing = f"notices {self.acks.received + 1} to {first_seq - 1} are missing"
            log.error("%s: %s: everything that is held is dropped", self._options.name, missing)
            self._dropped = [tell_void(one, missing) for one in self.registrations]
            if self._stream is not None:
                self._stream.give_up()

    async def _void(self, error: MmuBusError) -> None:
        """Everything that was held under this session is void: say so to everyone, in order."""
        fenced = error if isinstance(error, Fenced) else Fenced(f"the session is over: {error}")
        self.fenced = fenced
        await self.dispatcher.stop()
        registrations = self.registrations
        for registration in registrations:
            registration.end(fenced)
        if self._options.reattach:
            self._again += registrations
        self._requests.fail(fenced)
        self._voided = self.token
        self._begin_anew()
        self._set_state(State.VOID)
        log.error("%s: everything that was held is void: %s", self._options.name, fenced)
        await all_told([tell_void(registration, str(fenced)) for registration in registrations])
        if self._options.on_fenced is not None:
            try:
                self._options.on_fenced(fenced)
            except Exception:
                log.exception("on_fenced failed; the session goes on as configured")

    async def _register_again(self) -> None:
        """After a new beginning: the registrations of the old session, with nothing held."""
        while self._again:
            registration = self._again[0]
            try:
                await self._send(registering(registration), registration)
            except ConnectionLost:
                return  # the next stream goes on from here
            except MmuBusError as error:
                log.error("%r could not be registered again: %s", registration, error)
                registration.end(error)
            del self._again[:1]

    # Small things.

    def _send(self, message: pb.AttachRequest, registration: Registration) -> asyncio.Future[None]:
        answer = self._requests.add(message, registration)
        if self._stream is not None:
            self._stream.send(message)
        return answer

    def _wake(self) -> None:
        if self._stream is not None:
            self._stream.wake()

    def _is_closed(self) -> bool:
        return self.state is State.CLOSED

    def _set_state(self, state: State) -> None:
        if self.state is not State.CLOSED:
            self.state = state
        self._set_endangered(state is not State.LIVE)
        self._notify_changed()

    def _set_endangered(self, endangered: bool) -> None:
        if endangered != self._endangered:
            self._endangered = endangered
            for registration in self.registrations:
                registration.notifier.jeopardy(endangered)

    def _notify_changed(self) -> None:
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None


def _backoff_s(attempt: int) -> float:
    """How long to wait before trying again; random, so that many clients do not come back at once."""
    return random.uniform(0.5, 1.0) * min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2.0**attempt)


def _process() -> str:
    """This process, as the server can find it if it is on the same machine and in the same PID namespace."""
    try:
        return f"{os.getpid()}@{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""
