"""What metrics and traces cost: rounds a second with them and without, in one run.

    python tests/benchmarks/bench_observability.py [--blocks N] [--block-s S] [--sampled N]

One load runs all the time: a program's process that pipelines mmap, write and munmap, a notifier's process that answers
each round. One call in --sampled carries a sampled traceparent, whether anybody looks at it or not. The server, in
this process, changes what it does every --block-s seconds, in a new order each turn, so that what else the machine does
meets all of them alike:

    off        no metrics are scraped, traces are off
    metrics    /metrics is scraped every half a second: thirty times as often as Prometheus does by default
    traces     traces are on: sampled calls become spans, which the SDK batches for an exporter that drops them
    both

Prints one JSON object: rounds a second, each one's ratio to `off` (the median over the turns), and the same of the
server's processor time a round, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time

from mmubusd.rpc import EmbeddedServer

import grpc.aio  # isort: skip
import uvloop
from mmu.v1 import address_space_pb2 as pb
from mmu.v1 import session_pb2, types_pb2
from mmubusd.rpc.tracing import Tracing
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

PAGE = 4096
BASE = 0x7000_0000_0000
ARENAS = 32
WINDOW = 4
MODES = ("off", "metrics", "traces", "both")
SCRAPE_S = 0.5
WARM_ROUNDS = 5000
ROUNDS_MIN = 200
"""Of a block, however long that takes: on a busy machine the clients may not run for a while."""
STALLED_S = 30


async def play(role: str, address: str, sampled: int) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        await (notifier(channel) if role == "notifier" else program(channel, sampled))


async def notifier(channel: grpc.aio.Channel) -> None:
    call = channel.stream_stream("/mmu.v1.SessionService/Attach")()
    ops = [types_pb2.NOTIFIER_OP_INVALIDATE_RANGE, types_pb2.NOTIFIER_OP_RELEASE]
    for message in (
        session_pb2.AttachRequest(hello=session_pb2.Hello(version=1, name="bench", lease_s=300)),
        session_pb2.AttachRequest(request=1, register=session_pb2.Register(mm=1, ops=ops)),
    ):
        await call.write(message.SerializeToString())
        await call.read()
    print("registered", flush=True)
    while (data := await call.read()) is not grpc.aio.EOF:
        batch = session_pb2.AttachResponse.FromString(data).notices
        if batch.notices:
            through = batch.first_seq + len(batch.notices) - 1
            ack = session_pb2.AttachRequest(acknowledge=session_pb2.Acknowledge(through=through))
            await call.write(ack.SerializeToString())


def batches(sampled: int) -> list[bytes]:
    """Messages to be sent again and again; one call in `sampled` is traced."""
    made, number = [], 1
    for _ in range(max(1, -(-sampled // (3 * ARENAS)))):
        batch = pb.OperateRequest()  # 3 calls an arena: of any three numbers in a row one is that of a munmap
        for arena in range(ARENAS):
            addr = BASE + arena * (1 << 30)
            for op, args in (
                (pb.OP_MMAP, [addr, 4 * PAGE, 3, 0x32, 0, 0]),
                (pb.OP_WRITE, [addr, 4 * PAGE]),
                (pb.OP_MUNMAP, [addr, 4 * PAGE]),
            ):
                number += 1
                traced = op == pb.OP_MUNMAP and number % sampled < 3  # every third call is one
                parent = f"00-{random.getrandbits(128) | 1:032x}-{random.getrandbits(64) | 1:016x}-01" if traced else ""
                batch.calls.add(id=1, thread=arena, op=op, mm=1, args=args, traceparent=parent)
        made.append(batch.SerializeToString())
    return made


async def program(channel: grpc.aio.Channel, sampled: int) -> None:
    data = batches(sampled)
    call = channel.stream_stream("/mmu.v1.AddressSpaceService/Operate")()
    window = asyncio.Semaphore(WINDOW)

    async def read() -> None:
        answered = released = 0
        while (got := await call.read()) is not grpc.aio.EOF:
            answered += len(pb.OperateResponse.FromString(got).results)
            while released < answered // (3 * ARENAS):
                released += 1
                window.release()

    reading = asyncio.ensure_future(read())
    at = 0
    while not reading.done():
        await window.acquire()
        await call.write(data[at % len(data)])
        at += 1


class Dropping(SpanExporter):
    """Takes spans and counts them."""

    def __init__(self) -> None:
        self.spans = 0

    def export(self, spans: object) -> SpanExportResult:
        self.spans += len(spans)  # type: ignore[arg-type]
        return SpanExportResult.SUCCESS


async def scrape(address: str) -> None:
    host, _, port = address.rpartition(":")
    while True:
        await asyncio.sleep(SCRAPE_S / 2)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: bench\r\n\r\n")
        assert b"mmubus_rounds_total" in await reader.read()
        writer.close()
        await asyncio.sleep(SCRAPE_S / 2)


async def block(server: EmbeddedServer, mode: str, tracing: Tracing, seconds: float) -> tuple[float, float]:
    """Rounds a second in one mode, and rounds a second of the server's processor."""
    driver = server.server.driver
    driver.tracing = tracing if mode in ("traces", "both") else None
    assert server.server.metrics is not None
    scraping = asyncio.ensure_future(scrape(server.server.metrics.address)) if mode in ("metrics", "both") else None
    await asyncio.sleep(seconds / 10)
    counted, began, used = driver.bus.counters.rounds, time.perf_counter(), time.process_time()
    await asyncio.sleep(seconds)
    async with asyncio.timeout(STALLED_S):
        while driver.bus.counters.rounds - counted < ROUNDS_MIN:  # noqa: ASYNC110 - other processes do it
            await asyncio.sleep(0.01)
    rounds = driver.bus.counters.rounds - counted
    per_s, per_cpu_s = rounds / (time.perf_counter() - began), rounds / (time.process_time() - used)
    if scraping is not None:
        scraping.cancel()
    return per_s, per_cpu_s


