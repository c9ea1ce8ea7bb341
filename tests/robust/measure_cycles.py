"""Does a server that is connected to, registered with, cancelled and left over and over keep anything?

    python tests/robust/measure_cycles.py 10000

The growth of our server's memory from a warm start is compared with that of a bare grpc.aio server, which does the same
with its streams and nothing with what they say: what it leaks is upstream's.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile

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


async def _answer(sessions: object, settle_s: float) -> None:
    import gc

    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        if not line.strip():
            break
        gc.collect()
        await asyncio.sleep(settle_s)
        pages = int(open("/proc/self/statm").read().split()[1])  # noqa: ASYNC230, SIM115
        state = {"rss": pages * 4096, "tasks": len(asyncio.all_tasks()), "sessions": sessions()}  # type: ignore[operator]
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
    beyond = ours["rss"] - bare["rss"]
    print(f"{cycles} cycles: {ours['tasks']} tasks left, {ours['sessions']} more sessions remembered")
    print(
        f"memory: ours {ours['rss'] / 1024:.0f} KiB, bare grpc.aio {bare['rss'] / 1024:.0f} KiB: "
        f"{beyond / 1024:.0f} KiB beyond"
    )
    return int(beyond > GROWTH_MAX or ours["tasks"] > 0)


if __name__ == "__main__":
    sys.exit(main())
