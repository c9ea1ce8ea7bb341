"""NATS: scatter-gather. One publish with a reply subject of the round; every subscription's callback answers to it.

Best settings: no subject validation in the client, one wildcard inbox for all rounds, nothing logged by the server, one
connection a process. Acknowledged gathers are not something that NATS has; this is how its users build them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mmubus.bench.brokers import free_port, missing, started
from mmubus.bench.rounds import Rounds
from mmubus.bench.system import System
from mmubus.bench.worker import serve

__all__ = ["SYSTEM"]

SUBJECT = "notice"
NOTICE = b"n" * 32


@asynccontextmanager
async def broker(directory: str) -> AsyncIterator[str]:
    """nats-server as its package ships it."""
    address = f"127.0.0.1:{free_port()}"
    host, _, port = address.partition(":")
    async with started(["nats-server", "--addr", host, "--port", port], address):
        yield address


async def _connect(address: str) -> Any:
    import nats

    return await nats.connect(f"nats://{address}", skip_subject_validation=True, allow_reconnect=False)


async def owner(address: str) -> None:
    """The role that asks."""
    client = await _connect(address)
    inbox = client.new_inbox()
    prefix = len(inbox) + 1

    async def send(number: int) -> None:
        await client.publish(SUBJECT, NOTICE, reply=f"{inbox}.{number}")

    async def answer(message: Any) -> None:
        rounds.answered(int(message.subject[prefix:]))

    rounds = Rounds(send)
    await client.subscribe(f"{inbox}.*", cb=answer, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await client.flush()
    await serve({"expect": rounds.expect, "gather": rounds.gather, "pipelined": rounds.pipelined}, address)
    await client.close()


async def responders(address: str) -> None:
    """The role that answers."""
    client = await _connect(address)
    subscriptions: list[Any] = []

    async def answer(message: Any) -> None:
        await client.publish(message.reply)

    async def hold(count: int, streams: int) -> None:
        while len(subscriptions) > count:
            await subscriptions.pop().unsubscribe()
        while len(subscriptions) < count:
            one = await client.subscribe(SUBJECT, cb=answer, pending_msgs_limit=-1, pending_bytes_limit=-1)
            subscriptions.append(one)
        await client.flush()

    await serve({"hold": hold})
    await client.close()


SYSTEM = System(
    "NATS",
    f"{__name__}:owner",
    f"{__name__}:responders",
    broker,
    lambda: missing("nats-server", "nats-server", "nats:nats-py"),
    transport="tcp",
)
