"""What the client library itself costs from a notice to its acknowledgement, and what a round trip costs with it.

    python tests/benchmarks/bench_client.py

The first table is CPU alone: bytes of a NoticeBatch in, bytes of an Acknowledge out, without a network. The second
has a bare grpc.aio server in another process, which sends a batch and waits for its acknowledgement; beside it, the
same server with a client that does nothing but read and write, which is the floor.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable
from typing import Any, cast

import mmubus
import uvloop
from mmu.v1 import session_pb2 as pb
from mmu.v1 import session_pb2_grpc, types_pb2
from mmubus.acks import AckWindow
from mmubus.channel import grpc, open_channel
from mmubus.dispatch import Dispatcher
from mmubus.registration import Registration, Spec

RANGE = types_pb2.NOTIFIER_OP_INVALIDATE_RANGE
ROUND_TRIPS = 2000


class Plain(mmubus.Notifier):
    """Does nothing: what is measured is the library."""

    def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
        pass


class Async(mmubus.Notifier):
    """The same, as a coroutine."""

    async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
        pass


def batch_of(first_seq: int, count: int) -> bytes:
    """A batch of disjoint ranges, as bytes."""
    notices = [pb.Notice(op=RANGE, mm=5, start=at << 20, end=(at << 20) + 4096, round=at) for at in range(count)]
    batch = pb.NoticeBatch(first_seq=first_seq, notices=notices, targets=[1] * count, target_counts=[1] * count)
    return pb.AttachResponse(notices=batch).SerializeToString()


async def library_us(notifier: mmubus.Notifier, count: int, repeats: int) -> float:
    """Microseconds of CPU a notice, from bytes to bytes."""
    acks = AckWindow()
    registration = Registration(cast(Any, None), notifier, Spec(5, 0, 0, False, 0.0, "", 0))
    registration.begin(1, ())
    dispatcher = Dispatcher(acks, {1: registration}, lambda: None)
    batches = [batch_of(1 + count * number, count) for number in range(repeats)]
    began = time.process_time()
    for data in batches:
        response = pb.AttachResponse.FromString(data)
        dispatcher.deliver(response.notices)
        while acks.through < acks.received:  # noqa: ASYNC110 - one turn of the loop for the tasks
            await asyncio.sleep(0)
        acknowledge = acks.take()
        pb.AttachRequest(acknowledge=acknowledge).SerializeToString()
    return (time.process_time() - began) / (repeats * count) * 1e6


class PingServer(session_pb2_grpc.SessionServiceServicer):
    """Welcomes, registers, then sends batches and times their acknowledgements; prints the result, ends the stream."""

    async def Attach(self, requests: Any, context: Any) -> None:  # type: ignore[override]
        count = int((await context.read()).hello.name)
        welcome = pb.Welcome(session=1, token="t", epoch=1, ack_budget_s=60, lease_s=60, grace_s=1)
        await context.write(pb.AttachResponse(welcome=welcome))
        request = (await context.read()).request
        await context.write(pb.AttachResponse(request=request, registered=pb.Registered(registration=1)))
        took = []
        for number in range(ROUND_TRIPS):
            response = pb.AttachResponse.FromString(batch_of(1 + number * count, count))
            began = time.perf_counter()
            await context.write(response)
            while (await context.read()).acknowledge.through < (number + 1) * count:
                pass
            took.append((time.perf_counter() - began) * 1e6)
        # In the name of an address space that nobody has, the client is told what was measured.
        took = sorted(took[ROUND_TRIPS // 10 :])
        figures = f"{statistics.median(took):.0f} {took[len(took) * 99 // 100]:.0f}"
        await context.write(pb.AttachResponse(fenced=pb.Fenced(message=figures)))


async def serve(address: str) -> None:
    """Serve until the process is ended."""
    server = grpc.aio.server()
    session_pb2_grpc.add_SessionServiceServicer_to_server(PingServer(), server)
    server.add_insecure_port(address)
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


async def with_library(address: str, notifier: mmubus.Notifier, count: int) -> str:
    """Round trips through the library. Returns: "p50 p99" in microseconds."""
    told = asyncio.get_running_loop().create_future()
    async with mmubus.connect(address, name=str(count), on_fenced=told.set_result) as bus:
        await bus.register(notifier, 5)
        return (await told).message


async def with_nothing(address: str, count: int) -> str:
    """Round trips through a loop that only reads and writes: the floor."""
    channel = open_channel(address)
    call = cast(Any, session_pb2_grpc.SessionServiceStub(channel)).Attach()
    await call.write(pb.AttachRequest(hello=pb.Hello(name=str(count))))
    await call.read()
    await call.write(pb.AttachRequest(request=1, register=pb.Register()))
    await call.read()
    while not (response := await call.read()).HasField("fenced"):
        batch = response.notices
        through = batch.first_seq + len(batch.notices) - 1
        await call.write(pb.AttachRequest(acknowledge=pb.Acknowledge(through=through)))
    call.cancel()
    await channel.close()
    return str(response.fenced.message)


async def main() -> None:
    """Print both tables."""
    print("library alone, us a notice (bytes in, bytes out)")
    for name, notifier in (("plain", Plain()), ("async", Async())):
        for count in (1, 16, 256):
            best = min([await library_us(notifier, count, 20_000 // count) for _ in range(3)])
            print(f"  {name:6} batch of {count:3}: {best:6.2f}")
    with tempfile.TemporaryDirectory() as directory:
        address = f"unix:{directory}/bench.sock"
        server = subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        assert server.stdout is not None
        server.stdout.readline()
        try:
            print("round trip over a Unix socket, us: p50 p99")
            for count in (1, 16):
                ways: dict[str, Callable[[], Awaitable[str]]] = {
                    "floor": lambda count=count: with_nothing(address, count),  # type: ignore[misc]
                    "plain": lambda count=count: with_library(address, Plain(), count),  # type: ignore[misc]
                    "async": lambda count=count: with_library(address, Async(), count),  # type: ignore[misc]
                }
                for name, way in ways.items():
                    print(f"  {name:6} batch of {count:3}: {await way()}")
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    uvloop.run(serve(sys.argv[1]) if len(sys.argv) > 1 else main())
