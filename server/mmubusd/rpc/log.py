"""One structured line for what happens to a server or a session; never a token, never the bytes of memory."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog
from structlog.typing import FilteringBoundLogger, Processor

__all__ = ["make_log"]


def make_log(level: str, form: str, stream: TextIO | None = None) -> FilteringBoundLogger:
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
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *([structlog.processors.ExceptionRenderer(without_locals)] if form == "json" else []),
        last,
    ]
    wrapper = structlog.make_filtering_bound_logger(getattr(logging, level.upper()))
    log: FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(out), processors=steps, wrapper_class=wrapper
    )
    return log
