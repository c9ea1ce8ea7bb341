"""The floor of our transport: raw bytes over grpc.aio streams, with mmubus's own channel and server options.

`gather` writes one message to each stream and reads one answer: with one stream that is the ping-pong. `pipelined`
does what can be done at best: what is ready for a stream goes out as one message, and one answer acknowledges all of
it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from mmubus.bench.doors import server_options
from mmubus.bench.rounds import Rounds
from mmubus.bench.system import System
from mmubus.bench.worker import serve
from mmubus.channel import grpc, open_channel

__all__ = ["SYSTEM", "SYSTEM_TCP"]

METHOD = "/bench.Floor/Pipe"
NUMBER_BYTES = 8
REST = b"n" * 32
NOTICE_BYTES = NUMBER_BYTES + len(REST)
Context = grpc.aio.ServicerContext[bytes, bytes]

SYSTEM = System("raw grpc.aio bytes", f"{__name__}:owner", f"{__name__}:responders")
SYSTEM_TCP = System("raw grpc.aio bytes, TCP", f"{__name__}:owner", f"{__name__}:responders", transport="tcp")


class _Lane:
    """One stream in pipelined operation: what waits to be sent, and what has been acknowledged."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.pending: list[bytes] = []
        self.acked = 0
        self.wake: asyncio.Future[None] | None = None


class _Owner:
    """The streams, and rounds over all of them."""

    def __init__(self) -> None:
        self.streams: list[Context] = []

    async def pipe(self, requests: object, context: Context) -> None:
        """One responder's stream: idle here, used by the commands."""
        await context.read()
        self.streams.append(context)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.streams.remove(context)

    async def expect(self, responders: int, streams: int) -> None:
        """The command: wait for so many streams; however many responders share one, it gets one message."""
        while len(self.streams) != streams:  # noqa: ASYNC110 - before anything is timed
            await asyncio.sleep(0.01)

    async def gather(self, rounds: int) -> list[float]:
        """The command: one message to each stream, one answer from each. Returns: µs of each round."""
        message = (0).to_bytes(NUMBER_BYTES, "little") + REST
        took = []

        async def one(context: Context) -> None:
            await context.write(message)
            await context.read()

        for _ in range(rounds):
            begun = time.perf_counter()
            if len(self.streams) == 1:
                await one(self.streams[0])
            else:
                await asyncio.gather(*map(one, self.streams))
            took.append((time.perf_counter() - begun) * 1e6)
        return took

    async def pipelined(self, rounds: int, in_flight: int) -> float:
        """The command. Returns: rounds a second."""
        return await _Flight(self.streams).run(rounds, in_flight)


class _Flight:
    """One pipelined run. Every round is begun, told, acknowledged and counted for itself; only messages are shared."""

    def __init__(self, contexts: Sequence[Context]) -> None:
        self._lanes = [_Lane(context) for context in contexts]
        self._rounds = Rounds(self._send)
        self._rounds.expected = len(self._lanes)
        self._over = False

    async def run(self, rounds: int, in_flight: int) -> float:
        writers = [asyncio.ensure_future(self._write(lane)) for lane in self._lanes]
        readers = [asyncio.ensure_future(self._read(lane, rounds)) for lane in self._lanes]
        rate = await self._rounds.pipelined(rounds, in_flight)
        self._over = True
        for lane in self._lanes:
            self._wake(lane)
        await asyncio.gather(*readers, *writers)
        return rate

    async def _send(self, number: int) -> None:
        """A round's notice, encoded once, to every stream."""
        notice = number.to_bytes(NUMBER_BYTES, "little") + REST
        for lane in self._lanes:
            lane.pending.append(notice)
            self._wake(lane)

    def _wake(self, lane: _Lane) -> None:
        if lane.wake is not None:
            lane.wake.set_result(None)
            lane.wake = None

    async def _write(self, lane: _Lane) -> None:
        loop = asyncio.get_running_loop()
        while not self._over:
            if not lane.pending:
                lane.wake = loop.create_future()
                await lane.wake
                continue
            notices, lane.pending = lane.pending, []
            await lane.context.write(b"".join(notices))

    async def _read(self, lane: _Lane, rounds: int) -> None:
        while lane.acked < rounds:
            data = await lane.context.read()
            assert isinstance(data, bytes)
            before, lane.acked = lane.acked, int.from_bytes(data, "little")
            for number in range(before + 1, lane.acked + 1):
                self._rounds.answered(number)


async def owner(address: str) -> None:
    """The role that tells and counts: the server."""
    state = _Owner()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(state.pipe)
    server = grpc.aio.server(options=server_options())
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Floor", {"Pipe": handler}),))
    bound = server.add_insecure_port(address)
    await server.start()
    ready = address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{bound}"
    await serve({"expect": state.expect, "gather": state.gather, "pipelined": state.pipelined}, ready)
    await server.stop(0)


async def responders(address: str) -> None:
    """The role that answers: a client."""
    calls: list[tuple[grpc.aio.StreamStreamCall[bytes, bytes], asyncio.Task[None]]] = []

    async def answer(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        try:
            while isinstance(data := await call.read(), bytes):
                # Each notice is looked at, as a client must; the last number acknowledges all of them.
                numbers = [
                    int.from_bytes(data[at : at + NUMBER_BYTES], "little") for at in range(0, len(data), NOTICE_BYTES)
                ]
                await call.write(numbers[-1].to_bytes(NUMBER_BYTES, "little"))
        except grpc.aio.AioRpcError:
            return  # hold() has ended it

    async def hold(count: int, streams: int) -> None:
        for call, task in calls:
            call.cancel()
            await asyncio.gather(task, return_exceptions=True)
        calls.clear()
        for _ in range(streams):
            opened: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(METHOD)()
            await opened.write(b"hello")
            calls.append((opened, asyncio.ensure_future(answer(opened))))

    async with open_channel(address) as channel:
        await serve({"hold": hold})
        for call, _task in calls:
            call.cancel()
