"""Real processes that misbehave: a server, and clients that can be stopped, killed, deaf or dumb.

A client process carries several sessions, each on a connection of its own and registered on one address space. It
speaks the bare contract, so that it can do what the client library would never do:

| kind | what it does |
|---|---|
| good | acknowledges at once |
| mute | reads, sends heartbeats, and never acknowledges |
| deaf | never reads again after it has registered |
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc.aio
from mmu.v1 import address_space_pb2, address_space_pb2_grpc, session_pb2, session_pb2_grpc, types_pb2

PAGE = 4096
BASE = 0x7000_0000_0000
MAP_FIXED_ANONYMOUS_PRIVATE = 0x32
COMMAND = (sys.executable, "-c", "import sys; from mmubus.cli import main; sys.exit(main())")
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
OPS = [types_pb2.NOTIFIER_OP_INVALIDATE_RANGE, types_pb2.NOTIFIER_OP_RELEASE]


@contextmanager
def server(address: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own."""
    command = [*COMMAND, "serve", "--listen", address, "--log-level", "error", "--ack-budget-min-s", "0.01", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), line
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)


@contextmanager
def clients(
    address: str, kind: str, mms: Sequence[int], *, budget_s: float, before: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A client process with one session for each address space; ready when this returns.

    Args: before: a command to run it with, as `ip netns exec NAME`.
    """
    told = json.dumps({"address": address, "kind": kind, "mms": list(mms), "budget_s": budget_s})
    command = [*before, sys.executable, __file__, told]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()
            process.wait(20)


class Cpu:
    """The CPU's side: address spaces, and unmaps that are timed."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=OWN_CONNECTION)
        self.spaces = address_space_pb2_grpc.AddressSpaceServiceStub(self._channel)
        self._next: dict[int, int] = {}

    async def space(self, pages: int) -> int:
        """An address space with so many pages that are there."""
        mm = (await self.spaces.Create(address_space_pb2.CreateRequest(name="robust"))).mm
        request = address_space_pb2.MmapRequest(
            mm=mm, addr=BASE, length=pages * PAGE, prot=3, flags=MAP_FIXED_ANONYMOUS_PRIVATE
        )
        await self.spaces.Mmap(request)
        return int(mm)

    async def unmap(self, mm: int) -> float:
        """Unmap one page more. Returns: seconds."""
        page = self._next.get(mm, 0)
        self._next[mm] = page + 1
        began = time.perf_counter()
        await self.spaces.Munmap(address_space_pb2.MunmapRequest(mm=mm, addr=BASE + page * PAGE, length=PAGE))
        return time.perf_counter() - began

    async def close(self) -> None:
        await self._channel.close()


# The client process.


async def _session(address: str, kind: str, mm: int, budget_s: float, ready: asyncio.Semaphore) -> None:
    async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
        call = session_pb2_grpc.SessionServiceStub(channel).Attach()
        process = f"{os.getpid()}@{os.stat('/proc/self/ns/pid').st_ino}"
        hello = session_pb2.Hello(name=f"{kind} {mm}", version=1, ack_budget_s=budget_s, process=process)
        await call.write(session_pb2.AttachRequest(hello=hello))
        await call.read()
        await call.write(session_pb2.AttachRequest(request=1, register=session_pb2.Register(mm=mm, ops=OPS)))
        await call.read()
        ready.release()
        if kind == "deaf":
            await asyncio.sleep(3600)
        one = asyncio.Lock()  # grpc.aio takes one write at a time
        beat = asyncio.create_task(_beat(call, one))
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                break
            if kind == "good" and message.WhichOneof("message") == "notices":
                through = message.notices.first_seq + len(message.notices.notices) - 1
                acknowledge = session_pb2.Acknowledge(through=through)
                async with one:
                    await call.write(session_pb2.AttachRequest(acknowledge=acknowledge))
        beat.cancel()


async def _beat(call: grpc.aio.StreamStreamCall, one: asyncio.Lock) -> None:
    while True:
        await asyncio.sleep(1.0)
        try:
            async with one:
                await call.write(session_pb2.AttachRequest(heartbeat=session_pb2.Heartbeat()))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return


async def _main(told: dict[str, object]) -> None:
    ready = asyncio.Semaphore(0)
    mms = told["mms"]
    assert isinstance(mms, list)
    tasks = [
        asyncio.create_task(_session(str(told["address"]), str(told["kind"]), mm, float(str(told["budget_s"])), ready))
        for mm in mms
    ]
    for _ in tasks:
        await ready.acquire()
    print("ready", flush=True)
    for ended in asyncio.as_completed(tasks):
        try:
            await ended
        except grpc.aio.AioRpcError as error:  # fenced, or the server has gone; anything else is a mistake of ours
            print(error.details(), file=sys.stderr)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("server", "client", "gen")]
    asyncio.run(_main(json.loads(sys.argv[1])))
