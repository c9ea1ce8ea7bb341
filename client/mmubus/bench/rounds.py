"""How an owner counts answers: shared by the contenders, so that none wins by its bookkeeping.

Rounds are numbered from 1, and each waits for a number of answers. `gather` runs one at a time, `pipelined` many.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

__all__ = ["Rounds"]


class Rounds:
    """The open rounds of one owner.

    Args: send: tells every responder of a round, given its number.
    Attributes: expected: answers that end a round.
    """

    def __init__(self, send: Callable[[int], Awaitable[None]]) -> None:
        self._send = send
        self.expected = 1
        self._last = 0
        self._left = 0
        self._open: dict[int, int] = {}
        self._ended: asyncio.Future[None] | None = None

    async def expect(self, responders: int) -> None:
        """The command: so many answers end a round from now on."""
        self.expected = responders

    async def gather(self, rounds: int) -> list[float]:
        """The command: one round after another. Returns: µs of each."""
        loop = asyncio.get_running_loop()
        took = []
        for _ in range(rounds):
            self._ended = loop.create_future()
            begun = time.perf_counter()
            await self._send(self.begin())
            await self._ended
            took.append((time.perf_counter() - begun) * 1e6)
        return took

    async def pipelined(self, rounds: int, in_flight: int) -> float:
        """The command: keep in_flight rounds open until rounds of them have ended. Returns: rounds a second."""
        self._ended = asyncio.get_running_loop().create_future()
        first = min(rounds, in_flight)
        self._left = rounds - first
        begun = time.perf_counter()
        for _ in range(first):
            await self._send(self.begin())
        await self._ended
        return rounds / (time.perf_counter() - begun)

    def begin(self) -> int:
        """Open a round. Returns: its number."""
        self._last += 1
        self._open[self._last] = self.expected
        return self._last

    def answered(self, number: int) -> bool:
        """One answer to a round has come. Returns: True when it was the last and another round is due: begin and send it."""
        left = self._open[number] - 1
        if left:
            self._open[number] = left
            return False
        del self._open[number]
        if self._left:
            self._left -= 1
            return True
        if not self._open and self._ended is not None:
            self._ended.set_result(None)
            self._ended = None
        return False
