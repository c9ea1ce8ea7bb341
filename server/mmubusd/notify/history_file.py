"""A recording as lines of JSON, to be judged, drawn and kept.

    {"mmubus-history": 1, "epoch": 7, "longest_s": 30.0}
    {"at": 12.5, "what": "round opened", "round": 3, "mm": 1, "ranges": [[4096, 8192]], "text": "invalidate_range"}
    ...
    {"end": true}

Fields that say nothing are left out. A recording without its last line was cut off: what was under way then has no end
in it, and is no violation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mmubusd.notify.history import Event, What

FORMAT = 1
END = '{"end": true}'
_DEFAULTS = Event(0.0, What.FREED)._asdict()


@dataclass(frozen=True, slots=True)
class Header:
    """The first line. epoch: the server's; longest_s: the longest that a round may take by its configuration."""

    epoch: int
    longest_s: float


class HistoryError(ValueError):
    """The lines are not a recording; says which line and why."""


def header_line(header: Header) -> str:
    """The first line of a recording."""
    return json.dumps({"mmubus-history": FORMAT, "epoch": header.epoch, "longest_s": header.longest_s})


def event_line(event: Event) -> str:
    """One event."""
    fields = event._asdict()
    said = {name: value for name, value in fields.items() if name in ("at", "what") or value != _DEFAULTS[name]}
    return json.dumps(said, separators=(",", ":"))


def read_header(line: str) -> Header:
    """Raises: HistoryError."""
    found = _object(line, 1)
    if found.get("mmubus-history") != FORMAT:
        raise HistoryError(f"line 1: this is not a recording of format {FORMAT}")
    try:
        return Header(int(str(found["epoch"])), float(str(found["longest_s"])))
    except (KeyError, TypeError, ValueError) as error:
        raise HistoryError(f"line 1: {error!r}") from error


class Events:
    """The events of a recording, read as they are asked for. Attributes: over: its last line was read."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = lines
        self.over = False

    def __iter__(self) -> Iterator[Event]:
        """Raises: HistoryError."""
        for number, line in enumerate(self._lines, 2):
            found = _object(line, number)
            if found == {"end": True}:
                self.over = True
                return
            yield _event(found, number)


def _object(line: str, number: int) -> dict[str, object]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise HistoryError(f"line {number}: {error}") from error
    if not isinstance(found, dict):
        raise HistoryError(f"line {number}: not an object")
    return found


def _event(found: dict[str, object], number: int) -> Event:
    try:
        fields = dict(found)
        fields["what"] = What(str(fields["what"]))
        for name in ("pfns", "generations"):
            if name in fields:
                fields[name] = tuple(fields[name])  # type: ignore[arg-type]
        if "ranges" in fields:
            fields["ranges"] = tuple((start, end) for start, end in fields["ranges"])  # type: ignore[attr-defined]
        return Event(**fields)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise HistoryError(f"line {number}: {error}") from error
