"""The service's own speed: one round against a raw byte ping-pong, and the operation stream.

    python tests/benchmarks/bench_rpc.py [--rounds N] [--operations N] [--profile]

The server runs in this process, the client in another. Blocks of rounds and of ping-pongs alternate, on the same kind
of socket with the same transport settings, so that the ratio means something on a busy machine. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from mmubusd.rpc import EmbeddedServer, transport

import grpc.aio  # isort: skip
import uvloop
from mmu.v1 import address_space_pb2 as pb
from mmu.v1 import session_pb2, types_pb2
from mmubusd.mm.notification import Answer, InvalidateRange, Reason

PAGE = 4096
BASE = 0x7000_0000_0000
BLOCKS = 6
BATCH = 120
WINDOW = 6
ARENAS = 30


# The client's process.


async def play_client(role: str, address: str, count: int) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        await {"pong": pong, "acks": acks, "operate": operate}[role](channel, count)


async def pong(channel: grpc.aio.Channel, count: int) -> None:
    call = channel.stream_stream("/bench/Ping")()
    await call.write(b"go")
    while await call.read() is not grpc.aio.EOF:
        await call.write(b"\x32\x02\x08\x01")


async def acks(channel: grpc.aio.Channel, count: int) -> None:
    call = channel.stream_stream("/mmu.v1.SessionService/Attach")()
    ops = [types_pb2.NOTIFIER_OP_INVALIDATE_RANGE, types_pb2.NOTIFIER_OP_RELEASE]
    for message in (
        session_pb2.AttachRequest(hello=session_pb2.Hello(version=1, name="bench", lease_s=300)),
        session_pb2.AttachRequest(register=session_pb2.Register(mm=1, ops=ops)),
    ):
        await call.write(message.SerializeToString())
        await call.read()
    while (data := await call.read()) is not grpc.aio.EOF:
        batch = session_pb2.AttachResponse.FromString(data).notices
        if batch.notices:
            through = batch.first_seq + len(batch.notices) - 1
            ack = session_pb2.AttachRequest(acknowledge=session_pb2.Acknowledge(through=through))
            await call.write(ack.SerializeToString())


async def operate(channel: grpc.aio.Channel, count: int) -> None:
    batch = pb.OperateRequest()
    for n in range(BATCH // 3):
        addr = BASE + (n % ARENAS) * (1 << 30)
        for op, args in (
            (pb.OP_MMAP, [addr, 4 * PAGE, 3, 0x32, 0, 0]),
            (pb.OP_WRITE, [addr, 4 * PAGE]),
            (pb.OP_MUNMAP, [addr, 4 * PAGE]),
        ):
            batch.calls.add(id=1, thread=n % ARENAS, op=op, mm=1, args=args)
    data = batch.SerializeToString()
    call = channel.stream_stream("/mmu.v1.AddressSpaceService/Operate")()
    window = asyncio.Semaphore(WINDOW)
    answered = failed = 0

    async def read() -> None:
        nonlocal answered, failed
        released = 0
        while (got := await call.read()) is not grpc.aio.EOF:
            results = pb.OperateResponse.FromString(got).results
            answered += len(results)
            failed += sum(result.HasField("error") for result in results)
            while released < answered // BATCH:
                released += 1
                window.release()

    reading = asyncio.ensure_future(read())
    began = time.perf_counter()
    for _ in range(count // BATCH):
        await window.acquire()
        await call.write(data)
    await call.done_writing()
    await reading
    seconds = time.perf_counter() - began
    print(json.dumps({"operations": answered, "failed": failed, "per_s": answered / seconds}), flush=True)


# The server's process.


class Raw:
    """A bare grpc.aio server: bytes down, bytes up."""

    def __init__(self) -> None:
        self.connected = asyncio.Event()
        self.turn: asyncio.Queue[tuple[int, asyncio.Future[list[float]]]] = asyncio.Queue()
        self.server = grpc.aio.server(options=transport.server_options(4 << 20))
        handler = grpc.stream_stream_rpc_method_handler(self.ping)
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", {"Ping": handler}),))

    async def ping(self, _: object, context: grpc.aio.ServicerContext) -> None:
        await context.read()
        self.connected.set()
        payload = b"n" * 40
        while True:
            count, done = await self.turn.get()
            took = []
            for _ in range(count):
                began = time.perf_counter()
                await context.write(payload)
                await context.read()
                took.append(time.perf_counter() - began)
            done.set_result(took)

    async def block(self, count: int) -> list[float]:
        done: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self.turn.put_nowait((count, done))
        return await done


def client(role: str, address: str, count: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--role", role, address, str(count)], stdout=subprocess.PIPE)


async def rounds(server: EmbeddedServer, count: int) -> list[float]:
    """Operations that do nothing but notify, one at a time."""
    driver, mm = server.server.driver, server.server.memory.mms[1]

    def notify() -> Iterator[InvalidateRange]:
        answer: Answer = yield InvalidateRange(mm, BASE, BASE + PAGE, Reason.CLEAR)
        assert answer is not None

    took = []
    for _ in range(count):
        began = time.perf_counter()
        await driver.run(driver.bus.start, notify(), label="bench")
        took.append(time.perf_counter() - began)
    return took


async def measure(options: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as directory:
        raw = Raw()
        raw_address = f"unix:{directory}/raw.sock"
        raw.server.add_insecure_port(raw_address)
        await raw.server.start()
        ours: list[float] = []
        theirs: list[float] = []
        async with EmbeddedServer() as server:
            server.server.memory.create_mm("bench")
            clients = [client("pong", raw_address, 0), client("acks", server.address, 0)]
            await raw.connected.wait()
            while not server.server.memory.mms[1].notified:  # noqa: ASYNC110 - another process does it
                await asyncio.sleep(0.05)
            await raw.block(200)
            await rounds(server, 200)
            profile = cProfile.Profile()
            for _ in range(BLOCKS):
                theirs.append(statistics.median(await raw.block(options.rounds // BLOCKS)))
                if options.profile == "rounds":
                    profile.enable()
                ours.append(statistics.median(await rounds(server, options.rounds // BLOCKS)))
                profile.disable()
            for each in clients:
                each.kill()
                each.wait()
        await raw.server.stop(0)
        async with EmbeddedServer() as server:
            server.server.memory.create_mm("bench")
            driving = client("operate", server.address, options.operations)
            cpu = time.process_time()
            if options.profile == "operate":
                profile.enable()
            out, _ = await asyncio.to_thread(driving.communicate)
            profile.disable()
            cpu = time.process_time() - cpu
        operated = json.loads(out)
        if options.profile:
            pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(40)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "round_us_p50": round(statistics.median(ours) * 1e6, 1),
        "ping_pong_us_p50": round(statistics.median(theirs) * 1e6, 1),
        "ratio": round(ratio, 3),
        "operations_per_s": round(operated["per_s"]),
        "operations_failed": operated["failed"],
        "server_cpu_us_per_operation": round(cpu / operated["operations"] * 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6000)
    parser.add_argument("--operations", type=int, default=60_000)
    parser.add_argument("--profile", choices=["rounds", "operate"])
    parser.add_argument("--role", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        uvloop.run(play_client(options.role[0], options.role[1], int(options.role[2])))
        return
    print(json.dumps(uvloop.run(measure(options)), indent=2))


if __name__ == "__main__":
    main()
