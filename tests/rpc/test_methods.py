"""How a handler's end is told, or not: see `mmubusd.rpc.methods`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from mmu.v1 import session_pb2
from mmubusd.rpc.errors import Alarm
from mmubusd.rpc.methods import handlers
from mmubusd.rpc.tally import Tally

SERVICE = session_pb2.DESCRIPTOR.services_by_name["SessionService"]


class Told(Exception):
    """What grpc.aio raises when a status has been given."""


class FakeContext:
    """One call's context. told: the statuses that were given."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def done(self) -> bool:
        return False  # as grpc.aio says while it cancels a handler whose client has gone

    async def abort_with_status(self, status: Any) -> None:
        self.told.append(status.code)
        raise Told


class Gate:
    def enter(self, context: object) -> str:
        return "anybody"

    def leave(self, who: str) -> None:
        """Nothing is counted."""


class Waiting:
    """A service whose stream waits for something."""

    def __init__(self) -> None:
        self.something = asyncio.get_running_loop().create_future()

    async def attach(self, context: object) -> None:
        await self.something


def begin() -> tuple[Waiting, FakeContext, asyncio.Task[None]]:
    service, context = Waiting(), FakeContext()
    table = handlers(SERVICE, service, Alarm(), Gate(), Tally())  # type: ignore[arg-type]
    details = type("Details", (), {"method": f"/{SERVICE.full_name}/Attach"})()
    handler = table.service(details)
    assert handler is not None
    return service, context, asyncio.ensure_future(handler.stream_stream(None, context))


async def test_a_client_that_has_gone_is_told_nothing() -> None:
    """grpc would keep the status for ever."""
    _, context, call = begin()
    await asyncio.sleep(0)
    call.cancel()  # as grpc.aio does
    with pytest.raises(asyncio.CancelledError):
        await call
    assert context.told == []


async def test_a_cancellation_from_elsewhere_is_told() -> None:
    """The client is there, and would wait for ever."""
    service, context, call = begin()
    await asyncio.sleep(0)
    service.something.cancel()
    with pytest.raises(Told):
        await call
    assert [code.name for code in context.told] == ["UNAVAILABLE"]
