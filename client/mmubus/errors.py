"""What can go wrong, and whose fault it was.

    MmuBusError
    ├── CallFailed                the server answered: it cannot be done
    │   ├── MmError               ... and Linux has an errno for it; .errno is Python's number
    │   ├── StaleTranslation      a device used a translation that was taken away; says by whom and when
    │   ├── NotFound              no such session, registration, round
    │   └── LimitExceeded         a limit of the server was hit; it says which
    ├── SessionError              this client's session is over or in danger
    │   ├── Fenced                the server took away all rights; says what was lost
    │   ├── ConnectionLost        the server cannot be reached
    │   ├── Draining              the server stops soon and takes no new work
    │   └── MirrorVoid            a mirror was used while nothing in it can be trusted
    ├── ProtocolError             one of the two sides broke the contract
    ├── Unregistered              a registration was used after it was given back
    ├── UnsafeConnection          a secret would be sent in the clear, or certificates cannot be used
    ├── RetriesExhausted          a fault met an invalidation every time
    └── CalledFromHandler         a synchronous call from the thread that would have to answer it

What a handler raises to answer, `Refuse` and `Busy`, are no errors and stand outside of the tree.
"""

from __future__ import annotations

import errno as _errno
import re
from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "Busy",
    "CallFailed",
    "CalledFromHandler",
    "ConnectionLost",
    "Draining",
    "Fenced",
    "LimitExceeded",
    "MirrorVoid",
    "MmError",
    "MmuBusError",
    "NotFound",
    "ProtocolError",
    "Refuse",
    "RetriesExhausted",
    "SessionError",
    "StaleTranslation",
    "Unregistered",
    "UnsafeConnection",
    "error_from",
]


class MmuBusError(Exception):
    """Everything that this library raises on purpose."""


class UnsafeConnection(MmuBusError):
    """The connection is not made: a secret would be sent in the clear, or certificates cannot be used."""


_NEWER = {"EHWPOISON": 133}
"""Errnos of Linux that Python's errno module does not know everywhere."""


def _number_of(reason: str) -> int:
    number: int = _NEWER[reason] if reason in _NEWER else getattr(_errno, reason)
    return number


