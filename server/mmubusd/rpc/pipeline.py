"""A pipelined stream: requests come in without waiting, each is answered once, in the order in which they end.

One reader task starts requests, one writer task sends whatever has been answered meanwhile, all of it in as few
messages as fit. Between them stands one bound: requests that are started or answered but not yet sent. At the bound the
reader stops reading, the window of the transport fills, and the client's next send waits: that is the back-pressure.

    reader   data = await read()          writer   await results
             for each request in it:                take everything that is there
               open += 1; start it                  write it; open -= so many
               open == max? wait for the writer     wake the reader
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import grpc
import grpc.aio

from mmubusd.rpc.commits import Commits
from mmubusd.rpc.methods import Context

__all__ = ["Pipeline"]

R = TypeVar("R")

SLICE_S = 0.002
"""How long one message's requests are started at a stretch before everyone else on the loop gets a turn."""


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
    ) -> None:
        """
        Args:
            open_max: requests at a time that are not yet answered and sent.
            encode: from answers to messages, in order, each within the message limit.
            commits: what answers wait for before they are sent; None: nothing is kept.
        """
        self._context = context
        self._commits = commits
        self._open_max = open_max
        self._encode = encode
        self._open = 0
        self._answers: list[R] = []
        self._half_closed = False
        self._error: Exception | None = None
        self._writer_waits: asyncio.Future[None] | None = None
        self._reader_waits: asyncio.Future[None] | None = None
        self.closed = False

    def answer(self, answer: R) -> None:
        """Queue the answer of a request that was started; callable from anywhere on the loop."""
        if not self.closed:
            self._answers.append(answer)
            self._wake_writer()

    async def serve(self, accept: Callable[[bytes], Iterator[None]]) -> None:
        """Run until the client has half-closed and everything is answered, or until it is gone.

        The writer is the one who ends the stream: a status that is sent while a message still is would be lost.
        Args: accept: takes one message and starts its requests one by one, yielding after each.
        Raises: what accept raises, after the message that is being sent.
        Cancellation: requests that were started go on; their answers are dropped.
        """
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read(accept))
                group.create_task(self._write(reader))
        finally:
            self.closed = True
            self._answers.clear()

    async def _read(self, accept: Callable[[bytes], Iterator[None]]) -> None:
        try:
            while isinstance(data := await self._context.read(), bytes):
                await self._start(accept(data))
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
            if not self._answers:
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
                reader.cancel()
                return
            self._open -= len(answers)
            if self._reader_waits is not None and self._open < self._open_max:
                waiting, self._reader_waits = self._reader_waits, None
                if not waiting.done():
                    waiting.set_result(None)

    def _wake_writer(self) -> None:
        if self._writer_waits is not None:
            waiting, self._writer_waits = self._writer_waits, None
            if not waiting.done():
                waiting.set_result(None)
