"""The floor below gRPC: messages of fixed size over plain sockets, uvloop's protocols, no framing, no tasks."""

from __future__ import annotations

import asyncio
from typing import cast

from mmubus.bench.rounds import Rounds
from mmubus.bench.system import System
from mmubus.bench.worker import serve

__all__ = ["SYSTEM"]

NOTICE_BYTES, ACK_BYTES = 40, 8

SYSTEM = System("raw uvloop TCP", f"{__name__}:owner", f"{__name__}:responders", transport="tcp")


class _Owner(asyncio.Protocol):
    """One responder's process, as the owner sees it. An answer is the round's number."""

    def __init__(self, rounds: Rounds, transports: set[asyncio.Transport]) -> None:
        self._rounds = rounds
        self._transports = transports
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but does not say so
        self._transports.add(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transports.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        whole = len(data) - len(data) % ACK_BYTES
        for at in range(0, whole, ACK_BYTES):
            self._rounds.answered(int.from_bytes(data[at : at + ACK_BYTES], "little"))
        self._rest = data[whole:]


class _Responder(asyncio.Protocol):
    """Answers every notice with its number."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but does not say so
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        whole = len(data) - len(data) % NOTICE_BYTES
        self._transport.write(b"".join(data[at : at + ACK_BYTES] for at in range(0, whole, NOTICE_BYTES)))
        self._rest = data[whole:]


async def owner(address: str) -> None:
    """The role that tells and counts."""
    transports: set[asyncio.Transport] = set()

    async def send(number: int) -> None:
        notice = number.to_bytes(ACK_BYTES, "little").ljust(NOTICE_BYTES, b"n")
        for transport in transports:
            transport.write(notice)

    async def expect(responders: int, streams: int) -> None:
        while len(transports) != streams:  # noqa: ASYNC110 - before anything is timed
            await asyncio.sleep(0.01)
        rounds.expected = streams

    rounds = Rounds(send)
    host, _, port = address.rpartition(":")
    server = await asyncio.get_running_loop().create_server(lambda: _Owner(rounds, transports), host, int(port))
    bound = server.sockets[0].getsockname()[1]
    await serve({"expect": expect, "gather": rounds.gather, "pipelined": rounds.pipelined}, f"{host}:{bound}")


async def responders(address: str) -> None:
    """The role that answers."""
    loop = asyncio.get_running_loop()
    host, _, port = address.rpartition(":")
    open_now: list[asyncio.BaseTransport] = []

    async def hold(count: int, streams: int) -> None:
        while open_now:
            open_now.pop().close()
        for _ in range(streams):
            transport, _protocol = await loop.create_connection(_Responder, host, int(port))
            open_now.append(transport)

    await serve({"hold": hold})
