"""A trace from a client's call through the round and the acknowledgements to the freed frames."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import grpc.aio
import mmubus
import pytest
from mmu.v1 import address_space_pb2, address_space_pb2_grpc
from mmubusd.rpc import EmbeddedServer
from mmubusd.rpc.tracing import Tracing
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PAGE = 4096


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Everything that client and server record, without touching the process's own provider."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", lambda name, *_: provider.get_tracer(name))
    exporter.provider = provider  # type: ignore[attr-defined]
    return exporter


@pytest.fixture
async def traced(server: EmbeddedServer, spans: InMemorySpanExporter) -> EmbeddedServer:
    server.server.driver.tracing = Tracing(server.server.bus, spans.provider)  # type: ignore[attr-defined]
    return server


class Driver(mmubus.Notifier):
    """Answers a little later."""

    async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
        await asyncio.sleep(0.01)


def named(spans: InMemorySpanExporter, *starts: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name.startswith(starts)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("pipelined", [False, True])
async def test_one_trace_from_the_call_to_the_frames(traced: EmbeddedServer, spans, pipelined: bool) -> None:
    async with (
        mmubus.connect(traced.address, traces=True) as program,
        mmubus.connect(traced.address, name="gpu-0", traces=True) as gpu,
        mmubus.connect(traced.address, name="nic-1", traces=True) as nic,
    ):
        mm = await program.create_mm()
        start = await mm.mmap(0, 4 * PAGE)
        await mm.store(start, b"x" * 4 * PAGE)
        for bus in (gpu, nic):
            await bus.register(Driver(), mm)
        spans.clear()
        if pipelined:
            async with program.operations(mm=mm.id) as operations:
                await operations.run(mmubus.Op.MUNMAP, start, 4 * PAGE)
        else:
            await mm.munmap(start, 4 * PAGE)
        await asyncio.sleep(0.05)
    (call,) = named(spans, "mmubus Munmap", "mmubus munmap")
    (operation,) = named(spans, "munmap(")
    (round_,) = named(spans, "round ")
    acks, handled = named(spans, "ack "), named(spans, "mmubus handle ")
    assert {span.context.trace_id for span in (call, operation, round_, *acks, *handled)} == {call.context.trace_id}
    assert operation.parent.span_id == call.context.span_id
    assert round_.parent.span_id == operation.context.span_id
    assert {span.name for span in acks} == {"ack gpu-0", "ack nic-1"}
    assert {span.parent.span_id for span in acks} == {round_.context.span_id}
    assert {span.parent.span_id for span in handled} == {operation.context.span_id}
    assert len(handled) == 2
    (freed,) = [event for event in operation.events if event.name == "frames freed"]
    assert freed.attributes["mmubus.frames"] >= 4
    for ack in acks:
        assert round_.start_time <= ack.start_time <= ack.end_time <= round_.end_time + 1_000_000
        assert ack.end_time - ack.start_time > 9_000_000
    assert operation.start_time - 5_000_000 <= round_.start_time <= round_.end_time <= operation.end_time + 5_000_000


@pytest.mark.parametrize(
    "parent", ["", "nonsense", PARENT[:-1] + "0", "ff" + PARENT[2:], PARENT + "-x", "00-" + "0" * 31 + "-x-01"]
)
async def test_what_is_not_sampled_is_not_followed(traced: EmbeddedServer, spans, parent: str) -> None:
    def work() -> object:
        return 7
        yield

    tracing = traced.server.driver.tracing
    generator = work()
    assert tracing.follow(generator, parent, "x") is generator


async def test_errors_and_closing_pass_through(traced: EmbeddedServer, spans) -> None:
    def fails() -> object:
        raise KeyError("x")
        yield

    tracing = traced.server.driver.tracing
    with pytest.raises(KeyError):
        next(tracing.follow(fails(), PARENT, "fails"))
    (span,) = named(spans, "fails")
    assert not span.status.is_ok
    closed = []

    def waits() -> object:
        try:
            yield 1
        finally:
            closed.append(True)

    followed = tracing.follow(waits(), PARENT, "waits")
    assert next(followed) == 1
    followed.close()
    assert closed == [True]
    assert named(spans, "waits")


async def test_nothing_is_recorded_unless_asked(server: EmbeddedServer, spans) -> None:
    async with mmubus.connect(server.address) as bus:
        await (await bus.create_mm()).exit()
    assert spans.get_finished_spans() == ()


async def test_a_server_exports_by_otlp(tmp_path: Path) -> None:
    """The whole way with a collector: what `traces = true` does in a server of its own."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    posted: list[str] = []

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length")
        )
        await reader.readexactly(length)
        posted.append(head.split()[1])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    collector = await asyncio.start_server(collect, "127.0.0.1", 0)
    port = collector.sockets[0].getsockname()[1]
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import sys; from mmubusd.rpc import main; sys.exit(main())", "--traces",
        "--listen", f"unix:{tmp_path}/s.sock", "--frames-nr", "64", stdout=-1, stderr=-1, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().split()[-1]
    async with grpc.aio.insecure_channel(address) as channel:
        stub = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
        mm = (await stub.Create(address_space_pb2.CreateRequest())).mm
        await stub.Brk(address_space_pb2.BrkRequest(mm=mm), metadata=(("traceparent", PARENT),))
    process.terminate()
    _, logged = await asyncio.wait_for(process.communicate(), 20)
    collector.close()
    assert process.returncode == 0, logged.decode()
    assert posted == ["/v1/traces"]
