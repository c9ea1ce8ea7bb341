"""Whose fault it is, and with which values.

| error | whose fault | what has changed |
|---|---|---|
| `RequestError` and its kin | the request's: it cannot be done | nothing |
| `PeerError` | the session's: it broke the contract | the session should be ended, it alone |
| `FencedError` | the session was too slow, or broke the contract before | its rights were void already |
| `StaleTranslation` | the device's: it uses what it was told to drop | nothing; the access did not happen |
| `Draining` | nobody's: the server stops | nothing |

A broken invariant of ours is an `AssertionError` and is never caught here.
"""

from __future__ import annotations

from collections.abc import Sequence


class NotifyError(Exception):
    """Base of everything that notify refuses.

    Attributes:
        reason: a name for programs ("NO_SUCH_REGISTRATION"); message: a sentence for people; fields: the values.
    """

    reason = "NOTIFY"

    def __init__(self, message: str, **fields: str | int | float) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields


class RequestError(NotifyError):
    """The request cannot be done; nothing has changed.

    Args: errno: the name that Linux has for it; reason: the protocol's name for it, where it has one of its own.
    """

    reason = "EINVAL"

    def __init__(self, errno: str, message: str, *, reason: str = "", **fields: str | int | float) -> None:
        super().__init__(message, **fields)
        self.errno = errno
        self.reason = reason or errno


class LimitReached(RequestError):
    """One more would be beyond a limit of the configuration. Fields: limit (its name), maximum."""

    def __init__(self, errno: str, limit: str, maximum: int) -> None:
        super().__init__(
            errno, f"no more than {maximum} are allowed ({limit})", reason="LIMIT_REACHED", limit=limit, maximum=maximum
        )


class PeerError(NotifyError):
    """The session broke the contract and must be ended, it alone."""

    reason = "PROTOCOL_VIOLATION"


class FencedError(NotifyError):
    """The session's rights are void; it must begin a new one and fault everything again.

    Attributes:
        seq, round: the notice that was not acknowledged (0: another cause); waited_s: for how long;
        registrations, held_pages: what the session held when it was fenced, in the same order.
    """

    reason = "FENCED"

    def __init__(
        self,
        message: str,
        *,
        seq: int = 0,
        round_id: int = 0,
        waited_s: float = 0.0,
        registrations: Sequence[int] = (),
        held_pages: Sequence[int] = (),
    ) -> None:
        super().__init__(message, seq=seq, round=round_id, waited_s=waited_s)
        self.seq = seq
        self.round = round_id
        self.waited_s = waited_s
        self.registrations = tuple(registrations)
        self.held_pages = tuple(held_pages)


class StaleTranslation(NotifyError):
    """A device used a translation that is not, or no longer, its own; the access did not happen.

    The message tells which operation took the page, when the notice was sent and when it was acknowledged.
    Fields: registration, addr, pfn, generation; and where known operation, round, notified_at, acked_at.
    """

    reason = "STALE_TRANSLATION"


class Draining(NotifyError):
    """The server stops soon and takes no new work."""

    reason = "DRAINING"
