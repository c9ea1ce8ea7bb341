"""One session stream, from its Hello to its end: a reader that never stops, a writer that nobody else writes beside.

Beside it there may be a lane, which carries the notices and their acknowledgements while it stands; see `mmubus.lane`.

What grpc.aio asks for, each learned by measuring: a read is never timed and never cancelled for a while (that ends the
call); two writes at a time break it; a write that fails hides the real status, which only the reader learns.

Acknowledgements are not queued: the writer takes whatever has been handled when it gets to write, so that what was
handled during a write goes into the next message, together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from mmu.v1 import session_pb2 as pb

from mmubus.acks import AckWindow
from mmubus.channel import error_of_rpc, grpc
from mmubus.errors import ConnectionLost, MmuBusError, ProtocolError
from mmubus.lane import LANE_TIMEOUT_S, Lane

if TYPE_CHECKING:
    from mmubus.connection import Stubs

__all__ = ["Stream"]

HIDDEN = "Internal error from Core"
HEARTBEAT = pb.AttachRequest(heartbeat=pb.Heartbeat())


class Stream:
    """One attachment of a session.

    Args: acks: where the writer finds what has been handled; chaos: the knobs of a server started with --chaos.
    Attributes: heard_at: the loop's time when the server was heard last; lane: None when there is none (any more).
    """

    def __init__(self, stubs: Stubs, acks: AckWindow, chaos: str = "") -> None:
        self._acks = acks
        self._loop = asyncio.get_running_loop()
        self._call = stubs.session.Attach(metadata=(("mmubus-chaos", chaos),) if chaos else None)
        self._queue: list[pb.AttachRequest] = []
        self._wake_up: asyncio.Future[None] | None = None
        self._beat_s = 1.0
        self._beat_due = False
        self._ended = False
        self._wrong: ProtocolError | None = None
        self.lane: Lane | None = None
        self.heard_at = self._loop.time()

    async def open_lane(self, welcome: pb.Welcome) -> None:
        """Open the lane that Welcome offers, if there is a way to it."""
        if welcome.lane_path:
            self.lane = await Lane.open(
                welcome.lane_path, welcome.lane_secret, self._acks.take_bytes, self._lane_ended, LANE_TIMEOUT_S
            )

    def _lane_ended(self, wrong: ProtocolError | None) -> None:
        """The stream takes over, unless it is wrong to go on at all."""
        self.lane = None
        if wrong is not None:
            self._wrong = wrong
            self.give_up()
        elif not self._ended:
            self._acks.resume()
            self.wake()

    async def attach(self, hello: pb.Hello, timeout_s: float) -> pb.Welcome:
        """Say Hello, wait for Welcome. Raises: Fenced, ConnectionLost, ProtocolError, ...; the stream is over then."""
        late = self._loop.call_later(timeout_s, self.give_up)
        try:
            await self._call.write(pb.AttachRequest(hello=hello))
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise _error_of(error) from None
        except asyncio.InvalidStateError:
            raise await self._why() from None
        except asyncio.CancelledError:
            if not self._ended:  # it is the caller that is cancelled
                self.give_up()
                raise
            raise ConnectionLost(f"the server did not answer within {timeout_s} s") from None
        finally:
            late.cancel()
        if not isinstance(response, pb.AttachResponse):
            raise await self._why()
        if response.WhichOneof("message") != "welcome":
            self._call.cancel()
            raise ProtocolError(f"the server answered Hello with {response.WhichOneof('message')}")
        self.heard_at = self._loop.time()
        self._beat_s = response.welcome.lease_s / 3 or self._beat_s
        return response.welcome

    async def serve(self, receive: Callable[[pb.AttachResponse], None]) -> MmuBusError | None:
        """Read until the stream ends, and write what there is to write meanwhile.

        Args: receive: called with each message, in order; a ProtocolError that it raises ends the stream.
        Returns: why it ended; None when both sides are done.
        """
        writer = asyncio.create_task(self._write(), name="mmubus writer")

        def receive_from_lane(data: bytes) -> None:
            self.heard_at = self._loop.time()
            receive(pb.AttachResponse.FromString(data))

        try:
            if self.lane is not None:
                self.lane.start(receive_from_lane)
            while True:
                response = await self._call.read()
                if not isinstance(response, pb.AttachResponse):
                    return None
                self.heard_at = self._loop.time()
                receive(response)
                if self._acks.pending:
                    self.wake()
        except grpc.aio.AioRpcError as error:
            return _error_of(error)
        except ProtocolError as error:
            return error
        except asyncio.CancelledError:
            if not self._ended:
                raise
            return self._wrong or ConnectionLost("the stream was given up")
        finally:
            self._ended = True
            if self.lane is not None:
                self.lane.close()
            self._call.cancel()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    def send(self, message: pb.AttachRequest) -> None:
        """Put a message behind what waits to be written."""
        self._queue.append(message)
        self._wake_writer()

    def wake(self) -> None:
        """There is something to acknowledge."""
        if self.lane is not None:
            self.lane.wake()
        else:
            self._wake_writer()

    def _wake_writer(self) -> None:
        wake_up = self._wake_up
        if wake_up is not None:
            self._wake_up = None
            if not wake_up.done():
                wake_up.set_result(None)

    def give_up(self) -> None:
        """End the stream from this side, without a goodbye."""
        self._ended = True
        self._call.cancel()
        if self.lane is not None:
            self.lane.close()

    async def _write(self) -> None:
        write = self._call.write
        beat = self._loop.call_later(self._beat_s, self._beat)
        try:
            while True:
                acknowledge = self._acks.take() if self.lane is None else None
                if acknowledge is not None:
                    await write(pb.AttachRequest(acknowledge=acknowledge))
                elif self._queue:
                    await write(self._queue.pop(0))
                elif self._beat_due:
                    await write(HEARTBEAT)
                else:
                    self._wake_up = self._loop.create_future()
                    await self._wake_up
                    continue
                if self._beat_due:  # whatever was written was a sign of life
                    self._beat_due = False
                    beat = self._loop.call_later(self._beat_s, self._beat)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the stream is over; the reader learns why
        finally:
            beat.cancel()

    def _beat(self) -> None:
        self._beat_due = True
        self._wake_writer()

    async def _why(self) -> MmuBusError:
        """Why the call is over before it began."""
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return ConnectionLost("the server ended the stream")
        metadata = await self._call.trailing_metadata()
        return _error_of(
            grpc.aio.AioRpcError(code, await self._call.initial_metadata(), metadata, await self._call.details())
        )


def _error_of(error: grpc.aio.AioRpcError) -> MmuBusError:
    """A write that meets the end of a stream hides its status behind one of grpc's own: nothing more is known."""
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == HIDDEN:
        return ConnectionLost("the stream broke while it was written to")
    return error_of_rpc(error)
