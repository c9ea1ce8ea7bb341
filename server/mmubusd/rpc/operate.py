"""The pipelined stream of memory calls: batches in, results out, in the order in which they end.

Calls of one thread run one after another, in the order sent; calls of different threads overlap. A call that nobody
must be told of ends while it is started, so a batch of such calls costs no task switch at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from mmu.v1 import address_space_pb2 as pb

from mmubusd.notify import Session
from mmubusd.rpc.calls import MESSAGE_OVERHEAD, Calls
from mmubusd.rpc.identity import Principal
from mmubusd.rpc.lane import Lanes
from mmubusd.rpc.methods import Context, decode
from mmubusd.rpc.pipeline import Pipeline

__all__ = ["Operate"]


class Operate:
    """One stream of AddressSpaceService.Operate."""

    def __init__(
        self, calls: Calls, context: Context, session: Session | None, who: Principal, lanes: Lanes | None
    ) -> None:
        settings = calls.driver.settings
        self._calls = calls
        self._session = session
        self._who = who
        self._bytes_max = settings.message_bytes_max - MESSAGE_OVERHEAD
        self._pipeline = Pipeline(
            context, open_max=settings.operations_max, encode=self._encode, commits=calls.driver.commits, lanes=lanes
        )
        self._running: set[int] = set()
        self._resuming: set[int] = set()
        # What waits for the running call of its thread.
        self._waiting: dict[int, deque[pb.Call]] = {}

    async def serve(self) -> None:
        """Run until the client has sent its last call and every one is answered."""
        await self._pipeline.serve(self._accept)

    def _accept(self, data: bytes) -> Iterator[None]:
        for call in decode(pb.OperateRequest, data).calls:
            if call.thread in self._running or call.thread in self._waiting:
                self._waiting.setdefault(call.thread, deque()).append(call)
            else:
                self._start(call)
            yield

    def _start(self, call: pb.Call) -> None:
        thread = call.thread
        self._running.add(thread)

        def ended(result: pb.CallResult) -> None:
            self._running.remove(thread)
            self._pipeline.answer(result)
            if thread in self._waiting and thread not in self._resuming:
                self._resume(thread)

        self._calls.start(call, self._session, self._who, ended)

    def _resume(self, thread: int) -> None:
        """Start what waited in a thread until one does not end at once; a loop, so a long queue is no deep stack."""
        waiting = self._waiting[thread]
        self._resuming.add(thread)
        while waiting and thread not in self._running and not self._pipeline.closed:
            self._start(waiting.popleft())
        self._resuming.remove(thread)
        if not waiting:
            del self._waiting[thread]

    def _encode(self, results: list[pb.CallResult]) -> Iterator[bytes]:
        """As few messages as fit: a result with data or lists counts by its size, others are small."""
        first = size = 0
        for at, result in enumerate(results):
            length = result.ByteSize() + 8
            if size + length > self._bytes_max and at > first:
                yield pb.OperateResponse(results=results[first:at]).SerializeToString()
                first, size = at, 0
            size += length
        yield pb.OperateResponse(results=results[first:]).SerializeToString()
