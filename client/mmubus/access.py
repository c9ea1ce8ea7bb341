"""The device's requests on their way: one pipelined stream a connection, opened when first used.

Requests go out in the order asked and are answered in the order in which they end. A stream costs less than half of
what a unary call does; a server that does not have it is asked by unary calls.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from mmu.v1 import device_pb2 as pb

from mmubus.channel import error_of_rpc, grpc, session_metadata, unary
from mmubus.errors import ConnectionLost, MmuBusError, ProtocolError, error_from
from mmubus.pipeline import Pipeline
from mmubus.within import handling

if TYPE_CHECKING:
    from mmubus.connection import Stubs
    from mmubus.session import Session
    from mmubus.tracing import Tracing

__all__ = ["Access"]

_METHODS = {
    "fault": "Fault",
    "snapshot": "Snapshot",
    "pin": "Pin",
    "unpin": "Unpin",
    "dma_read": "DmaRead",
    "dma_write": "DmaWrite",
    "export": "Export",
    "unexport": "Unexport",
    "migrate": "Migrate",
    "exclusive": "Exclusive",
}
"""The unary rpc of each request."""

CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class Access:
    """The pipelined stream of device requests. A new session gets a new stream; what is in flight on the old fails."""

    def __init__(self, stubs: Stubs, session: Session, tracing: Tracing | None = None, *, lane: bool = True) -> None:
        self._lane = lane
        self._stubs = stubs
        self._session = session
        self._tracing = tracing
        self._stream: _Stream | None = None
        self._only_unary = False  # the server has no Access

    async def ask(self, request: pb.AccessRequest, ended: Callable[[], None] = lambda: None) -> pb.AccessResponse:
        """Send one request and wait for its answer; request.id is set here.

        Args: ended: called when the server is not at it any more: at the latest when this returns or raises, and later
            only when the caller is cancelled, which the server does not hear of.
        Raises: MmError, StaleTranslation, Fenced, ConnectionLost, ... as `errors.error_from` says.
        """
        try:
            self._session.raise_if_over()
            request.within = handling.get()
            request.handled_through = self._session.acks.through
            response = None if self._only_unary else await self._streamed(request, ended)
            if response is None:
                response = await self._unary(request)
        except asyncio.CancelledError:
            if self._only_unary:
                ended()  # the call is cancelled as well
            raise
        except BaseException:
            ended()
            raise
        ended()
        if response.HasField("error"):
            error = response.error
            raise error_from(CODE_NAMES.get(error.code, ""), error.reason, error.message, error.metadata)
        return response

    async def _streamed(self, request: pb.AccessRequest, ended: Callable[[], None]) -> pb.AccessResponse | None:
        """None: it can only be asked as a unary call."""
        stream = self._stream
        if stream is None or stream.error is not None or stream.token != self._session.token:
            if stream is not None:
                stream.close()
            stream = self._stream = _Stream(self._stubs, self._session.token, self._tracing, self._lane)
        try:
            return await stream.ask(request, ended)
        except ProtocolError:
            if not (stream.unimplemented or stream.status_hidden):
                raise
        self._only_unary = stream.unimplemented
        return None

    async def _unary(self, request: pb.AccessRequest) -> pb.AccessResponse:
        """The same request as a call of its own."""
        kind = request.WhichOneof("request") or ""
        call = getattr(self._stubs.device, _METHODS[kind])
        metadata = session_metadata(self._session.token, request.within)
        return pb.AccessResponse(**{kind: await unary(call(getattr(request, kind), metadata=metadata))})

    @property
    def on_lane(self) -> bool:
        """Whether requests go by the server's lane, not by gRPC."""
        return self._stream is not None and self._stream.pipeline.on_lane

    async def close(self) -> None:
        """End the stream; what is in flight fails with ConnectionLost."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()
            await stream.pipeline.close()


class _Stream:
    """One stream under one session token."""

    def __init__(self, stubs: Stubs, token: str, tracing: Tracing | None, lane: bool) -> None:
        self.token = token
        self._tracing = tracing
        self.error: MmuBusError | None = None
        self.unimplemented = False
        self.status_hidden = False
        self.answered = False
        self._answers: dict[int, tuple[asyncio.Future[pb.AccessResponse], Callable[[], None]]] = {}
        self._next_id = 1
        self._queue: deque[pb.AccessRequest] = deque()
        self.pipeline = Pipeline(
            lambda more: stubs.device.Access(metadata=[*session_metadata(token), *more]),
            pb.AccessResponse,
            self._take,
            self._receive,
            self._over,
            lane=lane,
        )

    async def ask(self, request: pb.AccessRequest, ended: Callable[[], None]) -> pb.AccessResponse:
        number = request.id = self._next_id
        self._next_id += 1
        future: asyncio.Future[pb.AccessResponse] = asyncio.get_running_loop().create_future()
        self._answers[number] = future, ended
        if self._tracing is not None:
            request.traceparent = self._tracing.submit(request.WhichOneof("request") or "", future)
        self._queue.append(request)
        if number == 1:
            await self.pipeline.opened()
        self.pipeline.wake()
        return await future

    def close(self) -> None:
        self._end(ConnectionLost("the connection was closed"))
        self.pipeline.cancel()

    def _take(self) -> tuple[pb.AccessRequest, int] | None:
        return (self._queue.popleft(), 1) if self._queue and self.error is None else None

    def _receive(self, response: pb.AccessResponse) -> int:
        self.answered = True
        waiting = self._answers.pop(response.id, None)
        if waiting is not None:
            future, ended = waiting
            ended()
            if not future.done():
                future.set_result(response)
        return 1

    def _over(self, error: grpc.aio.AioRpcError | MmuBusError | None) -> None:
        if isinstance(error, grpc.aio.AioRpcError):
            self.unimplemented = error.code() is grpc.StatusCode.UNIMPLEMENTED
            # A write that meets the end of the stream turns its status into INTERNAL. A unary call tells it.
            self.status_hidden = error.code() is grpc.StatusCode.INTERNAL and not self.answered
            error = error_of_rpc(error)
        self._end(error or ConnectionLost("the server ended the stream of device requests"))

    def _end(self, error: MmuBusError) -> None:
        """The stream is over: whoever still waits is told."""
        if self.error is not None:
            return
        self.error = error
        for future, ended in self._answers.values():
            ended()
            if not future.done():
                future.set_exception(error)
