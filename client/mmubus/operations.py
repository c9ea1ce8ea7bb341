"""Many calls in flight: the pipelined stream for programs that issue calls faster than a round trip.

    async with bus.operations() as operations:
        for start in starts:
            future = await operations.submit(Op.MUNMAP, start, length, mm=mm, thread=1)
        results = await operations.drain()

Calls of one thread run one after another, in the order of submission; calls of different threads overlap. What is
submitted while a message is being written goes into the next one, together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from mmu.v1 import address_space_pb2 as pb

from mmubus.channel import error_of_rpc, grpc, session_metadata
from mmubus.errors import ConnectionLost, MmError, MmuBusError
from mmubus.inspection import Mapping, mapping_of
from mmubus.linux import Op, Reason
from mmubus.pipeline import Pipeline
from mmubus.within import handling

if TYPE_CHECKING:
    from mmubus.connection import Bus

__all__ = ["Notification", "Operations", "Result"]

BATCH_BYTES_MAX = 1 << 20  # bytes of data in one message
BATCH_CALLS_MAX = 1024


@dataclass(frozen=True, slots=True)
class Notification:
    """A notifier call that an operation made: what the kernel's tracepoints would show."""

    call: str
    start: int
    end: int
    reason: Reason
    mm: int


@dataclass(frozen=True, slots=True)
class Result:
    """What a call did.

    Attributes:
        ret: the returned value, when errno_name is "".
        errno_name: "EINVAL", or "" when it succeeded.
        message: what was wrong.
        data: the bytes of LOAD and PAGEMAP_SCAN.
        notifications: the notifier calls that it made, in order, if asked for.
        mappings: the window's mappings after it, if asked for.
        present: pairs of pages [first, end) that are present in the window, counted from its start, if asked for.
        swapped, soft_dirty, huge: likewise those that are in swap, those written to since CLEAR_REFS, and those that
            entries for huge pages map.
    """

    ret: int
    errno_name: str = ""
    message: str = ""
    data: bytes = b""
    notifications: Sequence[Notification] = ()
    mappings: Sequence[Mapping] = ()
    present: Sequence[tuple[int, int]] = ()
    swapped: Sequence[tuple[int, int]] = ()
    soft_dirty: Sequence[tuple[int, int]] = ()
    huge: Sequence[tuple[int, int]] = ()

    def value(self) -> int:
        """The returned value. Raises: MmError when the call failed."""
        if self.errno_name:
            raise MmError(self.errno_name, self.message)
        return self.ret


