"""One client that does not read its stream, over the wire: what the server's process keeps for it stays small.

    python tests/robust/measure_unread_served.py 1000000

The server is a process, the client another one's connection, which says Hello, registers, and never reads. Producers
unmap pages over a pipelined stream, as many at a time as are let in; each waits for the client. Then a million more
notices are raised, of the kind that waits for nobody who is overloaded: the server asks itself about the age of pages,
as its reclaim does. Its resident memory is looked at all the while. Then the client reads, once.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc.aio
from mmu.v1 import address_space_pb2, address_space_pb2_grpc, session_pb2, session_pb2_grpc, types_pb2

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure_unread import AT, GROWTH_MAX, IN_FLIGHT, PAGE, RANGES_MAX, ages

OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
OPS = [types_pb2.NOTIFIER_OP_INVALIDATE_RANGE, types_pb2.NOTIFIER_OP_AGE_PAGE]
MAP_FIXED_ANONYMOUS_PRIVATE = 0x32
FILL = 16 * IN_FLIGHT
"""Notices after which the stream, the client's window and the outbox are full, and nobody is asked any more."""
CHUNK = 500
"""Notices between two turns of the server's loop."""


@dataclass(frozen=True, slots=True)
class Unread:
    """What the server says. raised: notices since it was asked; waiting: merged ranges; grown: bytes, at the most."""

    raised: int
    waiting: int
    grown: int


# The server's process.


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def serve(address: str) -> None:
    """Each number on standard input: raise so many notices, and say what became of them."""
    from mmubusd.rpc import EmbeddedServer

    options = {"ack_budget_s": 600.0, "ack_budget_max_s": 600.0, "lease_s": 300.0, "operations_max": IN_FLIGHT}
    async with EmbeddedServer(listen=(address,), frames_nr=1 << 14, log_level="error", **options) as embedded:
        print("ready", flush=True)
        loop = asyncio.get_running_loop()
        while (line := await loop.run_in_executor(None, sys.stdin.readline)).strip():
            while len(embedded.server.bus.running) < IN_FLIGHT:  # noqa: ASYNC110 - the producers come
                await asyncio.sleep(0.01)
            print(json.dumps(asdict(await flood(embedded.server, int(line)))), flush=True)


async def flood(server: object, notices: int) -> Unread:
    """Raise so many notices for the only session."""
    bus, driver = server.bus, server.driver  # type: ignore[attr-defined]
    (session,) = bus.sessions.values()
    (mm,) = server.memory.mms.values()  # type: ignore[attr-defined]
    gc.collect()
    first, before, most = session.notices_nr, resident(), 0
    while (raised := session.notices_nr - first) < notices:
        for page in range(raised, raised + CHUNK):
            driver.submit(bus.start, ages(mm, page), then=lambda _: None)
        await asyncio.sleep(0)
        most = max(most, resident() - before)
    return Unread(raised, session.outbox.unread_nr, most)


# The driver.


class Producer:
    """Unmaps over a pipelined stream, each with a thread of its own."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._spaces = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
        self.mm = 0

    async def begin(self) -> None:
        self.mm = (await self._spaces.Create(address_space_pb2.CreateRequest(name="program"))).mm
        length = IN_FLIGHT * 2 * PAGE
        await self._spaces.Mmap(
            address_space_pb2.MmapRequest(mm=self.mm, addr=AT, length=length, prot=3, flags=MAP_FIXED_ANONYMOUS_PRIVATE)
        )

    async def run(self) -> None:
        """Returns when all have ended."""
        stream = self._spaces.Operate()
        calls = [
            address_space_pb2.Call(
                id=at + 1, thread=at + 1, op=address_space_pb2.OP_MUNMAP, mm=self.mm, args=(AT + at * 2 * PAGE, PAGE)
            )
            for at in range(IN_FLIGHT)
        ]
        await stream.write(address_space_pb2.OperateRequest(calls=calls))
        await stream.done_writing()
        ended = 0
        while isinstance(message := await stream.read(), address_space_pb2.OperateResponse):
            assert not any(result.HasField("error") for result in message.results)
            ended += len(message.results)
        assert ended == IN_FLIGHT


class Deaf:
    """A client that registers, and then does not read until it is told to."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stream = session_pb2_grpc.SessionServiceStub(channel).Attach()
        self.read_nr = 0

    async def attach(self, mm: int) -> None:
        await self._stream.write(session_pb2.AttachRequest(hello=session_pb2.Hello(name="deaf", version=1)))
        await self._stream.read()
        await self._stream.write(session_pb2.AttachRequest(request=1, register=session_pb2.Register(mm=mm, ops=OPS)))
        await self._stream.read()

    async def catch_up(self) -> None:
        """Read and acknowledge all there is. Ends by cancellation."""
        while isinstance(message := await self._stream.read(), session_pb2.AttachResponse):
            if message.HasField("notices"):
                self.read_nr += len(message.notices.notices)
                through = message.notices.first_seq + len(message.notices.notices) - 1
                await self._stream.write(
                    session_pb2.AttachRequest(acknowledge=session_pb2.Acknowledge(through=through))
                )


async def measure(notices: int) -> tuple[Unread, Unread, int, float]:
    """Returns: what the server said of filling up, and of all the rest; notices of the one read, and its seconds."""
    with tempfile.TemporaryDirectory() as directory:
        address = f"unix:{directory}/s"
        command = [sys.executable, __file__, address]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: ASYNC220
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

            def ask(count: int) -> Unread:
                process.stdin.write(f"{count}\n")
                process.stdin.flush()
                return Unread(**json.loads(process.stdout.readline()))

            async with (
                grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as cpu,
                grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel,
            ):
                producer, client = Producer(cpu), Deaf(channel)
                await producer.begin()
                await client.attach(producer.mm)
                producing = asyncio.create_task(producer.run())
                filled = await asyncio.to_thread(ask, FILL)
                flooded = await asyncio.to_thread(ask, notices)
                assert not producing.done(), "the client has not read anything"
                began = time.perf_counter()
                reading = asyncio.create_task(client.catch_up())
                await producing
                taken = time.perf_counter() - began
                reading.cancel()
            process.stdin.close()
            process.kill()
    return filled, flooded, client.read_nr, taken


def main() -> int:
    notices = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    filled, flooded, read, seconds = asyncio.run(measure(notices))
    print(f"filling up: {filled.raised:,} notices, {filled.grown / 1024:,.0f} KiB with the operations that wait")
    print(
        f"{flooded.raised:,} notices more, unread: {flooded.waiting:,} merged ranges wait, "
        f"the server's process grew by {flooded.grown / 1024:,.0f} KiB"
    )
    print(f"then one client read {read:,} notices, and all was over within {seconds * 1e3:,.0f} ms")
    return int(flooded.waiting > RANGES_MAX or flooded.grown > GROWTH_MAX)


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].isdecimal():
        asyncio.run(serve(sys.argv[1]))
    else:
        sys.exit(main())
