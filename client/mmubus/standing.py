"""Where a session stands, how it was asked for, and what the server has found about it. Values, no I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmubus.errors import Fenced

__all__ = ["Finding", "SessionOptions", "State"]


class State(StrEnum):
    """Where a session stands."""

    IDLE = "idle"
    LIVE = "live"
    LOST = "lost"
    VOID = "void"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Finding:
    """What the server found: something that this client did wrong, or a deadlock that it was part of.

    kind: as the contract's Finding says; message: a sentence; lines: the history of the page, or the cycle.
    """

    kind: str
    message: str
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n    ".join([f"{self.kind}: {self.message}", *self.lines])


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """As given to `connect`."""

    name: str = ""
    ack_budget_s: float = 0.0
    lease_s: float = 0.0
    reattach: bool = False
    on_fenced: Callable[[Fenced], None] | None = None
    chaos: str = ""
    lane: bool = True