class CallFailed(MmuBusError):
    """The server answered that it cannot be done.

    Attributes:
        reason: one word, upper case: an errno's name or the name of what was wrong.
        message: a sentence for people.
        metadata: the values that were wrong, as the server told them.
    """

    def __init__(self, reason: str, message: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{reason}: {message}" if message else reason)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})


class MmError(CallFailed):
    """A memory call failed as it would on Linux.

    >>> try: ...
    ... except MmError as error:
    ...     if error.errno == errno.EINVAL: ...

    Attributes:
        errno: the number, as in Python's errno module.
        errno_name: its name, "EINVAL".
    """

    def __init__(self, reason: str, message: str = "", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(reason, message, metadata)
        self.errno_name = reason
        self.errno: int = _number_of(reason)

    @property
    def strerror(self) -> str:
        """The message, under the name that OSError has for it."""
        return self.message


class StaleTranslation(CallFailed):
    """A translation was used after it was taken away: the access was refused and nothing was read or written.

    The message tells the story for people; metadata has its parts, as far as the server remembers them: the address,
    the pfn and generation presented, the operation that took the page, when the notice was sent and when this client
    acknowledged it.
    """

    @property
    def address(self) -> int | None:
        """The address of the page, or None when the server did not say."""
        return _number(self.metadata, "address", "addr")

    @property
    def taken_by(self) -> str:
        """The operation that took the page away, or ""."""
        return self.metadata.get("taken_by") or self.metadata.get("operation", "")

    @property
    def round(self) -> int | None:
        """The round that took the page away, or None."""
        return _number(self.metadata, "round")


class NotFound(CallFailed):
    """There is no such thing (any more): session, registration, pin, round."""


class LimitExceeded(CallFailed):
    """A limit of the server was hit; the message names it. Trying again later may help."""


class SessionError(MmuBusError):
    """This client's session is over or in danger; what it held is void or may soon be."""


class Fenced(SessionError):
    """The server has taken away every right of this session: a notice was not acknowledged in time, or it stayed away.

    Attributes:
        seq: the notice that was not acknowledged; 0: the session was lost for another reason.
        round: the round that it belongs to.
        waited_s: how long the server waited, in seconds.
        lost: pages that each registration held: registration id -> number of pages.
    """

    def __init__(
        self,
        message: str,
        *,
        seq: int = 0,
        round: int = 0,
        waited_s: float = 0.0,
        lost: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.seq = seq
        self.round = round
        self.waited_s = waited_s
        self.lost = dict(lost or {})


class ConnectionLost(SessionError):
    """The server cannot be reached, or went away during the call: it is not known whether the call was done."""


class Draining(SessionError):
    """The server stops soon and takes no new work; another server, or a later time, will."""


class MirrorVoid(SessionError):
    """The mirror is not valid: its session is in jeopardy, fenced, or gone. Nothing was read or written."""


class ProtocolError(MmuBusError):
    """One of the two sides broke the contract: a bug here or in the server, or two versions that do not fit."""


class RetriesExhausted(MmuBusError):
    """A fault was overtaken by an invalidation each time it was tried. The range is busy; trying again is allowed."""


class Unregistered(MmuBusError):
    """A registration was used after it had been given back by `unregister`."""


class CalledFromHandler(MmuBusError):
    """A synchronous call was made in the thread that runs the connection: it would wait for itself for ever.

    Pass `handlers="worker"` to `mmubus.sync.connect` when handlers call back.
    """


class Refuse(Exception):
    """Raised by a handler to refuse a notice that may be refused: a non-blockable one, or an rmap page under reclaim.

    Args: pages: the pfns that are refused, for rmap notices; none: all of the notice.
    """

    def __init__(self, pages: Sequence[int] = ()) -> None:
        super().__init__()
        self.pages = tuple(pages)


class Busy(Exception):
    """Raised by a handler that is alive and not done: the server extends the budget up to its cap, the handler is
    called again.

    Args: again_in_s: when to call the handler again, in seconds.
    """

    def __init__(self, again_in_s: float = 0.05) -> None:
        super().__init__()
        self.again_in_s = again_in_s


def _number(metadata: Mapping[str, str], *keys: str) -> int | None:
    """The first of the keys that is there, as a number."""
    for key in keys:
        if value := metadata.get(key):
            try:
                return int(value, 0)
            except ValueError:
                continue
    return None


_LOST = re.compile(r"(\d+):(\d+)")


def _fenced(reason: str, message: str, metadata: Mapping[str, str]) -> MmuBusError:
    waited = metadata.get("waited_s", "")
    return Fenced(
        message or reason,
        seq=_number(metadata, "seq") or 0,
        round=_number(metadata, "round") or 0,
        waited_s=float(waited) if waited.replace(".", "", 1).isdigit() else 0.0,
        lost={int(registration): int(pages) for registration, pages in _LOST.findall(metadata.get("lost", ""))},
    )


def _unknown(reason: str, message: str, metadata: Mapping[str, str]) -> MmuBusError:
    """The server gives a reason with every status of its own. Without one it is gRPC's word for a stream that broke."""
    return ConnectionLost(message or reason) if reason == "UNKNOWN" else ProtocolError(message or reason)


type_of_reason: dict[str, Callable[[str, str, Mapping[str, str]], MmuBusError]] = {
    "STALE_TRANSLATION": StaleTranslation,
    "FENCED": _fenced,
    "STALE_EPOCH": _fenced,
    "STOPPING": lambda reason, message, metadata: Draining(message or reason),
    "DRAINING": lambda reason, message, metadata: Draining(message or reason),
}

type_of_code: dict[str, Callable[[str, str, Mapping[str, str]], MmuBusError]] = {
    "UNAVAILABLE": lambda reason, message, metadata: ConnectionLost(message or reason),
    "CANCELLED": lambda reason, message, metadata: ConnectionLost(message or reason),
    "DEADLINE_EXCEEDED": lambda reason, message, metadata: ConnectionLost(message or reason),
    "NOT_FOUND": NotFound,
    "RESOURCE_EXHAUSTED": LimitExceeded,
    "UNIMPLEMENTED": lambda reason, message, metadata: ProtocolError(message or reason),
    "INTERNAL": lambda reason, message, metadata: ProtocolError(message or reason),
    "UNKNOWN": _unknown,
    "INVALID_ARGUMENT": lambda reason, message, metadata: ProtocolError(message or reason),
    "UNAUTHENTICATED": CallFailed,
    "PERMISSION_DENIED": CallFailed,
}


def error_from(code: str, reason: str, message: str, metadata: Mapping[str, str] | None = None) -> MmuBusError:
    """The one table from what the server says to what is raised.

    Args:
        code: the gRPC status, "FAILED_PRECONDITION"; "" for errors that come inside of an answer.
        reason: ErrorInfo's reason, or "".
        message: for people.
        metadata: ErrorInfo's metadata.
    """
    metadata = metadata or {}
    if make := type_of_reason.get(reason):
        return make(reason, message, metadata)
    if reason.startswith("E") and (hasattr(_errno, reason) or reason in _NEWER):
        return MmError(reason, message, metadata)
    if make := type_of_code.get(code):
        return make(reason or code, message, metadata)
    return CallFailed(reason or code, message, metadata)
