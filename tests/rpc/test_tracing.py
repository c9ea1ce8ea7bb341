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
from patience import LIMIT_S, until

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
        await until(lambda: len(named(spans, "mmubus handle ")) == 2)  # the clients' own spans end last
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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("unary", [False, True])
async def test_requests_of_devices_are_traced(traced: EmbeddedServer, spans, unary: bool) -> None:
    """A fault that breaks copy-on-write: its trace has the round, and who let go of the old frame."""
    async with (
        mmubus.connect(traced.address, name="program") as program,
        mmubus.connect(traced.address, name="gpu-0", traces=True) as gpu,
        mmubus.connect(traced.address, name="nic-1", traces=True) as nic,
    ):
        gpu.access._only_unary = unary
        mm = await program.create_mm()
        start = await mm.mmap(0, 4 * PAGE)
        await mm.store(start, b"x" * 4 * PAGE)
        child = await mm.fork()
        driver = await gpu.register(Driver(), mm)
        await nic.register(Driver(), mm)
        spans.clear()
        await driver.fault(start, start + PAGE, write=True)
        pin = await driver.pin(start, start + PAGE)
        assert await pin.read(0, 1) == b"x"
        await pin.unpin()
        await child.exit()
        await until(lambda: len(named(spans, "mmubus handle ")) == 2)  # the other client's own span ends last
    calls = {
        span.name.removeprefix("mmubus ").lower(): span for span in named(spans, "mmubus ") if "handle" not in span.name
    }
    assert set(calls) == ({"fault", "pin", "dmaread", "unpin"} if unary else {"fault", "pin", "dma_read", "unpin"})
    (operation,) = named(spans, "fault(")
    assert operation.name == f"fault({start:#x}, {start + PAGE:#x}) of gpu-0"
    assert operation.parent.span_id == calls["fault"].context.span_id
    (round_,) = named(spans, "round ")
    acks, handled = named(spans, "ack "), named(spans, "mmubus handle ")
    assert {span.context.trace_id for span in (operation, round_, *acks, *handled)} == {calls["fault"].context.trace_id}
    assert round_.parent.span_id == operation.context.span_id
    assert {span.name for span in acks} == {"ack gpu-0", "ack nic-1"}
    (taken,) = operation.events
    assert (taken.name, taken.attributes["mmubus.frames"]) == ("frames taken", 1)
    for name in ("pin(", "dma_read(", "unpin("):
        (span,) = named(spans, name)
        assert span.name.endswith(" of gpu-0")
        assert span.parent.span_id == calls[name[:-1] if not unary else name[:-1].replace("_", "")].context.span_id


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
async def test_a_request_that_fails_is_told_in_its_trace(traced: EmbeddedServer, spans) -> None:
    async with mmubus.connect(traced.address, name="gpu-0", traces=True) as gpu:
        mm = await gpu.create_mm()
        driver = await gpu.register(Driver(), mm)
        with pytest.raises(mmubus.MmError):
            await driver.fault(0x1000_0000, 0x1000_1000)
    (span,) = named(spans, "fault(")
    assert not span.status.is_ok
    assert span.attributes["mmubus.error"] == "EFAULT"


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
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    posted: dict[str, bytes] = {}

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length")
        )
        posted[head.split()[1]] = await reader.readexactly(length)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(collect, "127.0.0.1", 0) as collector:
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
        _, logged = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 0, logged.decode()
    (sent,) = ExportTraceServiceRequest.FromString(posted["/v1/traces"]).resource_spans
    assert {one.key: one.value.string_value for one in sent.resource.attributes}["service.name"] == "mmubusd"
    (span,) = sent.scope_spans[0].spans
    assert span.name == f"brk(0x0) of mm {mm}"
    assert f"00-{span.trace_id.hex()}-{span.parent_span_id.hex()}-01" == PARENT
