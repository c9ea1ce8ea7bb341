"""A pipelined stream of requests: what is ready goes out together, answers come in the order in which they end.

    requests ──take──► stream or lane ──► server ──► stream or lane ──receive──► answers

On the server's machine a lane is asked for when the stream begins, and used from the first moment on at which no
request is under way: so requests arrive in the order in which they were made. Through gRPC each of the four ends of a
request and its answer wakes a task; on the lane none does but the one that asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from mmubus.channel import grpc
from mmubus.errors import MmuBusError, ProtocolError
from mmubus.lane import LANE_TIMEOUT_S, Lane

__all__ = ["Metadata", "Pipeline"]

Metadata = list[tuple[str, str]]
A = TypeVar("A", bound=Message)

OPENING_S = 0.05
"""How long the first request waits for the lane: then it goes without."""

WANTED = ("mmubus-lane", "1")
PATH_KEY, SECRET_KEY = "mmubus-lane-path", "mmubus-lane-secret-bin"


class Pipeline(Generic[A]):
    """One stream, from its beginning to its end.

    Args:
        begin: makes the call, given what to add to its metadata.
        answer: the type of the messages that come.
        take: takes the next message to send and says how many requests are in it; None when there is none.
        receive: takes a message that has come. Returns: how many answers are in it.
        ended: called once when the stream is over: with the error that ended it, None when the server did without one.
        lane: whether to ask for a lane.
    Attributes: on_lane: whether requests go by a lane; open_nr: how many were sent and are not answered.
    """

    def __init__(
        self,
        begin: Callable[[Metadata], Any],
        answer: type[A],
        take: Callable[[], tuple[Message, int] | None],
        receive: Callable[[A], int],
        ended: Callable[[grpc.aio.AioRpcError | MmuBusError | None], None],
        *,
        lane: bool,
    ) -> None:
        self._call = begin([WANTED] if lane else [])
        self._answer = answer
        self._take = take
        self._receive = receive
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self.open_nr = 0
        self._lane: Lane | None = None
        self._closing = self._over = False
        self._wrong: ProtocolError | None = None
        self._writer_waits: asyncio.Future[None] | None = None
        self.on_lane = False
        self._opening = asyncio.create_task(self._open_lane()) if lane else None
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    async def opened(self) -> None:
        """Before the first request: wait until it is known whether there is a lane, for OPENING_S at most."""
        if self._opening is not None:
            await asyncio.wait([self._opening], timeout=OPENING_S)

    def wake(self) -> None:
        """There is something to send: what is ready when the loop comes round goes out together."""
        if self._lane is not None and (self.on_lane or self._change_over()):
            self._lane.wake()
        else:
            self._wake_writer()

    async def close(self) -> None:
        """Send nothing more, and wait for the stream's end. Requires: everything has been answered, or `cancel`."""
        self._closing = True
        self._wake_writer()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cancel(self) -> None:
        """End it now. Idempotent."""
        self._call.cancel()
        if self._opening is not None:
            self._opening.cancel()

    # The lane.

    async def _open_lane(self) -> None:
        """Learn from the stream's initial metadata where it is, and connect."""
        try:
            found = dict(await self._call.initial_metadata() or ())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the stream is over; the reader learns why
        path, secret = found.get(PATH_KEY), found.get(SECRET_KEY)
        if isinstance(path, str) and isinstance(secret, bytes):
            lane = await Lane.open(path, secret, self._take_bytes, self._lane_ended, LANE_TIMEOUT_S)
            if lane is None or self._over or self._closing:
                if lane is not None:
                    lane.close()
                return
            self._lane = lane
            lane.start(self._hear)
            if self._change_over():
                lane.wake()  # for what the writer would have taken

    def _change_over(self) -> bool:
        """Use the lane from now on, unless something is under way on the stream."""
        if not self.open_nr and not self._closing:
            self.on_lane = True
        return self.on_lane

    def _take_bytes(self) -> bytes:
        taken = self._take() if self.on_lane else None
        if taken is None:
            return b""
        message, requests_nr = taken
        self.open_nr += requests_nr
        return message.SerializeToString()

    def _hear(self, data: bytes) -> None:
        self.open_nr -= self._receive(self._answer.FromString(data))

    def _lane_ended(self, wrong: ProtocolError | None) -> None:
        """The stream ends with it, and says why, if the server did not do wrong."""
        self._lane, self._wrong = None, wrong
        if wrong is not None:
            self._call.cancel()
        elif not self._over and not self._closing:
            self._loop.call_later(LANE_TIMEOUT_S, self._call.cancel)

    # The stream.

    def _wake_writer(self) -> None:
        if self._writer_waits is not None:
            waiting, self._writer_waits = self._writer_waits, None
            if not waiting.done():
                waiting.set_result(None)

    async def _write(self) -> None:
        while not self._over:
            taken = None if self.on_lane else self._take()
            if taken is not None:
                message, requests_nr = taken
                self.open_nr += requests_nr
                try:
                    await self._call.write(message)
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    return  # the stream is over; the reader learns why
            elif self._closing:
                await self._call.done_writing()
                return
            else:
                self._writer_waits = self._loop.create_future()
                await self._writer_waits

    async def _read(self) -> None:
        error: grpc.aio.AioRpcError | MmuBusError | None = None
        try:
            while isinstance(response := await self._call.read(), self._answer):
                self.open_nr -= self._receive(response)
        except grpc.aio.AioRpcError as failed:
            error = failed
        except asyncio.CancelledError:
            if not self._call.cancelled():
                raise
        finally:
            self._over = True
            if self._opening is not None:
                self._opening.cancel()
            if self._lane is not None:
                self._lane.close()
            self._wake_writer()
            self._ended(self._wrong or error)
