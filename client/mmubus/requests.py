"""Register and Unregister on their way: what was asked, and who waits for the answer.

A registration becomes alive where its answer is read, not where the answer is awaited: the very next message on the
stream may be a notice for it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from mmu.v1 import session_pb2 as pb

from mmubus.errors import MmuBusError, error_from
from mmubus.notifier import RmapNotifier, ops_of
from mmubus.registration import Registration

__all__ = ["Requests", "registering", "unregistering"]


@dataclass(slots=True)
class _Request:
    """One that waits for its answer."""

    message: pb.AttachRequest
    registration: Registration
    answer: asyncio.Future[None]


class Requests:
    """The requests of one session that are not answered.

    Args: registrations: by the server's number; what an answer makes or ends is put here or taken from here.
    """

    def __init__(self, registrations: dict[int, Registration]) -> None:
        self._registrations = registrations
        self._waiting: dict[int, _Request] = {}
        self._next = 1

    def add(self, message: pb.AttachRequest, registration: Registration) -> asyncio.Future[None]:
        """Number a request that is about to be sent. Returns: what to await for its answer."""
        message.request = self._next
        self._next += 1
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(_seen)
        self._waiting[message.request] = _Request(message, registration, answer)
        return answer

    def messages(self) -> list[pb.AttachRequest]:
        """What must be sent again on a new stream."""
        return [request.message for request in self._waiting.values()]

    def answered(self, response: pb.AttachResponse) -> None:
        """Registered, Unregistered or Rejected has arrived."""
        request = self._waiting.pop(response.request, None)
        if request is None:
            return  # nobody waits for it any more
        registration = request.registration
        error: MmuBusError | None = None
        if response.HasField("registered"):
            registration.begin(response.registered.registration, response.registered.warnings)
            self._registrations[registration.id] = registration
        elif response.HasField("unregistered"):
            self._registrations.pop(response.unregistered.registration, None)
            registration.end(None)
        else:
            error = error_from("", response.rejected.error.errno, response.rejected.error.message)
        if request.answer.done():
            return
        if error is None:
            request.answer.set_result(None)
        else:
            request.answer.set_exception(error)

    def stream_broke(self, error: MmuBusError) -> None:
        """Nobody knows what was being registered: whoever asked must decide. Unregistering is asked again."""
        for number, request in list(self._waiting.items()):
            if not request.message.HasField("unregister"):
                self._fail(number, error)

    def fail(self, error: MmuBusError) -> None:
        """The session is over."""
        for number in list(self._waiting):
            self._fail(number, error)

    def _fail(self, number: int, error: MmuBusError) -> None:
        answer = self._waiting.pop(number).answer
        if not answer.done():
            answer.set_exception(error)


def registering(registration: Registration) -> pb.AttachRequest:
    """The message that registers it."""
    spec = registration.spec
    notifier = registration.notifier
    if isinstance(notifier, RmapNotifier):
        return pb.AttachRequest(register_rmap=pb.RegisterRmap(name=spec.name, ack_budget_s=spec.ack_budget_s))
    register = pb.Register(
        mm=spec.mm,
        ops=[op.value for op in ops_of(notifier)],  # type: ignore[misc]
        start=spec.start,
        end=spec.end,
        only_held=spec.only_held,
        ack_budget_s=spec.ack_budget_s,
        name=spec.name,
        owner=spec.owner,
        demotable=spec.demotable,
    )
    return pb.AttachRequest(register=register)


def unregistering(registration: Registration) -> pb.AttachRequest:
    """The message that takes it off its list."""
    return pb.AttachRequest(unregister=pb.Unregister(registration=registration.id))


def _seen(answer: asyncio.Future[None]) -> None:
    """Answers of requests that nobody awaits must not complain when they fail."""
    if not answer.cancelled():
        answer.exception()
