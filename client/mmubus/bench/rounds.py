"""How an owner begins rounds and counts their answers: shared by the contenders, so that none wins by its bookkeeping.

A round has a caller that waits for it, as everybody has who unmaps memory. Rounds are numbered from 1, and each waits
for a number of answers. `gather` has one caller, `pipelined` many.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

__all__ = ["Rounds", "callers"]


class Rounds:
    """The open rounds of one owner.

    Args: send: tells every responder of a round, given its number.
    Attributes: expected: answers that end a round.
    """

    def __init__(self, send: Callable[[int], Awaitable[None]]) -> None:
        self._send = send
        self.expected = 1
        self._last = 0
        self._left: dict[int, int] = {}
        self._ended: dict[int, asyncio.Future[None]] = {}
        self._loop = asyncio.get_running_loop()

    async def expect(self, responders: int, streams: int) -> None:
        """The command: so many answers end a round from now on."""
        self.expected = responders

    async def gather(self, rounds: int) -> list[float]:
        """The command: one round after another. Returns: µs of each."""
        took = []
        for _ in range(rounds):
            begun = time.perf_counter()
            await self.one()
            took.append((time.perf_counter() - begun) * 1e6)
        return took

    async def pipelined(self, rounds: int, in_flight: int) -> float:
        """The command: in_flight callers share so many rounds. Returns: rounds a second."""
        return await callers(self.one, rounds, in_flight)

    async def one(self) -> None:
        """One round: tell everybody, wait for all answers."""
        self._last = number = self._last + 1
        self._left[number] = self.expected
        ended = self._ended[number] = self._loop.create_future()
        await self._send(number)
        await ended

    def answered(self, number: int) -> None:
        """One answer to a round has come."""
        left = self._left[number] - 1
        if left:
            self._left[number] = left
        else:
            del self._left[number]
            self._ended.pop(number).set_result(None)


async def callers(one: Callable[[], Awaitable[object]], rounds: int, in_flight: int) -> float:
    """So many callers share so many rounds, each waiting for its own before the next. Returns: rounds a second."""
    left = iter(range(rounds))

    async def caller() -> None:
        for _ in left:
            await one()

    begun = time.perf_counter()
    await asyncio.gather(*[caller() for _ in range(in_flight)])
    return rounds / (time.perf_counter() - begun)
