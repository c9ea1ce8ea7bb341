"""What metrics and traces cost: rounds a second with them and without, in one run.

    python tests/benchmarks/bench_observability.py [--apart] [--turns N] [--rounds N] [--sampled N]

One load runs all the time: a program that pipelines mmap, write and munmap, a notifier that answers each round. One
call in --sampled carries a sampled traceparent, whether anybody looks at it or not. The server changes what it does
from block to block:

    off        no metrics are scraped, traces are off
    metrics    /metrics is scraped once in each block, in its middle: with 1000 rounds a block and 5000 a second that is
               75 times as often as Prometheus does by default
    traces     traces are on: sampled calls become spans, which the SDK batches for an exporter that drops them
    both

A turn is off, mode, mode, off (or the other way round, by lot): what else the machine does, and whatever changes
steadily, meets both alike. Its ratio is that of the rounds of its two halves; told is the median over the turns, with
the interval that holds the median of 95 in 100 resamples. Every block has its scrape and its share of sampled calls,
so the median hides no cost that comes seldom.

Program, notifier and server are in this one process, and what is compared is rounds for a second of its processor
time: nobody else's work on the machine is in it, and how many rounds come together does not depend on who runs when.
With --apart they are processes of their own, and rounds a second are compared as well; that needs an idle machine.
Then the server's share of all processor time is told, by which the cost of the first kind is to be divided.

Prints one JSON object. `cost` is 1 - ratio; the promise is that it is under 0.05.
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
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from mmubusd.rpc import EmbeddedServer

import grpc.aio  # isort: skip
import psutil
import uvloop
from mmu.v1 import address_space_pb2 as pb
from mmu.v1 import session_pb2, types_pb2
from mmubusd.rpc.collector import calm_collector
from mmubusd.rpc.tracing import Tracing
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

PAGE = 4096
BASE = 0x7000_0000_0000
ARENAS = 32
WINDOW = 4
MODES = ("metrics", "traces", "both")
WARM_ROUNDS = 5000
RESAMPLES = 2000
STALLED_S = 30


async def play(role: str, address: str, sampled: int, registered: Callable[[], None]) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        await (notifier(channel, registered) if role == "notifier" else program(channel, sampled))


async def notifier(channel: grpc.aio.Channel, registered: Callable[[], None]) -> None:
    call = channel.stream_stream("/mmu.v1.SessionService/Attach")()
    ops = [types_pb2.NOTIFIER_OP_INVALIDATE_RANGE, types_pb2.NOTIFIER_OP_RELEASE]
    for message in (
        session_pb2.AttachRequest(hello=session_pb2.Hello(version=1, name="bench", lease_s=300)),
        session_pb2.AttachRequest(request=1, register=session_pb2.Register(mm=1, ops=ops)),
    ):
        await call.write(message.SerializeToString())
        await call.read()
    registered()
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
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: bench\r\n\r\n")
    assert b"mmubus_rounds_total" in await reader.read()
    writer.close()


@dataclass(frozen=True, slots=True)
class Block:
    """What was done in one block: rounds, in so much time, with so much of the server's processor."""

    rounds: int
    wall_s: float
    cpu_s: float

    def __add__(self, other: Block) -> Block:
        return Block(self.rounds + other.rounds, self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)


