"""The tables that people look at: what each column says, and what it is sorted by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mmu.v1 import inspection_pb2 as pb

from mmubus.linux import Reason
from mmubus.look.words import address_range, took

__all__ = ["LATE_S", "ROUNDS", "SESSIONS", "SPACES", "Column", "late", "matches", "place"]

LATE_S = 1.0
"""A round that is open for so long waits for somebody who is late: half of the default budget is used up."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """One column. text: what a row says there; key: what rows are sorted by; number: it is written to the right."""

    title: str
    text: Callable[[T], str]
    key: Callable[[T], Any]
    number: bool = True


def held(one: pb.Session) -> int:
    """Pages that all its registrations hold."""
    return sum(registration.held_pages for registration in one.registrations)


def state(one: pb.Session) -> str:
    """Its state, and why it was fenced."""
    return f"{one.state}: {one.fenced_because}" if one.fenced_because else str(one.state)


def place(one: pb.Round) -> str:
    """Where a round is."""
    return f"mm {one.mm} {address_range(one.start, one.end)}" if one.mm else "exported frames"


def late(one: pb.Round) -> bool:
    """Whether somebody is late with it."""
    return one.open and one.took_s >= LATE_S


def matches(columns: Sequence[Column[T]], row: T, wanted: str) -> bool:
    """Whether any column of the row has the text that is looked for, in capitals or not."""
    return any(wanted.lower() in column.text(row).lower() for column in columns)


SESSIONS: tuple[Column[pb.Session], ...] = (
    Column("harm", lambda one: took(one.harm_s), lambda one: -one.harm_s),
    Column("session", lambda one: one.name or f"({one.session})", lambda one: one.name, number=False),
    Column("state", state, lambda one: one.state, number=False),
    Column("late", lambda one: f"{one.late:,}", lambda one: -one.late),
    Column("waiting", lambda one: f"{one.waiting:,}", lambda one: -one.waiting),
    Column("ack p50", lambda one: took(one.ack_us_p50 / 1e6), lambda one: -one.ack_us_p50),
    Column("p99", lambda one: took(one.ack_us_p99 / 1e6), lambda one: -one.ack_us_p99),
    Column("notices", lambda one: f"{one.notices:,}", lambda one: -one.notices),
    Column("notifiers", lambda one: f"{len(one.registrations):,}", lambda one: -len(one.registrations)),
    Column("held", lambda one: f"{held(one):,}", lambda one: -held(one)),
)
"""Sessions, those that others waited for most first."""

ROUNDS: tuple[Column[pb.Round], ...] = (
    Column("open for", lambda one: took(one.took_s), lambda one: -one.took_s),
    Column("waits for", lambda one: ", ".join(one.waiting_for), lambda one: list(one.waiting_for), number=False),
    Column("operation", lambda one: one.operation, lambda one: one.operation, number=False),
    Column("reason", lambda one: Reason(one.reason).name.lower(), lambda one: one.reason, number=False),
    Column("where", place, lambda one: (one.mm, one.start), number=False),
    Column("round", lambda one: f"{one.round}", lambda one: one.round),
)
"""Rounds that are open, the oldest first."""

SPACES: tuple[Column[pb.AddressSpace], ...] = (
    Column("mm", lambda one: f"{one.mm}", lambda one: one.mm),
    Column("name", lambda one: one.name, lambda one: one.name, number=False),
    Column("resident", lambda one: f"{one.resident_pages:,}", lambda one: -one.resident_pages),
    Column("pages", lambda one: f"{one.total_pages:,}", lambda one: -one.total_pages),
    Column("mappings", lambda one: f"{one.mappings:,}", lambda one: -one.mappings),
    Column("notifiers", lambda one: f"{one.registrations:,}", lambda one: -one.registrations),
    Column("open rounds", lambda one: f"{one.open_rounds:,}", lambda one: -one.open_rounds),
    Column("parent", lambda one: f"{one.parent}" if one.parent else "", lambda one: one.parent),
)
"""Address spaces, by number."""
