"""Does a server that is connected to, registered with, cancelled and left over and over keep anything?

    python tests/robust/measure_cycles.py 10000

The growth of our server's memory from a warm start is compared with that of a bare grpc.aio server, which has the same
streams with the same messages and does nothing with what they say: what it leaks is upstream's. Two figures: what the
allocator has given out and not got back, which is what a leak is, and what is resident, which is that and what lies
between. Both are looked at when free pages have been given back to the system.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import grpc.aio
from mmu.v1 import address_space_pb2, address_space_pb2_grpc, session_pb2, session_pb2_grpc, types_pb2

HERE = os.path.abspath(__file__)
WARM = 1000
GRACE_S = 0.2
SETTLE_S = 20.0
"""Before memory is looked at: grpc keeps the timers of a connection (a ping each 10 s, given 5 s) until they go off."""
GROWTH_MAX = 1 << 20
OPS = [types_pb2.NOTIFIER_OP_INVALIDATE_RANGE]


# The servers, each in a process of its own: every line on standard input is answered by how it stands.


async def serve_ours(address: str, settle_s: float) -> None:
    from mmubusd.rpc import EmbeddedServer

    async with EmbeddedServer(listen=(address,), frames_nr=1 << 12, log_level="error", grace_s=GRACE_S) as server:
        await _answer(lambda: len(server.server.bus.sessions), settle_s)


async def serve_bare(address: str, settle_s: float) -> None:
    async def attach(_: object, context: grpc.aio.ServicerContext) -> None:
        answers: asyncio.Queue[bytes] = asyncio.Queue()

        async def write() -> None:
            while True:
                await context.write(await answers.get())

        context.peer(), context.invocation_metadata()
        async with asyncio.TaskGroup() as group:  # a reader and a writer, as ours
            writer = group.create_task(write())
            while isinstance(data := await context.read(), bytes):
                message = session_pb2.AttachRequest.FromString(data)
                answers.put_nowait(session_pb2.AttachResponse(request=message.request).SerializeToString())
            writer.cancel()

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(attach)
    table = grpc.method_handlers_generic_handler("mmu.v1.SessionService", {"Attach": handler})
    server.add_generic_rpc_handlers((table,))
    server.add_insecure_port(address)
    await server.start()
    await _answer(lambda: 0, settle_s)


class Mallinfo2(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def in_use() -> int:
    """Bytes that malloc has given out, of all arenas and by mmap. Free pages go back to the system first."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    libc.malloc_trim(0)
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


async def _answer(sessions: Callable[[], int], settle_s: float) -> None:
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        if not line.strip():
            break
        gc.collect()
        await asyncio.sleep(settle_s)
        state = {"in_use": in_use(), "tasks": len(asyncio.all_tasks()), "sessions": sessions()}
        state["resident"] = int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # noqa: ASYNC240
        print(json.dumps(state), flush=True)


# The driver.


async def cycle(address: str, mm: int) -> None:
    """Connect, say Hello, register, cancel, disconnect."""
    channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
    call = session_pb2_grpc.SessionServiceStub(channel).Attach()
    await call.write(session_pb2.AttachRequest(hello=session_pb2.Hello(name="cycle", version=1)))
    await call.read()
    await call.write(session_pb2.AttachRequest(request=1, register=session_pb2.Register(mm=mm, ops=OPS)))
    await call.read()
    call.cancel()
    await channel.close()


async def drive(kind: str, cycles: int, settle_s: float = SETTLE_S) -> dict[str, int]:
    """Returns: how much more the server has after so many cycles than after it was warm."""
    with tempfile.TemporaryDirectory() as directory:
        address = f"unix:{directory}/s"
        command = [sys.executable, HERE, kind, address, str(settle_s)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:  # noqa: ASYNC220
            assert server.stdin is not None
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"

            def ask() -> dict[str, int]:
                server.stdin.write("how\n")
                server.stdin.flush()
                return json.loads(server.stdout.readline())

            mm = 0
            if kind == "ours":
                async with grpc.aio.insecure_channel(address) as channel:
                    spaces = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
                    mm = (await spaces.Create(address_space_pb2.CreateRequest(name="cycles"))).mm
            for _ in range(WARM):
                await cycle(address, mm)
            before = await asyncio.to_thread(ask)
            for _ in range(cycles):
                await cycle(address, mm)
            after = await asyncio.to_thread(ask)
            server.stdin.close()
            server.kill()
    return {key: after[key] - before[key] for key in after}


def main() -> int:
    if len(sys.argv) == 4:
        serve = serve_ours if sys.argv[1] == "ours" else serve_bare
        asyncio.run(serve(sys.argv[2], float(sys.argv[3])))
        return 0
    cycles = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    bare = asyncio.run(drive("bare", cycles))
    ours = asyncio.run(drive("ours", cycles))
    print(f"{cycles} cycles: {ours['tasks']} tasks left, {ours['sessions']} more sessions remembered")
    failed = ours["tasks"] > 0 or ours["sessions"] > 0
    for figure in ("in_use", "resident"):
        beyond = ours[figure] - bare[figure]
        mine, theirs = ours[figure] / 1024, bare[figure] / 1024
        print(
            f"{figure.replace('_', ' '):<8} ours {mine:.0f} KiB, bare grpc.aio {theirs:.0f} KiB: "
            f"{beyond / 1024:.0f} KiB beyond, {beyond / cycles:.0f} bytes a cycle"
        )
        failed |= beyond > GROWTH_MAX
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
