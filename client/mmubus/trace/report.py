"""What came out of a replay: as an object for machines, and as a page that a person likes to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mmubus.trace.compare import Books, Mismatch, plain
from mmubus.trace.crew import Driver
from mmubus.trace.format import Trace

__all__ = ["Report", "drivers_table", "duration", "size"]


@dataclass(slots=True)
class Report:
    """One replay.

    Attributes:
        rounds, acks, freed_before_ack, stale_refused: what the server counted during it.
        ack_us: microseconds, p50 and p99.
        fenced: names of sessions that were fenced, drivers that died among them.
        drivers: what each driver did.
        notes: what else there is to say, one sentence each.
    """

    trace: Trace
    books: Books
    seconds: float = 0.0
    rounds: int = 0
    acks: int = 0
    ack_us: dict[str, float] = field(default_factory=lambda: {"p50": 0.0, "p99": 0.0})
    freed_before_ack: int = 0
    fenced: list[str] = field(default_factory=list)
    drivers: list[Driver] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def stale_reads(self) -> int:
        """DMA reads that did not give what the program wrote, and those that were refused because the page was gone.

        Drivers end their accesses before they acknowledge, so that none is overtaken: a refused one is a defect.
        """
        return sum(driver.wrong + driver.refused for driver in self.drivers)

    @property
    def good(self) -> bool:
        """Nothing missed, stale, fenced or freed early; in a random recording the whole state equal too."""
        state_told = self.trace.header.source == "random"
        return not (
            self.books.missed
            or self.stale_reads
            or self.fenced
            or self.freed_before_ack
            or (state_told and self.books.state_mismatched)
        )

    def as_json(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "trace": self.trace.path,
            "operations": self.books.operations,
            "seconds": round(self.seconds, 3),
            "mismatched": dict(self.books.mismatched),
            "notifications": self.books.notifications(),
            "rounds": self.rounds,
            "acks": self.acks,
            "ack_us": {name: round(value, 1) for name, value in self.ack_us.items()},
            "freed_before_ack": self.freed_before_ack,
            "stale_reads": self.stale_reads,
            "fenced": list(self.fenced),
            "first_mismatches": [mismatch.as_json() for mismatch in self.books.mismatches],
        }

    def show(self, console: Console) -> None:
        """Print it for people."""
        console.print(Group(*self._parts()))

    def _parts(self) -> list[RenderableType]:
        books = self.books
        verdict = Text("equal to the kernel" if self.good and not any(books.mismatched.values()) else "")
        if not verdict:
            verdict = Text("nothing missed", "green") if self.good else Text("not good", "bold red")
        head = Text.assemble(
            (self.trace.name, "bold"), f"  {books.operations:,} operations in {duration(self.seconds)}  "
        )
        parts: list[RenderableType] = [head + verdict]
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_row(
            "notifications",
            f"kernel {books.kernel:,} ({size(books.kernel_bytes)})",
            f"bus {books.bus:,} ({size(books.bus_bytes)})",
        )
        missed = Text(f"{books.missed:,} missed ({size(books.missed_bytes)})", "bold red" if books.missed else "green")
        unknowable = f", {books.unknowable:,} unknowable" if books.unknowable else ""
        table.add_row("", missed, f"{size(books.excess_bytes)} more than the kernel{unknowable}")
        differs = ", ".join(f"{count:,} {aspect}" for aspect, count in books.mismatched.items() if count)
        table.add_row("operations that differ", differs or Text("none", "green"))
        if self.drivers:
            latency = f"acks p50 {self.ack_us['p50']:,.0f} µs, p99 {self.ack_us['p99']:,.0f} µs"
            table.add_row("rounds", f"{self.rounds:,} with {self.acks:,} acknowledgements", latency)
        table.add_row(
            "freed before ack", Text(f"{self.freed_before_ack:,}", "bold red" if self.freed_before_ack else "green")
        )
        if self.fenced:
            table.add_row("fenced", Text(", ".join(self.fenced), "bold red"))
        parts.append(table)
        if self.drivers:
            parts.append(Padding(drivers_table(self.drivers), (0, 2)))
        parts += [Text(f"  {note}", "dim") for note in self.notes]
        for mismatch in books.mismatches[: 3 if self.good else None]:
            parts.append(Text(_line(mismatch), "yellow"))
        return parts


def drivers_table(drivers: Sequence[Driver], what: Mapping[str, str] | None = None, *, over: bool = True) -> Table:
    """What each driver holds and has done.

    Args: what: each kind is, for people, to whom a read that was refused is a wrong one, too; over: nothing is held any
        more.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("driver")
    if what is not None:
        table.add_column("what it is")
    titles = ["most held" if over else "pages held", "notices", "acks", "ack p50", "p99", "pages read", "wrong"]
    for title in (*titles, "refused") if what is None else titles:
        table.add_column(title, justify="right")
    table.add_column("")
    for driver in drivers:
        seen = driver.seen
        cells: list[str | Text] = [driver.name, what[driver.kind]] if what is not None else [driver.name]
        cells += [
            f"{count:,}" for count in (driver.held_most if over else driver.held, seen.notices, seen.acknowledged)
        ]
        cells += [_microseconds(seen.ack_us_p50), _microseconds(seen.ack_us_p99)]
        cells.append(f"{driver.reads:,}")
        cells += [_bad(driver.wrong), _bad(driver.refused)] if what is None else [_bad(driver.wrong + driver.refused)]
        table.add_row(*cells, Text("died", "bold red") if driver.died else Text(""))
    return table


def _bad(count: int) -> Text:
    """A count of what must not happen."""
    return Text(f"{count:,}", "bold red" if count else "green")


def _microseconds(us: float) -> str:
    return f"{us / 1000:,.1f} ms" if us else "-"


def _line(mismatch: Mismatch) -> str:
    """One difference in a line."""
    operation = mismatch.operation
    args = ", ".join(hex(arg) if arg > 9 else str(arg) for arg in operation.args)
    both = f"expected {_short(mismatch.expected)}, came {_short(mismatch.came)}"
    return f"  #{operation.number} {operation.op}({args}): {mismatch.aspect}: {both}"


def _short(value: Any) -> str:
    """A value in a line: addresses in hex, long lists cut."""

    def shown(one: Any) -> str:
        if isinstance(one, int) and one > 1 << 16:
            return hex(one)
        if isinstance(one, list):
            inner = [shown(part) for part in one[:4]] + (["…"] if len(one) > 4 else [])
            return f"[{', '.join(inner)}]"
        return str(one)

    return shown(plain(value))


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
