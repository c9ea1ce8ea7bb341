"""One structured line for what happens to a server or a session; never a token, never the bytes of memory.

What happens often is sampled: of each event so many lines a second are written, and the next line says how many were
not. So neither a storm nor an attacker fills a disk.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

__all__ = ["EVENTS_PER_S", "Level", "Sampler", "make_log"]

EVENTS_PER_S = 20
SECRETS = frozenset({"token", "authorization", "key", "secret", "password"})


class Level:
    """The least important level that is written; may be changed while a server runs."""

    def __init__(self, name: str) -> None:
        self.change(name)

    def change(self, name: str) -> None:
        """Args: name: "debug", "info", "warning" or "error"."""
        self.number = int(getattr(logging, name.upper()))

    def __call__(self, logger: object, method: str, event: EventDict) -> EventDict:
        if getattr(logging, method.upper(), logging.CRITICAL) < self.number:
            raise structlog.DropEvent
        return event


class Sampler:
    """Lets so many lines of each event through a second."""

    def __init__(self, per_s: int = EVENTS_PER_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._clock = clock
        self._second = -1
        self._seen: dict[str, int] = {}
        self._dropped: dict[str, int] = {}

    def __call__(self, logger: object, method: str, event: EventDict) -> EventDict:
        second = int(self._clock())
        if second != self._second:
            self._second = second
            self._seen.clear()
        name = str(event.get("event", ""))
        seen = self._seen[name] = self._seen.get(name, 0) + 1
        if seen > self._per_s and method not in ("error", "critical"):
            self._dropped[name] = self._dropped.get(name, 0) + 1
            raise structlog.DropEvent
        dropped = self._dropped.pop(name, 0)
        if dropped:
            event["not_written"] = dropped
        return event


def hide(logger: object, method: str, event: EventDict) -> EventDict:
    """The last line of defence: nothing under the name of a secret is written, whoever put it there."""
    for name in SECRETS & event.keys():
        event[name] = "(hidden)"
    return event


def make_log(level: str | Level, form: str, stream: TextIO | None = None) -> FilteringBoundLogger:
    """A logger of its own: nothing global is configured, so an embedded server leaves its host's logs alone.

    Args: level: the least important lines that are written; form: "console" or "json"; stream: standard error if None.
    """
    out = stream if stream is not None else sys.stderr
    last: Processor
    if form == "json":
        last = structlog.processors.JSONRenderer()
    else:
        plain = structlog.dev.plain_traceback
        last = structlog.dev.ConsoleRenderer(colors=out.isatty(), pad_event_to=0, exception_formatter=plain)
    # Tracebacks without local variables: those hold tokens and bytes of memory.
    without_locals = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    steps: list[Processor] = [
        level if isinstance(level, Level) else Level(level),
        Sampler(),
        hide,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *([structlog.processors.ExceptionRenderer(without_locals)] if form == "json" else []),
        last,
    ]
    wrapper = structlog.make_filtering_bound_logger(logging.DEBUG)
    log: FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(out), processors=steps, wrapper_class=wrapper
    )
    return log
