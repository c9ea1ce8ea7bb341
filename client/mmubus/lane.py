"""A lane: a stream's messages over a plain Unix socket, beside the stream, on the server's machine.

    bytes of a batch ──data_received──► handlers ──► bytes of the acknowledgement      one call, no task switch

The server offers one, in a session's Welcome or in the metadata of a pipelined stream; whoever cannot connect goes on
without. While a session's is open, notices come on it, and what was handled is acknowledged on it. When it ends, the
stream takes over: the server sends again there what is not acknowledged, and we tell again there what we may have told
in vain. A pipelined stream ends with its lane (see `mmubus.pipeline`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from google.protobuf.message import DecodeError
from mmu.v1 import session_pb2 as pb

from mmubus.errors import ProtocolError

__all__ = ["LANE_TIMEOUT_S", "Lane"]

LANE_TIMEOUT_S = 2.0
"""How long opening one may take; then the stream goes on alone."""
LENGTH_BYTES = 4
MESSAGE_BYTES_MAX = 1 << 30
BUFFER_HIGH_BYTES = 64 << 10
"""Bytes that the server has not taken, above which the next message waits; it will say more."""


class Lane(asyncio.Protocol):
    """One lane. Made by `open`; nothing is handled before `start`."""

    def __init__(self, take: Callable[[], bytes], ended: Callable[[ProtocolError | None], None]) -> None:
        self._take = take
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[bool] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._receive: Callable[[bytes], None] | None = None
        self._rest = b""
        self._due = self._paused = False

    @classmethod
    async def open(
        cls,
        path: str,
        secret: bytes,
        take: Callable[[], bytes],
        ended: Callable[[ProtocolError | None], None],
        timeout_s: float,
    ) -> Lane | None:
        """Connect and say the secret.

        Args:
            take: takes the next message to send; b"" when there is nothing to say.
            ended: called once when it has ended, with what the server did wrong, if it did.
        Returns: None when there is no way there: another user, another file system, no answer.
        Cancellation: it is closed.
        """
        lane = cls(take, ended)
        try:
            async with asyncio.timeout(timeout_s):
                await lane._loop.create_unix_connection(lambda: lane, path)
                lane._write(pb.AttachRequest(open_lane=pb.OpenLane(secret=secret)).SerializeToString())
                if await lane._opened:
                    return lane
        except (OSError, TimeoutError):
            pass
        except BaseException:
            lane.close()
            raise
        lane.close()
        return None

    def start(self, receive: Callable[[bytes], None]) -> None:
        """Handle what comes from now on, and what has come.

        Args: receive: called with each message, in order. Raises ProtocolError, or DecodeError, when it is none.
        """
        self._receive = receive
        if self._transport is not None:
            self._transport.resume_reading()
        self.data_received(b"")

    def wake(self) -> None:
        """There is something to say; all that there is when the loop comes round goes out together."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """End it. Idempotent; `ended` is not called for it."""
        self._ended = _nothing
        if self._transport is not None:
            self._transport.abort()

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is one, but does not say so
        transport.set_write_buffer_limits(BUFFER_HIGH_BYTES)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Handle every whole message, and say what that has made ready, in the same breath."""
        try:
            self._messages(data)
        except (ProtocolError, DecodeError) as error:
            ended = self._ended if self._opened.done() else _nothing  # it was none yet
            self.close()
            ended(error if isinstance(error, ProtocolError) else ProtocolError(f"what came on a lane: {error}"))
            return
        self._flush()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self._opened.done():
            self._opened.set_result(False)
        ended, self._ended = self._ended, _nothing
        ended(None)

    # Inside.

    def _messages(self, data: bytes) -> None:
        """Take whole messages from the front; keep the rest. Raises: ProtocolError."""
        data = self._rest + data if self._rest else data
        at, size = 0, len(data)
        while size - at >= LENGTH_BYTES:
            begin = at + LENGTH_BYTES
            length = int.from_bytes(data[at:begin], "big")
            if length > MESSAGE_BYTES_MAX:
                raise ProtocolError(f"a message of {length} bytes on a lane")
            if begin + length > size or (self._receive is None and self._opened.done()):
                break
            message = data[begin : begin + length]
            at = begin + length
            if self._receive is not None:
                self._receive(message)
            else:
                self._first(pb.AttachResponse.FromString(message))
        self._rest = data[at:]

    def _first(self, message: pb.AttachResponse) -> None:
        if message.WhichOneof("message") != "lane_opened":
            raise ProtocolError(f"the server answered OpenLane with {message.WhichOneof('message')}")
        self._opened.set_result(True)
        if self._transport is not None:
            self._transport.pause_reading()  # until somebody handles it

    def _flush(self) -> None:
        self._due = False
        if self._transport is not None and self._receive is not None:
            while not self._paused and (data := self._take()):
                self._write(data)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)


def _nothing(error: ProtocolError | None) -> None:
    """Nobody is to be told."""
