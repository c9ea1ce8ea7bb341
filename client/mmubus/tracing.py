"""OpenTelemetry spans of a client: one a call, and one a handler that a traced call elsewhere has caused.

Off unless asked for (`connect(traces=True)` or MMUBUS_TRACES), and only then is OpenTelemetry imported: the extra
[otel], or whatever the program has. Spans are recorded by the provider that the program has set up; without one they
cost little and go nowhere. The trace goes to the server as W3C traceparent: in the metadata of a call, in the Call
messages of a pipelined stream, and back in the notices that the call causes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from mmubus.errors import MmuBusError

__all__ = ["KEY", "Tracing"]

KEY = "traceparent"


class Tracing:
    """Makes spans by the program's own tracer provider."""

    def __init__(self) -> None:
        """Raises: MmuBusError when OpenTelemetry is not installed."""
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise MmuBusError("traces need OpenTelemetry: pip install 'mmubus[otel]'") from None
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = trace.get_tracer("mmubus")

    @classmethod
    def of(cls, asked: bool | None) -> Tracing | None:
        """None when nobody asked. Args: asked: None: what MMUBUS_TRACES says."""
        if asked is None:
            asked = os.environ.get("MMUBUS_TRACES", "").lower() in ("1", "true", "yes", "on")
        return cls() if asked else None

    def call(self, path: str, send: Callable[[list[tuple[str, str]]], Any]) -> Any:
        """A unary call within a span that ends with it."""
        span = self._tracer.start_span(f"mmubus {path.rpartition('/')[2]}", kind=self._trace.SpanKind.CLIENT)
        started = send([(KEY, self.parent_of(span))] if span.get_span_context().is_valid else [])
        started.add_done_callback(lambda _: span.end())
        return started

    def submit(self, name: str, answer: asyncio.Future[Any]) -> str:
        """A call or request of a pipelined stream, in a span that ends with its answer. Returns: its traceparent."""
        span = self._tracer.start_span(f"mmubus {name}", kind=self._trace.SpanKind.CLIENT)
        answer.add_done_callback(lambda _: span.end())
        return self.parent_of(span)

    def handle(self, traceparent: str, name: str) -> Any:
        """Handlers begin to work on a notice that a traced call has caused. Returns: a span, to be ended with them."""
        parent = self._propagator.extract({KEY: traceparent})
        return self._tracer.start_span(f"mmubus handle {name}", parent, kind=self._trace.SpanKind.CONSUMER)

    def parent_of(self, span: Any) -> str:
        """A span's W3C traceparent; "" when it is not recorded."""
        context = span.get_span_context()
        if not context.is_valid or not context.trace_flags.sampled:
            return ""
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
