"""OpenTelemetry spans of traced calls and devices' requests: the operation, its rounds, each acknowledgement in them.

    client's call                                  (its process)
      └─ munmap(0x7f…, 0x1000) of mm 3             the operation; an event says how many frames were freed
           ├─ round invalidate_range
           │    ├─ ack gpu-0                       from the round's beginning to that session's last acknowledgement
           │    └─ ack nic-1
           └─ handle invalidate_range              (the notified clients' processes)
    driver's request                               (its process)
      └─ fault(0x7f…, 0x7f…) of gpu-0                the same: its rounds, frames taken or freed

Only calls that come with a sampled traceparent are followed: the client decides, and a call without one costs one look.
A followed operation's generator is wrapped; nothing in the rooms below is changed or slowed for it. The official
interceptor is not used: on grpc.aio it breaks streams, and one span an hour-long stream says nothing.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from mmubusd.mm.notification import Notification
from mmubusd.notify import Bus
from mmubusd.notify.round import Round
from mmubusd.rpc.methods import Context

__all__ = ["KEY", "Tracing", "TracingUnavailable", "traceparent_of"]

T = TypeVar("T")

KEY = "traceparent"
SAMPLED = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f][13579bdf]")
ROUNDS_MAX = 64
"""Rounds of one operation that are told in its trace; a walk over many places may have thousands."""


class TracingUnavailable(Exception):
    """Traces are asked for and OpenTelemetry is not there."""


def traceparent_of(context: Context) -> str:
    """The traceparent in a call's metadata, or ""."""
    for key, value in context.invocation_metadata() or ():
        if key == KEY:
            return value if isinstance(value, str) else value.decode("latin-1")
    return ""


class Tracing:
    """Follows operations.

    Args: provider: an OpenTelemetry TracerProvider; None: the process's own, or one that exports by OTLP.
    """

    def __init__(self, bus: Bus, provider: Any = None) -> None:
        """Raises: TracingUnavailable."""
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise TracingUnavailable("traces: OpenTelemetry is not installed; pip install 'mmubus[otel]'") from error
        self._bus = bus
        self.now: Callable[[], float] = time.monotonic  # the driver's
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._own = None if provider is not None else _exporting_provider()
        self._tracer = (provider or self._own or trace.get_tracer_provider()).get_tracer("mmubusd")

    def close(self) -> None:
        """Export what has been recorded."""
        if self._own is not None:
            self._own.shutdown()

    def follow(self, work: Generator[Any, Any, T], traceparent: str, label: str) -> Generator[Any, Any, T]:
        """The same operation, with a trace of it when its call is sampled."""
        if not SAMPLED.fullmatch(traceparent):
            return work
        return self._followed(work, traceparent, label)

    def following(self, traceparent: str, label: str) -> Callable[[Generator[Any, Any, T]], Generator[Any, Any, T]]:
        """`follow` of an operation that is made later."""
        return lambda work: self.follow(work, traceparent, label)

    def _followed(self, work: Generator[Any, Any, T], traceparent: str, label: str) -> Generator[Any, Any, T]:
        parent = self._propagator.extract({KEY: traceparent})
        span = self._tracer.start_span(label, parent, kind=self._trace.SpanKind.SERVER)
        told: list[Round] = []
        frames = self._bus.memory.frames
        free_before = frames.free_nr
        try:
            result = yield from self._watch(work, span, told)
        except Exception as error:
            span.set_attribute("mmubus.error", str(getattr(error, "errno", type(error).__name__)))
            span.set_status(self._trace.StatusCode.ERROR)
            raise
        else:
            return result
        finally:
            # What others did meanwhile is in the difference too, where this operation had to wait for anybody.
            freed = frames.free_nr - free_before
            span.add_event(
                "frames freed" if freed >= 0 else "frames taken",
                {"mmubus.frames": abs(freed), "mmubus.quarantined": frames.quarantine_nr},
            )
            for one in told:
                self._tell(one, span)
            span.end()

    def _watch(self, work: Generator[Any, Any, T], span: Any, told: list[Round]) -> Generator[Any, Any, T]:
        """Pass everything through; see to it that each round is watched from its beginning."""
        loop = asyncio.get_running_loop()
        parent = self._parent_of(span)
        answer: Any = None
        thrown: BaseException | None = None
        while True:
            try:
                wanted = work.send(answer) if thrown is None else work.throw(thrown)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if isinstance(wanted, Notification) and len(told) < ROUNDS_MAX:
                # The round is opened when this has been yielded, and nobody can answer it before the loop's next turn.
                loop.call_soon(self._mark, wanted, parent, told)
            answer = thrown = None
            try:
                answer = yield wanted
            except GeneratorExit:
                work.close()
                raise
            except BaseException as error:
                thrown = error

    def _mark(self, notification: object, traceparent: str, told: list[Round]) -> None:
        for one in reversed(self._bus.rounds.open.values()):
            if one.notification is notification:
                one.traceparent = traceparent
                told.append(one)
                return

    def _tell(self, one: Round, parent: Any) -> None:
        """A round that has ended, and who answered when; the bus's clock is turned into the world's."""
        ends_at = one.ended_at or self._bus.clock(self.now())
        offset_ns = self._offset_ns()

        def world(clock: float) -> int:
            return offset_ns + int(clock * 1e9)

        context = self._trace.set_span_in_context(parent)
        span = self._tracer.start_span(f"round {one.kind.value}", context, start_time=world(one.opened_at))
        span.set_attributes(
            {"mmubus.round": one.id, "mmubus.mm": one.mm, "mmubus.start": one.start, "mmubus.end": one.end,
             "mmubus.notices": one.notices_nr}
        )  # fmt: skip
        within = self._trace.set_span_in_context(span)
        for session, at, _ in one.answered:
            ack = self._tracer.start_span(f"ack {session.name}", within, start_time=world(one.opened_at))
            ack.set_attribute("mmubus.session", session.id)
            ack.end(world(at))
        span.end(world(ends_at))

    def _offset_ns(self) -> int:
        """How far the world's clock is ahead of the bus's: by the quickest of three looks, as looking takes time."""

        def look() -> tuple[float, int]:
            before = self.now()
            world_ns = time.time_ns()
            return self.now() - before, world_ns - int(self._bus.clock(before) * 1e9)

        return min(look() for _ in range(3))[1]

    def _parent_of(self, span: Any) -> str:
        context = span.get_span_context()
        if not context.is_valid or not context.trace_flags.sampled:
            return ""
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


def _exporting_provider() -> Any:
    """A provider that exports by OTLP as the OTEL_ variables say. Raises: TracingUnavailable."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingUnavailable("traces: no exporter is installed; pip install 'mmubus[otel]'") from error
    provider = TracerProvider(resource=Resource.create({"service.name": "mmubusd"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
