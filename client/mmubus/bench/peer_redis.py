"""Redis: pub/sub with acknowledgements. A notice is published on one channel, every answer on another.

Best settings: Unix socket, hiredis, no persistence; commands that are ready together go out as one pipeline; one
subscribed connection a process. A connection gets a message of a channel once, so a process that stands for k
subscribers subscribes k channels, and a round is a pipeline of k PUBLISH.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mmubus.bench.brokers import missing, started
from mmubus.bench.rounds import Rounds
from mmubus.bench.system import PROCESSES_MAX, System
from mmubus.bench.worker import serve

__all__ = ["SYSTEM"]

ANSWERS = "answers"


@asynccontextmanager
async def broker(directory: str) -> AsyncIterator[str]:
    """redis-server with nothing on disk."""
    path = f"{directory}/redis.sock"
    command = [
        "redis-server",
        "--port",
        "0",
        "--unixsocket",
        path,
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        directory,
    ]
    async with started(command, path):
        yield path


class _Publisher:
    """Sends what has been put together meanwhile as one pipeline."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._queue: list[tuple[str, bytes]] = []
        self._wake: asyncio.Future[None] | None = None

    def publish(self, channel: str, data: bytes) -> None:
        self._queue.append((channel, data))
        if self._wake is not None:
            self._wake.set_result(None)
            self._wake = None

    async def run(self) -> None:
        while True:
            if not self._queue:
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake
            queue, self._queue = self._queue, []
            if len(queue) == 1:
                await self._client.publish(*queue[0])
                continue
            pipeline = self._client.pipeline(transaction=False)
            for channel, data in queue:
                pipeline.publish(channel, data)
            await pipeline.execute()


def _connect(address: str) -> Any:
    from redis.asyncio import Redis

    return Redis(unix_socket_path=address)


async def owner(address: str) -> None:
    """The role that asks."""
    client = _connect(address)
    publisher = _Publisher(client)
    subscribed = client.pubsub(ignore_subscribe_messages=True)
    await subscribed.subscribe(ANSWERS)
    channels: list[str] = []

    async def send(number: int) -> None:
        data = b"%d" % number
        for channel in channels:
            publisher.publish(channel, data)

    async def expect(responders: int, streams: int) -> None:
        rounds.expected = responders
        channels[:] = [f"notices.{at}" for at in range(-(-responders // PROCESSES_MAX))]

    async def read() -> None:
        while True:
            kind, _channel, data = await subscribed.parse_response()
            if kind == b"message":
                rounds.answered(int(data))

    rounds = Rounds(send)
    tasks = [asyncio.ensure_future(publisher.run()), asyncio.ensure_future(read())]
    await serve({"expect": expect, "gather": rounds.gather, "pipelined": rounds.pipelined}, address)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def responders(address: str) -> None:
    """The role that answers."""
    client = _connect(address)
    publisher = _Publisher(client)
    subscribed = client.pubsub()
    await subscribed.subscribe("nobody-publishes-here")

    async def read() -> None:
        while True:
            kind, _channel, data = await subscribed.parse_response()
            if kind == b"message":
                publisher.publish(ANSWERS, data)

    async def hold(count: int, streams: int) -> None:
        await subscribed.unsubscribe()
        await subscribed.subscribe("nobody-publishes-here", *[f"notices.{at}" for at in range(count)])
        await asyncio.sleep(0.1)  # the server takes them in order, its answers are read by the other task

    tasks = [asyncio.ensure_future(publisher.run()), asyncio.ensure_future(read())]
    await serve({"hold": hold})
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


SYSTEM = System(
    "Redis",
    f"{__name__}:owner",
    f"{__name__}:responders",
    broker,
    lambda: missing("redis-server", "redis-server", "redis", "hiredis"),
)
