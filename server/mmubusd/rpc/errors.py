"""The one table from exceptions to gRPC status, and what happens to an exception that is in no table.

Every failed call carries one google.rpc.ErrorInfo: `reason` is the errno's name or the protocol error's name, `domain`
is "mmubus", `metadata` the values that were wrong. An exception that no table knows, an AssertionError above all, is a
broken invariant of ours: the client is told INTERNAL, and the alarm stops the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from mmubusd.mm.errno import MmError
from mmubusd.notify import Draining, FencedError, LimitReached, NotifyError, PeerError, RequestError, StaleTranslation

if TYPE_CHECKING:
    from mmubusd.rpc.methods import Context

__all__ = [
    "ERRNO_CODES",
    "Alarm",
    "Failure",
    "LeaseExpired",
    "Malformed",
    "NotKept",
    "Stopping",
    "Superseded",
    "Unauthenticated",
    "abort",
    "failure",
    "look_up",
]

DOMAIN = "mmubus"
LOST_NAMED_MAX = 64
"""Registrations whose pages a status names; more would not fit into a call's trailers. The message has the sum."""

Code = grpc.StatusCode

ERRNO_CODES: Mapping[str, grpc.StatusCode] = {
    "EINVAL": Code.INVALID_ARGUMENT,
    "E2BIG": Code.INVALID_ARGUMENT,
    "EMSGSIZE": Code.INVALID_ARGUMENT,
    "ENAMETOOLONG": Code.INVALID_ARGUMENT,
    "EOVERFLOW": Code.OUT_OF_RANGE,
    "EFBIG": Code.OUT_OF_RANGE,
    "ENXIO": Code.OUT_OF_RANGE,
    "ESRCH": Code.NOT_FOUND,
    "EBADF": Code.NOT_FOUND,
    "ENOENT": Code.NOT_FOUND,
    "EEXIST": Code.ALREADY_EXISTS,
    "EPERM": Code.PERMISSION_DENIED,
    "EACCES": Code.PERMISSION_DENIED,
    "ENOMEM": Code.RESOURCE_EXHAUSTED,
    "ENOSPC": Code.RESOURCE_EXHAUSTED,
    "EMFILE": Code.RESOURCE_EXHAUSTED,
    "ENFILE": Code.RESOURCE_EXHAUSTED,
    "EAGAIN": Code.ABORTED,
    "EBUSY": Code.ABORTED,
    "EDEADLK": Code.ABORTED,
    "EINTR": Code.ABORTED,
    "ENOSYS": Code.UNIMPLEMENTED,
    "EOPNOTSUPP": Code.UNIMPLEMENTED,
    "ETIMEDOUT": Code.DEADLINE_EXCEEDED,
    "ESHUTDOWN": Code.UNAVAILABLE,
}
"""gRPC's word for each errno; whatever is not here (EFAULT, ...) is a FAILED_PRECONDITION."""


class Malformed(Exception):
    """The bytes of a request are not the message that the call takes."""

    def __init__(self, expected: str) -> None:
        super().__init__(f"the bytes are not a {expected}; is the client built from another contract?")
        self.expected = expected


class Superseded(Exception):
    """The session goes on over another stream."""

    def __init__(self) -> None:
        super().__init__("another stream with this session's token took over; only one client may use a token")


class LeaseExpired(Exception):
    """Nothing was heard of the session for its lease; it must be resumed by its token before anything else."""

    def __init__(self, lease_s: float) -> None:
        super().__init__(
            f"no sign of life for {lease_s} s, the session's lease; attach again with its token, within its grace"
        )


class Unauthenticated(Exception):
    """Nobody knows who calls, and not everybody may."""


class NotKept(Exception):
    """The disk is full, and what the call did may be gone when the server starts again."""

    def __init__(self, directory: str) -> None:
        super().__init__(f"the disk of {directory} is full: what the call did is done, and is not kept yet")


class Stopping(Exception):
    """The server stops and could not finish the call."""

    def __init__(self) -> None:
        super().__init__("the server stops; the call was not finished here, and what it began may still happen")


@dataclass(frozen=True, slots=True)
class Failure:
    """What a client is told: metadata holds the values that were wrong, as text."""

    code: grpc.StatusCode
    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)


class Alarm:
    """Where broken invariants go: the main task waits for the first one and stops the server with it."""

    def __init__(self) -> None:
        self.broken: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    def ring(self, error: BaseException) -> None:
        """Report a broken invariant. The first one counts; it is the cause of the others."""
        if not self.broken.done():
            self.broken.set_result(error)


NOTIFY_CODES: Mapping[type[NotifyError], grpc.StatusCode] = {
    LimitReached: Code.RESOURCE_EXHAUSTED,
    PeerError: Code.INVALID_ARGUMENT,
    FencedError: Code.FAILED_PRECONDITION,
    StaleTranslation: Code.FAILED_PRECONDITION,
    Draining: Code.UNAVAILABLE,
}


def failure(error: BaseException) -> Failure | None:
    """Look an exception up. Returns: None when it is a broken invariant of ours."""
    if isinstance(error, MmError):
        return Failure(ERRNO_CODES.get(error.errno, Code.FAILED_PRECONDITION), error.errno, error.message)
    if isinstance(error, NotifyError):
        code = NOTIFY_CODES.get(type(error))
        fields = {name: str(value) for name, value in error.fields.items()}
        if isinstance(error, FencedError):  # who was away when it happened learns of it by this status
            held = list(zip(error.registrations, error.held_pages, strict=True))[:LOST_NAMED_MAX]
            fields["lost"] = " ".join(f"{registration}:{pages}" for registration, pages in held)
        if isinstance(error, RequestError):
            code = code or ERRNO_CODES.get(error.errno, Code.FAILED_PRECONDITION)
            fields["errno"] = error.errno
        return Failure(code or Code.FAILED_PRECONDITION, error.reason, error.message, fields)
    if isinstance(error, Malformed):
        return Failure(Code.INVALID_ARGUMENT, "MALFORMED", str(error), {"expected": error.expected})
    if isinstance(error, Superseded):
        return Failure(Code.ABORTED, "SUPERSEDED", str(error))
    if isinstance(error, LeaseExpired):
        return Failure(Code.ABORTED, "LEASE_EXPIRED", str(error))
    if isinstance(error, Unauthenticated):
        return Failure(Code.UNAUTHENTICATED, "UNAUTHENTICATED", str(error))
    if isinstance(error, NotKept):
        return Failure(Code.UNAVAILABLE, "NOT_KEPT", str(error), {"errno": "ENOSPC"})
    if isinstance(error, Stopping):
        return Failure(Code.UNAVAILABLE, "STOPPING", str(error))
    return None


def to_status(what: Failure) -> Status:
    """The status message that carries code, text and details."""
    detail = AnyMessage()
    detail.Pack(ErrorInfo(reason=what.reason, domain=DOMAIN, metadata=what.metadata))
    return Status(code=what.code.value[0], message=what.message, details=[detail])


def look_up(error: BaseException, alarm: Alarm) -> Failure:
    """The failure of an exception; a broken invariant rings the alarm and is told without its details."""
    found = failure(error)
    if found is not None:
        return found
    alarm.ring(error)
    return Failure(
        Code.INTERNAL, "BROKEN_INVARIANT", "the server broke an invariant of its own and stops; its log says which"
    )


async def abort(context: Context, error: BaseException, alarm: Alarm) -> None:
    """End a call with the status of an error. Raises: grpc.aio.AbortError, always."""
    await context.abort_with_status(rpc_status.to_status(to_status(look_up(error, alarm))))
