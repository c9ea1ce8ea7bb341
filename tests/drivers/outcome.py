"""What a soak has shown: a row for each driver, the rounds, the rules, and the verdict."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 120
SHOWN_MAX = 10
STARVED_S = 4.0
"""gRPC takes a peer for dead that does not answer a ping for five seconds."""
LOST = ("an actor failed: ConnectionLost", "an actor failed: MirrorVoid")


@dataclass(slots=True)
class DriverRow:
    """One driver, on all programs together.

    Attributes: accesses: bytes that were held against what may be there, and writes whose bytes others then look for.
        held: pages at the end. retries: accesses and grants that an invalidation overtook. refused: accesses that could
        not be, since the program had taken the memory, or the right to it, away.
    """

    reads: int = 0
    writes: int = 0
    moves: int = 0
    held: int = 0
    notices: int = 0
    acks: int = 0
    retries: int = 0
    refused: int = 0
    wrong: int = 0

    @property
    def accesses(self) -> int:
        return self.reads + self.writes + self.moves


@dataclass(slots=True)
class Outcome:
    """What a run has shown.

    Attributes: acts: what programs and the machine did. wrong: bytes that could not be there, and what failed.
        violations: of the rules, by the recorded history. offences: what the sanitizer found, by kind.
        fenced, freed_before_ack, dirty_unheld: as the server counts them. swapped_most, huge_most, free_least: pages in
        swap, huge pages mapped and free frames, at the moment when it was most, or least. stall_s: the longest that the
        loop was late, and the seconds of it in which this process worked; in the rest it was not scheduled.
    """

    title: str = ""
    seconds: float = 0.0
    drivers: dict[str, DriverRow] = field(default_factory=dict)
    acts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    offences: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    rounds_open: int = 0
    fenced: int = 0
    freed_before_ack: int = 0
    dirty_unheld: int = 0
    swapped_most: int = 0
    huge_most: int = 0
    free_least: int = 1 << 32
    stall_s: tuple[float, float] = (0.0, 0.0)

    def row(self, driver: str) -> DriverRow:
        """The row of a driver."""
        return self.drivers.setdefault(driver, DriverRow())

    @property
    def good(self) -> bool:
        """Nothing went wrong, and everything ended."""
        bad = self.wrong or self.violations or self.offences
        return not (bad or self.rounds_open or self.fenced or self.freed_before_ack or self.dirty_unheld)

    @property
    def starved(self) -> bool:
        """Nothing went wrong but that the process was not scheduled for so long that connections counted as dead."""
        late_s, work_s = self.stall_s
        lost = all(said.startswith(LOST) for said in self.wrong)
        return late_s > STARVED_S and late_s > 2 * work_s and lost and not (self.violations or self.offences)

    @property
    def idle(self) -> list[str]:
        """What a run of some length must have seen, and has not."""
        acts = [name for name, count in self.acts.items() if not count]
        return acts + [
            name for name, row in self.drivers.items() if not (row.reads and row.writes and (row.held or row.notices))
        ]

    def __str__(self) -> str:
        console = Console(width=WIDTH, force_terminal=False, highlight=False)
        with console.capture() as captured:
            self.show(console)
        return captured.get()

    def show(self, console: Console) -> None:
        """Print it."""
        ended = self.rounds - self.rounds_open
        offences = ", ".join(f"{count} {kind}" for kind, count in self.offences.items()) or "0 findings"
        sums = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        sums.add_row("rounds", f"{self.rounds:,} begun, {ended:,} ended")
        sums.add_row("rules", f"{len(self.violations)} violations, {self.freed_before_ack} frames freed before an ack")
        sums.add_row("sanitizer", f"{offences}, {self.dirty_unheld} pages called dirty and not held")
        sums.add_row("fenced", f"{self.fenced} sessions")
        memory = f"up to {self.swapped_most:,} pages in swap, {self.huge_most} huge pages mapped"
        sums.add_row("memory", f"{memory}, down to {self.free_least:,} free frames")
        late_s, work_s = self.stall_s
        sums.add_row(
            "stalls", f"the loop was late by up to {late_s:.1f} s, in which the process had {work_s:.1f} s of a CPU"
        )
        sums.add_row("bytes", f"{sum(row.wrong for row in self.drivers.values()):,} wrong")
        sums.add_row("acts", ", ".join(f"{name} {count:,}" for name, count in sorted(self.acts.items())))
        verdict = (
            Text("nothing went wrong, and every round ended", "green") if self.good else Text("NOT GOOD", "bold red")
        )
        parts: list[RenderableType] = [Text(self.title, "bold"), Text(), self._table(), Text(), sums, Text(), verdict]
        parts += [Text(line) for line in (*self.violations[:SHOWN_MAX], *self.wrong[:SHOWN_MAX])]
        console.print(Group(*parts))

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        titles = ("driver", "accesses checked", "pages held", "notices", "acks", "retries", "refused", "wrong bytes")
        for title in titles:
            table.add_column(title, justify="left" if title == "driver" else "right")
        for name, row in self.drivers.items():
            wrong = Text(f"{row.wrong:,}", "bold red" if row.wrong else "green")
            counts = (row.accesses, row.held, row.notices, row.acks, row.retries, row.refused)
            table.add_row(name, *(f"{count:,}" for count in counts), wrong)
        return table
