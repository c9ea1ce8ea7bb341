"""Within which notice's handler we are: told to the server with every request, so that it can find deadlocks.

A handler that waits for an operation which waits for the handler's own acknowledgement would wait until its session is
fenced. The server sees the cycle and answers the request with EDEADLK, but it must know that the handler waits. What a
handler starts in a task of its own counts as its own, too.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mmubus.channel import session_metadata

if TYPE_CHECKING:
    from mmubus.session import Session

__all__ = ["acting", "handling"]

S = TypeVar("S")

handling: ContextVar[int] = ContextVar("mmubus_handling", default=0)
"""The number of the notice whose handler runs in this context; 0: none does."""


class _Acting:
    """A stub whose calls say from which handler they come."""

    def __init__(self, stub: object, session: Session) -> None:
        self._stub = stub
        self._session = session

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._stub, name)

        def acting(request: object) -> Any:
            seq = handling.get()
            return call(request, metadata=session_metadata(self._session.token, seq)) if seq else call(request)

        return acting


def acting(stub: S, session: Session) -> S:
    """The same unary calls, which say within which handler they are made, if they are."""
    return cast(S, _Acting(stub, session))
