"""A registration: one notifier of a session, on one address space's list or on the global rmap list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmubusd.notify.notice import Op, RegistrationId
from mmubusd.notify.translation import ExportTable

if TYPE_CHECKING:
    from mmubusd.notify.session import Session
    from mmubusd.notify.translation import TranslationTable


@dataclass(frozen=True, slots=True)
class Spec:
    """What a client asks for; the fields are the contract's Register, or RegisterRmap when mm is 0.

    ops: what it implements; start, end: its interval in bytes, end 0: the whole address space; only_held: only ranges
    of which it holds translations; ack_budget_s: 0: the session's; owner: who it is for REASON_MIGRATE and
    REASON_EXCLUSIVE; demotable: when it is too slow it is demoted, and its session is not fenced.
    """

    mm: int
    ops: frozenset[Op] = frozenset()
    start: int = 0
    end: int = 0
    only_held: bool = False
    ack_budget_s: float = 0.0
    name: str = ""
    owner: int = 0
    demotable: bool = False


class Registration:
    """One notifier, from register until unregister, fence, leave or the end of its address space.

    Attributes:
        id: unique in this epoch; greater is newer.
        mm: the address space's id; 0 on the rmap list. start, end: bytes; the whole address space where none was asked
        for. warnings: what will slip through because an op is missing, one sentence each.
        as_of_seq: notices of its session with a seq up to this one do not concern it.
        alive: false from the moment on when nothing more is delivered to it.
        table: what it holds.
        demotable: as asked for. uncached: it is demoted, holds nothing and is told of nothing. flushed_at: when it said
        that it holds nothing (the bus's clock), None while it has not. flushed_round: the last round before it was.
    """

    __slots__ = (
        "ack_budget_s", "alive", "as_of_seq", "demotable", "end", "flushed_at", "flushed_round", "id",
        "mm", "name", "only_held", "ops", "owner", "session", "start", "table", "uncached", "warnings",
    )  # fmt: skip

    def __init__(
        self, registration_id: RegistrationId, session: Session, spec: Spec, *, start: int, end: int, ack_budget_s:
        float, table: TranslationTable | ExportTable, warnings: tuple[str, ...], as_of_seq: int,
    ) -> None:  # fmt: skip
        self.id = registration_id
        self.session = session
        self.mm = spec.mm
        self.ops = spec.ops
        self.start = start
        self.end = end
        self.only_held = spec.only_held
        self.ack_budget_s = ack_budget_s
        self.name = spec.name
        self.owner = spec.owner
        self.table = table
        self.warnings = warnings
        self.as_of_seq = as_of_seq
        self.alive = True
        self.demotable = spec.demotable
        self.uncached = False
        self.flushed_at: float | None = None
        self.flushed_round = 0

    @property
    def held_pages(self) -> int:
        """Pages of which it holds translations (or frames that it exports)."""
        return self.table.held

    def runs(self, start: int, end: int, runs_max: int) -> list[tuple[int, int]]:
        """Where in [start, end) it holds translations: at most so many runs of pages. Exports have no address."""
        return [] if isinstance(self.table, ExportTable) else self.table.runs(start, end, runs_max)

    def __repr__(self) -> str:
        where = f"mm {self.mm}" if self.mm else "rmap"
        return f"Registration({self.id} {self.name!r} of {self.session.name!r} on {where})"