def client(role: str, address: str, sampled: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--role", role, address, str(sampled)], stdout=subprocess.PIPE)


async def measure(options: argparse.Namespace) -> dict[str, object]:
    exporter, provider = Dropping(), TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    async with EmbeddedServer(metrics_listen="127.0.0.1:0", listen=("127.0.0.1:0",)) as server:
        server.server.memory.create_mm("bench")
        tracing = Tracing(server.server.bus, provider)
        clients = [client("notifier", server.address, options.sampled)]
        try:
            assert clients[0].stdout is not None
            assert await asyncio.to_thread(clients[0].stdout.readline) == b"registered\n"
            clients.append(client("program", server.address, options.sampled))
            while server.server.bus.counters.rounds < WARM_ROUNDS:  # noqa: ASYNC110 - other processes do it
                await asyncio.sleep(0.1)
            for _ in range(options.blocks):
                for mode in random.sample(MODES, len(MODES)):
                    found[mode].append(await block(server, mode, tracing, options.block_s))
        finally:
            for each in clients:
                each.kill()
                each.wait()
    provider.shutdown()

    def ratios(which: int) -> dict[str, float]:
        return {
            mode: round(
                statistics.median(a[which] / b[which] for a, b in zip(found[mode], found["off"], strict=True)), 3
            )
            for mode in MODES[1:]
        }

    def together(mode: str) -> float:
        return sum(per_s for per_s, _ in found[mode])

    return {
        "rounds_per_s": {mode: round(statistics.median(a for a, _ in values)) for mode, values in found.items()},
        "ratio_to_off": ratios(0),
        "ratio_to_off_all_turns_together": {mode: round(together(mode) / together("off"), 3) for mode in MODES[1:]},
        "ratio_to_off_by_cpu": ratios(1),
        "sampled": f"1 call in {options.sampled}",
        "spans": exporter.spans,
        "turns": options.blocks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--block-s", type=float, default=0.5)
    parser.add_argument("--sampled", type=int, default=1000)
    parser.add_argument("--role", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        uvloop.run(play(options.role[0], options.role[1], int(options.role[2])))
        return
    print(json.dumps(uvloop.run(measure(options)), indent=2))


if __name__ == "__main__":
    main()
