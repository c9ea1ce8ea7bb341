"""A pipelined stream: requests come in without waiting, each is answered once, in the order in which they end.

One reader task starts requests, one writer task sends whatever has been answered meanwhile, all of it in as few
messages as fit. Between them stands one bound: requests that are started or answered but not yet sent. At the bound the
reader stops reading, the window of the transport fills, and the client's next send waits: that is the back-pressure.

    reader   data = await read()          writer   await results
             for each request in it:                take everything that is there
               open += 1; start it                  write it; open -= so many
               open == max? wait for the writer     wake the reader

A client on this machine may open a lane (`mmubusd.rpc.lane`) and send its requests there, from some moment on: they are
started in the call that brings their bytes, and all answers go there. The stream stays, says how everything ends, and
ends with its lane.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import grpc
import grpc.aio

from mmubusd.rpc.commits import Commits
from mmubusd.rpc.lane import Lane, Lanes
from mmubusd.rpc.methods import Context

__all__ = ["Pipeline"]

R = TypeVar("R")

SLICE_S = 0.002
"""How long one message's requests are started at a stretch before everyone else on the loop gets a turn."""

Accept = Callable[[bytes], Iterator[None]]
"""Takes one message and starts its requests one by one, yielding after each."""


class Pipeline(Generic[R]):
    """One stream's requests and answers.

    Attributes: closed: nobody is there to read an answer any more; what has not been started need not be.
    """

    def __init__(
        self,
        context: Context,
        *,
        open_max: int,
        encode: Callable[[list[R]], Iterable[bytes]],
        commits: Commits | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        """
        Args:
            open_max: requests at a time that are not yet answered and sent.
            encode: from answers to messages, in order, each within the message limit.
            commits: what answers wait for before they are sent; None: nothing is kept.
            lanes: where a lane is opened for a client that asks for one; None: nowhere.
        """
        self._context = context
        self._commits = commits
        self._open_max = open_max
        self._encode = encode
        self._lanes = lanes
        self._lane: Lane | None = None
        self._open = 0
        self._answers: list[R] = []
        self._half_closed = False
        self._error: Exception | None = None
        self._writer_waits: asyncio.Future[None] | None = None
        self._reader_waits: asyncio.Future[None] | None = None
        self._behind: deque[Iterator[None]] = deque()  # of the lane: messages whose requests have not all been started
        self._catching_up: asyncio.Task[None] | None = None
        self.closed = False

    def answer(self, answer: R) -> None:
        """Queue the answer of a request that was started; callable from anywhere on the loop."""
        if not self.closed:
            self._answers.append(answer)
            if self._lane is not None:
                self._lane.wake()
            else:
                self._wake_writer()

    async def serve(self, accept: Accept) -> None:
        """Run until the client has half-closed and everything is answered, or until it is gone.

        The writer is the one who ends the stream: a status that is sent while a message still is would be lost.
        Raises: what accept raises, after the message that is being sent.
        Cancellation: requests that were started go on; their answers are dropped.
        """
        self._accept = accept
        secret = await self._lanes.offer_to(self, self._context) if self._lanes is not None else b""
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read())
                group.create_task(self._write(reader))
        finally:
            self.closed = True
            self._answers.clear()
            if self._lanes is not None and secret:
                self._lanes.withdraw(secret)
            self._end_lane()

    async def _read(self) -> None:
        try:
            while isinstance(data := await self._context.read(), bytes):
                await self._start(self._accept(data))
            self._half_closed = True
        except Exception as error:
            self._error = error
        self._wake_writer()

    async def _start(self, requests: Iterator[None]) -> None:
        """Start one message's requests, no faster than they are answered, and not all in one turn of the loop."""
        turn_ends = time.monotonic() + SLICE_S
        for _ in requests:
            if self._commits is not None and self._commits.pause is not None:
                await asyncio.shield(self._commits.pause)
            self._open += 1
            if self._open >= self._open_max:
                self._reader_waits = asyncio.get_running_loop().create_future()
                await self._reader_waits
            elif time.monotonic() > turn_ends:
                await asyncio.sleep(0)
            else:
                continue
            turn_ends = time.monotonic() + SLICE_S

    async def _write(self, reader: asyncio.Task[None]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self._error is not None:
                raise self._error
            if self.closed:
                reader.cancel()
                return
            if self._lane is not None or not self._answers:
                if self._half_closed and not self._open:
                    return
                self._writer_waits = loop.create_future()
                await self._writer_waits
                continue
            answers, self._answers = self._answers, []
            if self._commits is not None:
                await self._commits.kept_or_fail()
            try:
                for message in self._encode(answers):
                    await self._context.write(message)
            except grpc.aio.BaseError:
                # The stream is over. Its status, if anyone gets it, is not ours to give; the reader need not go on.
                self.closed = True
                continue
            self._sent(len(answers))

    def _sent(self, answers_nr: int) -> None:
        self._open -= answers_nr
        if self._reader_waits is not None and self._open < self._open_max:
            waiting, self._reader_waits = self._reader_waits, None
            if not waiting.done():
                waiting.set_result(None)

    def _wake_writer(self) -> None:
        if self._writer_waits is not None:
            waiting, self._writer_waits = self._writer_waits, None
            if not waiting.done():
                waiting.set_result(None)

    # The lane, called by it on the loop.

    def lane_opened(self, lane: Lane) -> None:
        """Answers go there from now on."""
        if self.closed or self._lane is not None:
            lane.close()
            return
        self._lane = lane
        lane.wake()

    def lane_heard(self, data: bytes) -> None:
        """Start a message's requests, at once if they are not too many. Raises: what accept raises."""
        if self.closed:
            return
        requests = self._accept(data)
        if self._catching_up is None and self._start_now(requests):
            return
        self._behind.append(requests)
        if self._catching_up is None:
            self._catching_up = asyncio.create_task(self._catch_up())
            if self._lane is not None:
                self._lane.pause_reading()

    def _start_now(self, requests: Iterator[None]) -> bool:
        """Returns: whether all have been started; the rest is to be started by `_start`, in its time."""
        turn_ends = time.monotonic() + SLICE_S
        while self._open < self._open_max - 1 and time.monotonic() <= turn_ends:
            try:
                next(requests)
            except StopIteration:
                return True
            self._open += 1
        return False

    async def _catch_up(self) -> None:
        """Start what did not fit, then hear more."""
        try:
            while self._behind:
                await self._start(self._behind.popleft())
        except Exception as error:
            self._fail(error)
            return
        self._catching_up = None
        if self._lane is not None:
            self._lane.resume_reading()

    def lane_caught_up(self) -> None:
        """Everything that was heard has been started: nothing waits for more to come."""

    def lane_messages(self) -> list[bytes]:
        """Everything that has been answered."""
        answers, self._answers = self._answers, []
        if not answers:
            return []
        messages = list(self._encode(answers))
        self._sent(len(answers))
        if self._half_closed:
            self._wake_writer()
        return messages

    def lane_closed(self, lane: Lane) -> None:
        """Nobody reads the answers any more, unless the stream has ended anyway."""
        if self._lane is lane:
            self._lane = None
            self.closed = True
            self._wake_writer()

    def lane_failed(self, error: Exception) -> None:
        """The stream's status says what was wrong."""
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._wake_writer()

    def _end_lane(self) -> None:
        if self._catching_up is not None:
            self._catching_up.cancel()
        lane, self._lane = self._lane, None
        if lane is not None:
            lane.finish()
