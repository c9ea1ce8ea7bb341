"""What the rounds of every contender have in common: someone owns the memory, others must be told and must answer.

    owner        one process: it tells all responders and waits for all answers, that is a round
    responders   up to four processes, which answer at once
    broker       a third party between them, for the contenders that need one

The same three questions are put to each contender: how long does one round take with n responders, how many rounds a
second can be had with many of them in flight, and does it work at all here. A responder is what a user has many of: a
registration of mmubus, a subscription of NATS. Every contender has one connection a process and sends what its own
interface offers: one message to each responder for the peers, one message to each process for mmubus and the raw
floors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any

from mmubus.bench.worker import Worker

__all__ = ["PROCESSES_MAX", "Arena", "System", "counts", "nobody"]

PROCESSES_MAX = 4
"""Processes that the responders are spread over."""

Broker = Callable[[str], AbstractAsyncContextManager[str]]
"""Starts the third party, given a directory for its files; yields the address that owner and responders are told."""


def nobody() -> str:
    """Nothing is missing."""
    return ""


@dataclass(frozen=True, slots=True)
class System:
    """One contender.

    Attributes:
        name: for people, and the row's `against`.
        owner, responders: roles. The owner is ready with its address, which responders are told; it has the commands
            expect(responders, streams), gather(rounds) -> µs of each, pipelined(rounds, in_flight) -> rounds/s.
            Responders have hold(count, streams): answer for count responders from now on, on so many streams where that
            means anything.
        broker: starts what stands between them; None when nothing does.
        missing: says what must be installed before it can run; "" when it can.
        transport: "unix" or "tcp".
    """

    name: str
    owner: str
    responders: str
    broker: Broker | None = None
    missing: Callable[[], str] = nobody
    transport: str = "unix"


class Arena:
    """A system that is running; an async context manager."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.owner: Worker
        self.responders: list[Worker] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Arena:
        async with AsyncExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="mmubus-bench-"))
            address = f"unix:{directory}/owner.sock" if self.system.transport == "unix" else "127.0.0.1:0"
            if self.system.broker is not None:
                address = await stack.enter_async_context(self.system.broker(directory))
            self.owner = await self._start(stack, self.system.owner, address=address)
            for _ in range(PROCESSES_MAX):
                worker = await self._start(stack, self.system.responders, address=self.owner.ready)
                self.responders.append(worker)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def scale(self, responders: int, streams: int = 0) -> None:
        """From now on there are so many responders, spread over the processes.

        Args: streams: connections that they share, all together; 0: one a process.
        """
        spread = counts(responders, PROCESSES_MAX)
        lanes = counts(streams, PROCESSES_MAX) if streams else [min(count, 1) for count in spread]
        for worker, count, lane in zip(self.responders, spread, lanes, strict=True):
            await worker.ask("hold", count=count, streams=lane)
        await self.owner.ask("expect", responders=responders, streams=sum(lanes))

    async def gather(self, rounds: int) -> list[float]:
        """So many rounds, one after another. Returns: µs of each."""
        result: Sequence[float] = await self.owner.ask("gather", rounds=rounds)
        return list(result)

    async def pipelined(self, rounds: int, in_flight: int) -> float:
        """So many rounds, so many at a time. Returns: rounds a second."""
        return float(await self.owner.ask("pipelined", rounds=rounds, in_flight=in_flight))

    async def _start(self, stack: AsyncExitStack, role: str, **options: Any) -> Worker:
        worker = await Worker.start(role, **options)
        stack.push_async_callback(worker.stop)
        return worker


def counts(total: int, parts: int) -> list[int]:
    """Spread evenly, the first ones get the rest: counts(6, 4) is [2, 2, 1, 1]."""
    return [total // parts + (part < total % parts) for part in range(parts)]
