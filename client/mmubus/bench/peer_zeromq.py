"""ZeroMQ: a ROUTER that gathers answers of DEALERs, with pyzmq's asyncio sockets. No broker stands between them.

Best settings: ipc transport (a Unix socket), no high-water marks, so nothing is dropped, one socket a process. A
process that stands for k responders gets k messages a round and answers each.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from mmubus.bench.brokers import missing
from mmubus.bench.rounds import Rounds
from mmubus.bench.system import System
from mmubus.bench.worker import serve

__all__ = ["SYSTEM"]

NUMBER_BYTES = 8
REST = b"n" * 32


def _socket(kind: str) -> Any:
    import zmq
    import zmq.asyncio

    made = zmq.asyncio.Context.instance().socket(getattr(zmq, kind))
    made.set_hwm(0)
    made.linger = 0
    return made


async def owner(address: str) -> None:
    """The role that asks."""
    router = _socket("ROUTER")
    ipc = f"ipc://{address.removeprefix('unix:')}"
    router.bind(ipc)
    holding: dict[bytes, int] = {}
    targets: list[bytes] = []

    async def send(number: int) -> None:
        notice = number.to_bytes(NUMBER_BYTES, "little") + REST
        for target in targets:
            await router.send_multipart((target, notice))

    async def read() -> None:
        while True:
            sender, data = await router.recv_multipart()
            if data.startswith(b"hold"):
                holding[sender] = int(data[4:])
                await router.send_multipart((sender, b"held"))
            else:
                rounds.answered(int.from_bytes(data, "little"))

    async def expect(responders: int, streams: int) -> None:
        rounds.expected = responders
        targets[:] = [sender for sender, count in holding.items() for _ in range(count)]
        assert len(targets) == responders

    rounds = Rounds(send)
    reader = asyncio.ensure_future(read())
    await serve({"expect": expect, "gather": rounds.gather, "pipelined": rounds.pipelined}, ipc)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    router.close()


async def responders(address: str) -> None:
    """The role that answers."""
    dealer = _socket("DEALER")
    dealer.identity = b"%d" % os.getpid()
    dealer.connect(address)
    held = asyncio.Event()

    async def read() -> None:
        while True:
            data = await dealer.recv()
            if data == b"held":
                held.set()
            else:
                await dealer.send(data[:NUMBER_BYTES])

    async def hold(count: int, streams: int) -> None:
        held.clear()
        await dealer.send(b"hold%d" % count)
        await held.wait()

    reader = asyncio.ensure_future(read())
    await serve({"hold": hold})
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    dealer.close()


SYSTEM = System(
    "ZeroMQ asyncio",
    f"{__name__}:owner",
    f"{__name__}:responders",
    missing=lambda: missing("", "", "zmq:pyzmq"),
)