async def block(server: EmbeddedServer, mode: str, tracing: Tracing, rounds: int) -> Block:
    driver = server.server.driver
    driver.tracing = tracing if mode in ("traces", "both") else None
    assert server.server.metrics is not None
    counters = driver.bus.counters
    counted, began, used = counters.rounds, time.perf_counter(), time.process_time()

    async def until(done: int) -> None:
        async with asyncio.timeout(STALLED_S):
            while counters.rounds - counted < done:  # noqa: ASYNC110 - others do it
                await asyncio.sleep(0.002)

    await until(rounds // 2)
    if mode in ("metrics", "both"):
        await scrape(server.server.metrics.address)
    await until(rounds)
    return Block(counters.rounds - counted, time.perf_counter() - began, time.process_time() - used)


async def turn(server: EmbeddedServer, mode: str, tracing: Tracing, rounds: int) -> tuple[Block, Block]:
    """Off and the mode, interleaved. Returns: what was done in each."""
    order = random.choice((("off", mode, mode, "off"), (mode, "off", "off", mode)))
    done = [(one, await block(server, one, tracing, rounds)) for one in order]
    off, on = ([each for one, each in done if (one == "off") is wanted] for wanted in (True, False))
    return off[0] + off[1], on[0] + on[1]


def told(ratios: list[float]) -> dict[str, object]:
    """The median, and the interval of the medians of resamples."""
    chance = random.Random(1)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    low, high = medians[RESAMPLES * 25 // 1000], medians[RESAMPLES * 975 // 1000]
    middle = statistics.median(ratios)
    return {
        "ratio": round(middle, 3),
        "interval": [round(low, 3), round(high, 3)],
        "cost": round(1 - middle, 3),
    }


Share = Callable[[], float]
"""The server's share of all processor time since this was last asked."""


@asynccontextmanager
async def together(server: EmbeddedServer, sampled: int) -> AsyncIterator[Share]:
    """Notifier and program in this process and on this loop."""
    registered = asyncio.Event()
    tasks = [asyncio.ensure_future(play("notifier", server.address, sampled, registered.set))]
    await registered.wait()
    tasks.append(asyncio.ensure_future(play("program", server.address, sampled, registered.set)))
    try:
        yield lambda: float("nan")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def apart(server: EmbeddedServer, sampled: int) -> AsyncIterator[Share]:
    """Notifier and program in processes of their own."""
    clients = [client("notifier", server.address, sampled)]
    before = [0.0, 0.0]

    def share() -> float:
        used = [time.process_time(), sum(sum(psutil.Process(each.pid).cpu_times()[:2]) for each in clients)]
        mine, theirs = (now - then for now, then in zip(used, before, strict=True))
        before[:] = used
        return mine / (mine + theirs)

    try:
        assert clients[0].stdout is not None
        assert await asyncio.to_thread(clients[0].stdout.readline) == b"registered\n"
        clients.append(client("program", server.address, sampled))
        yield share
    finally:
        for each in clients:
            each.kill()
            each.wait()


def client(role: str, address: str, sampled: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--role", role, address, str(sampled)], stdout=subprocess.PIPE)


async def measure(options: argparse.Namespace) -> dict[str, object]:
    exporter, provider = Dropping(), TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    found: dict[str, list[tuple[Block, Block]]] = {mode: [] for mode in MODES}
    listen = ("127.0.0.1:0",)
    async with EmbeddedServer(metrics_listen="127.0.0.1:0", listen=listen, ack_budget_s=30.0) as server:
        server.server.memory.create_mm("bench")
        tracing = Tracing(server.server.bus, provider)
        async with (apart if options.apart else together)(server, options.sampled) as share:
            while server.server.bus.counters.rounds < WARM_ROUNDS:  # noqa: ASYNC110 - others do it
                await asyncio.sleep(0.1)
            share()
            calm_collector()  # as a server in a process of its own does
            for _ in range(options.turns):
                for mode in random.sample(MODES, len(MODES)):
                    found[mode].append(await turn(server, mode, tracing, options.rounds))
            servers = share()
    provider.shutdown()
    walls: dict[str, object] = {
        "rounds_per_s_to_off": {
            mode: told([(b.rounds / b.wall_s) / (a.rounds / a.wall_s) for a, b in turns])
            for mode, turns in found.items()
        },
        "server_share_of_processor_time": round(servers, 2),
    }
    off = [before for turns in found.values() for before, _ in turns]
    return {
        "rounds_per_s": {
            "off": round(statistics.median(each.rounds / each.wall_s for each in off)),
            **{
                mode: round(statistics.median(each.rounds / each.wall_s for _, each in turns))
                for mode, turns in found.items()
            },
        },
        **(walls if options.apart else {}),
        "rounds_per_cpu_s_to_off": {
            mode: told([(b.rounds / b.cpu_s) / (a.rounds / a.cpu_s) for a, b in turns]) for mode, turns in found.items()
        },
        "sampled": f"1 call in {options.sampled}",
        "spans": exporter.spans,
        "turns": options.turns,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--sampled", type=int, default=1000)
    parser.add_argument("--role", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        role, address, sampled = options.role
        uvloop.run(play(role, address, int(sampled), lambda: print("registered", flush=True)))
        return
    print(json.dumps(uvloop.run(measure(options)), indent=2))


if __name__ == "__main__":
    main()
