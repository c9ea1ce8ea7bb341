"""Recording a run, and what can be done with it: `mmubus serve --record`, `mmubus judge`, `mmubus export-trace`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from mmubusd.notify import Bus
from mmubusd.notify.history import Event
from mmubusd.notify.history_file import END, Events, Header, HistoryError, event_line, header_line, read_header
from mmubusd.notify.perfetto import trace_events
from mmubusd.notify.validators import judge

__all__ = ["Recorder", "export", "judge_file"]

MISUSED = 2


class Recorder:
    """Writes everything that happens on a bus to a file, until it is closed."""

    def __init__(self, bus: Bus, path: Path) -> None:
        """Raises: OSError when the file cannot be written."""
        self._history = bus.history
        self._file: TextIO = path.open("w", encoding="utf-8")
        longest_s = max(bus.limits.ack_budget_max_s, bus.limits.ack_budget_s)
        self._file.write(header_line(Header(bus.epoch, longest_s)) + "\n")
        self._history.sink = self._write
        self._history.recording = True

    def _write(self, event: Event) -> None:
        self._file.write(event_line(event) + "\n")

    def close(self) -> None:
        """The run is over. Idempotent."""
        if self._history.sink is not None:
            self._history.recording = False
            self._history.sink = None
            self._file.write(END + "\n")
            self._file.close()


def judge_file(arguments: Sequence[str]) -> int:
    """`mmubus judge FILE`: exit status 1 when a rule was broken, 2 when it is not a recording."""
    parser = argparse.ArgumentParser("mmubus judge", description="Judge a recording by the rules of the design.")
    parser.add_argument("file", type=Path)
    given = parser.parse_args(arguments)
    try:
        with given.file.open(encoding="utf-8") as lines:
            header = read_header(next(lines, ""))
            events = Events(lines)
            seen = list(events)
    except (OSError, HistoryError) as error:
        return _misused("judge", given.file, error)
    violations = judge(seen, over=False, longest_s=header.longest_s)
    for violation in violations:
        print(violation)
    cut = "" if events.over else ", cut off at its end"
    print(f"{len(seen)} events of epoch {header.epoch}{cut}: {len(violations)} violations")
    return int(bool(violations))


def export(arguments: Sequence[str]) -> int:
    """`mmubus export-trace FILE [--out FILE]`: a picture for ui.perfetto.dev."""
    parser = argparse.ArgumentParser("mmubus export-trace", description="Draw a recording, for ui.perfetto.dev.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="default: the recording's name with .trace.json")
    given = parser.parse_args(arguments)
    out = given.out or given.file.with_suffix(".trace.json")
    try:
        with given.file.open(encoding="utf-8") as lines:
            read_header(next(lines, ""))
            drawn = list(trace_events(Events(lines)))
        out.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": drawn}), encoding="utf-8")
    except (OSError, HistoryError) as error:
        return _misused("export-trace", given.file, error)
    print(f"{out}: {len(drawn)} trace events")
    return 0


def _misused(command: str, file: Path, error: OSError | HistoryError) -> int:
    """One line that names the file, once. Returns: the exit status."""
    why = f"{error.filename or file}: {error.strerror}" if isinstance(error, OSError) else f"{file}: {error}"
    print(f"mmubus {command}: {why}", file=sys.stderr)
    return MISUSED