class Operations:
    """A pipelined stream; use it as an async context manager. Leaving it waits for what is in flight.

    Args:
        mm: the address space of calls that name none.
        in_flight_max: `submit` waits while that many calls are not answered.
    """

    def __init__(self, bus: Bus, *, mm: int = 0, in_flight_max: int = 256) -> None:
        self._bus = bus
        self._mm = mm
        self._in_flight_max = in_flight_max
        self._answers: dict[int, asyncio.Future[Result]] = {}
        self._next_id = 1
        self._queue: deque[pb.Call] = deque()
        self._room = asyncio.Event()
        self._error: MmuBusError | None = None
        self._closing = False

    async def __aenter__(self) -> Self:
        token, operate = self._bus.session.token, self._bus.stubs.address_space.Operate
        self._room.set()
        self._pipeline = Pipeline(
            lambda more: operate(metadata=[*session_metadata(token), *more]),
            pb.OperateResponse,
            self._take,
            self._receive,
            self._over,
            lane=self._bus.lane,
        )
        await self._pipeline.opened()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._error is None:
            await self.drain()
        self._closing = True
        if error is not None or self._error is not None:
            self._pipeline.cancel()
        await self._pipeline.close()

    @property
    def on_lane(self) -> bool:
        """Whether calls go by the server's lane, not by gRPC."""
        return self._pipeline.on_lane

    @property
    def sent_nr(self) -> int:
        """Calls that were sent and are not answered."""
        return self._pipeline.open_nr

    @property
    def in_flight(self) -> int:
        """Calls that were submitted and are not answered."""
        return len(self._answers)

    async def submit(
        self,
        op: Op,
        *args: int,
        mm: int | None = None,
        thread: int = 0,
        data: bytes = b"",
        notifications: bool = False,
        window: tuple[int, int] = (0, 0),
    ) -> asyncio.Future[Result]:
        """Submit a call; waits only while too many are in flight.

        Args:
            op, args: the call and Linux's arguments in Linux's order.
            mm: the address space; None: the one of this stream.
            thread: calls of one thread run in order.
            data: the bytes of STORE.
            notifications: report the notifier calls that it makes.
            window: report mappings and resident pages of [start, end) after it.
        Returns: a future of its Result; a call that fails in the memory manager is a Result with an errno.
        Raises: ConnectionLost, and whatever ended the stream.
        """
        while len(self._answers) >= self._in_flight_max and self._error is None:
            self._room.clear()
            await self._room.wait()
        return self.submit_nowait(
            op, *args, mm=mm, thread=thread, data=data, notifications=notifications, window=window
        )

    def submit_nowait(
        self,
        op: Op,
        *args: int,
        mm: int | None = None,
        thread: int = 0,
        data: bytes = b"",
        notifications: bool = False,
        window: tuple[int, int] = (0, 0),
    ) -> asyncio.Future[Result]:
        """`submit` without back-pressure."""
        if self._error is not None:
            raise self._error
        number = self._next_id
        self._next_id += 1
        call = pb.Call(
            id=number,
            thread=thread,
            op=cast("pb.Op.ValueType", op.value),
            mm=self._mm if mm is None else int(mm),
            args=args,
            data=data,
            within=handling.get(),
        )
        if notifications or window[1]:
            call.report.notifications = notifications
            call.report.window_start, call.report.window_end = window
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        if self._bus.tracing is not None:
            call.traceparent = self._bus.tracing.submit(op.name.lower(), future)
        self._answers[number] = future
        self._queue.append(call)
        self._pipeline.wake()
        return future

    async def run(self, op: Op, *args: int, mm: int | None = None, thread: int = 0, data: bytes = b"") -> int:
        """Submit a call and wait for its value. Raises: MmError when it failed."""
        return (await (await self.submit(op, *args, mm=mm, thread=thread, data=data))).value()

    async def drain(self) -> None:
        """Wait until every call that was submitted before has been answered. Raises: whatever ended the stream."""
        waiting = list(self._answers.values())
        if waiting:
            await asyncio.wait(waiting)
        if self._error is not None:
            raise self._error

    def _take(self) -> tuple[pb.OperateRequest, int] | None:
        """The next calls, as many as go into one message."""
        calls: list[pb.Call] = []
        size = 0
        queue = self._queue
        while queue and len(calls) < BATCH_CALLS_MAX:
            size += len(queue[0].data)
            if calls and size > BATCH_BYTES_MAX:
                break
            calls.append(queue.popleft())
        return (pb.OperateRequest(calls=calls), len(calls)) if calls else None

    def _receive(self, response: pb.OperateResponse) -> int:
        for result in response.results:
            future = self._answers.pop(result.id, None)
            if future is not None and not future.done():
                future.set_result(result_of(result))
        self._room.set()
        return len(response.results)

    def _over(self, error: grpc.aio.AioRpcError | MmuBusError | None) -> None:
        if isinstance(error, grpc.aio.AioRpcError):
            error = error_of_rpc(error)
        self._end(error or ConnectionLost("the server ended the stream of operations"))

    def _end(self, error: MmuBusError) -> None:
        """The stream is over: whoever still waits is told."""
        if self._closing and not self._answers:
            return
        self._error = error
        for future in self._answers.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: futures that nobody awaits any more do not complain
        self._answers.clear()
        self._room.set()


def result_of(result: pb.CallResult) -> Result:
    """The value of a message."""
    return Result(
        result.ret,
        result.error.errno if result.HasField("error") else "",
        result.error.message if result.HasField("error") else "",
        result.data,
        [Notification(n.call, n.start, n.end, Reason(n.reason), n.mm) for n in result.notifications],
        [mapping_of(mapping) for mapping in result.mappings],
        list(zip(result.present[::2], result.present[1::2], strict=True)),
        list(zip(result.swapped[::2], result.swapped[1::2], strict=True)),
        list(zip(result.soft_dirty[::2], result.soft_dirty[1::2], strict=True)),
        list(zip(result.huge[::2], result.huge[1::2], strict=True)),
    )
