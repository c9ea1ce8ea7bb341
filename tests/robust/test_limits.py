"""Every limit is the configuration's, and who reaches it is told which one it was."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
import mmubus
import pytest
from mmu.v1 import address_space_pb2, address_space_pb2_grpc
from mmubusd.rpc import EmbeddedServer, transport

PAGE = 4096
AT = 0x7000_0000_0000
ANONYMOUS = mmubus.MAP_PRIVATE | mmubus.MAP_ANONYMOUS | mmubus.MAP_FIXED
Reach = Callable[["Scene"], Awaitable[object]]


class Scene:
    """A server with small limits, and connections to it."""

    def __init__(self, address: str, stack: AsyncExitStack) -> None:
        self.address = address
        self._stack = stack

    async def connect(self) -> mmubus.Bus:
        return await self._stack.enter_async_context(mmubus.connect(self.address))


async def sessions(scene: Scene) -> None:
    first = await scene.connect()
    mm = await first.create_mm("program")
    for bus in (first, await scene.connect(), await scene.connect()):
        await bus.mirror(mm if bus is first else mmubus.AddressSpace(bus, mm.id))


async def registrations(scene: Scene) -> None:
    bus = await scene.connect()
    mm = await bus.create_mm("program")
    for _ in range(3):
        await bus.mirror(mm)


async def address_spaces(scene: Scene) -> None:
    bus = await scene.connect()
    for _ in range(3):
        await bus.create_mm("program")


async def mappings(scene: Scene) -> None:
    bus = await scene.connect()
    mm = await bus.create_mm("program")
    for number in range(18):
        await mm.mmap(AT + 2 * number * PAGE, PAGE, flags=ANONYMOUS)


async def mappings_by_splitting(scene: Scene) -> None:
    bus = await scene.connect()
    mm = await bus.create_mm("program")
    await mm.mmap(AT, 64 * PAGE, flags=ANONYMOUS)
    for number in range(18):
        await mm.munmap(AT + (2 * number + 1) * PAGE, PAGE)


async def frames(scene: Scene) -> None:
    bus = await scene.connect()
    mm = await bus.create_mm("program")
    await mm.mmap(AT, 128 * PAGE, flags=ANONYMOUS)
    await mm.store(AT, bytes([1]) * 128 * PAGE)


async def message(scene: Scene) -> None:
    async with grpc.aio.insecure_channel(scene.address) as channel:
        spaces = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
        await spaces.Store(address_space_pb2.StoreRequest(mm=1, addr=AT, data=bytes(1 << 17)))


async def touched(scene: Scene) -> None:
    bus = await scene.connect()
    mm = await bus.create_mm("program")
    await mm.mmap(AT, 8 * PAGE, flags=ANONYMOUS)
    await mm.touch(AT, 8 * PAGE)


async def file(scene: Scene) -> None:
    bus = await scene.connect()
    await bus.open_file("big", size=1 << 20)


async def in_flight(scene: Scene) -> None:
    """Streams that stand; the next call is one too many."""
    async with grpc.aio.insecure_channel(scene.address) as channel:
        spaces = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
        standing = [spaces.Operate() for _ in range(2)]
        for stream in standing:
            await stream.write(address_space_pb2.OperateRequest(calls=[address_space_pb2.Call(id=1, thread=1)]))
            await stream.read()
        await spaces.Create(address_space_pb2.CreateRequest(name="program"))


LIMITS: list[tuple[dict[str, int], Reach, str, str]] = [
    ({"sessions_max": 2}, sessions, "EMFILE", "sessions_max"),
    ({"registrations_max": 2}, registrations, "EMFILE", "registrations_max"),
    ({"address_spaces_max": 2}, address_spaces, "EAGAIN", "address_spaces_max"),
    ({"max_map_count": 16}, mappings, "ENOMEM", "max_map_count"),
    ({"max_map_count": 16}, mappings_by_splitting, "ENOMEM", "max_map_count"),
    ({"frames_nr": 64}, frames, "ENOMEM", "of 64 free"),
    ({"message_bytes_max": 1 << 16}, message, "", "larger than max"),
    ({"touch_pages_max": 4}, touched, "E2BIG", "touch_pages_max"),
    ({"file_bytes_max": 1 << 19}, file, "EFBIG", "file_bytes_max"),
    ({"calls_max": 2}, in_flight, "", "Concurrent RPC limit exceeded"),
]


@pytest.mark.parametrize(("options", "reach", "errno", "told"), LIMITS, ids=[one[1].__name__ for one in LIMITS])
async def test_who_reaches_a_limit_is_told_which(options: dict[str, int], reach: Reach, errno: str, told: str) -> None:
    settings: dict[str, Any] = {"frames_nr": 1 << 12} | options
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(EmbeddedServer(**settings))
        scene = Scene(server.address, stack)
        with pytest.raises((mmubus.MmuBusError, grpc.aio.AioRpcError)) as caught:
            await reach(scene)
        error = caught.value
        said = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
        assert told in (said or "")
        if isinstance(error, grpc.aio.AioRpcError):
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        else:
            assert errno in (error.reason, error.metadata.get("errno"))


async def test_calls_in_flight_on_a_stream_are_not_refused_but_wait() -> None:
    """`operations_max`: a program that is too fast is slowed down."""
    async with EmbeddedServer(frames_nr=1 << 12, operations_max=4) as server, mmubus.connect(server.address) as bus:
        mm = await bus.create_mm("program")
        await mm.mmap(AT, 64 * PAGE, flags=ANONYMOUS)
        await asyncio.gather(*(mm.munmap(AT + 2 * number * PAGE, PAGE) for number in range(32)))


async def test_a_burst_of_calls_waits_its_turn() -> None:
    """More calls at once than grpc as shipped would keep waiting: it would cancel most of them, with no word why."""
    async with (
        EmbeddedServer(frames_nr=1 << 12, address_spaces_max=8192) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        spaces = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
        await spaces.Create(address_space_pb2.CreateRequest(name="first"))
        calls = [spaces.Create(address_space_pb2.CreateRequest(name=f"p{number}")) for number in range(2000)]
        await asyncio.sleep(0)  # they are sent
        time.sleep(0.5)  # noqa: ASYNC251 - and nobody takes them
        assert [await call.code() for call in calls] == [grpc.StatusCode.OK] * len(calls)


async def test_how_long_calls_may_wait_is_what_grpc_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As shipped it is 30 s, and a name that a later grpc does not know would be passed over: here none may wait."""
    assert transport.WAITING_MAX_S > 24 * 3600
    monkeypatch.setattr(transport, "WAITING_MAX_S", 0)
    async with (
        EmbeddedServer(frames_nr=1 << 12) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        spaces = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
        await spaces.Create(address_space_pb2.CreateRequest(name="first"))
        calls = [spaces.Create(address_space_pb2.CreateRequest(name=f"p{number}")) for number in range(100)]
        time.sleep(0.2)  # noqa: ASYNC251 - nobody takes them
        assert grpc.StatusCode.CANCELLED in [await call.code() for call in calls]


async def test_calls_max_holds_after_many_refusals() -> None:
    """A refused call is not one that ended: the count must not go down with it."""
    async with (
        EmbeddedServer(frames_nr=1 << 12, calls_max=2) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        spaces = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
        for _ in range(2):
            stream = spaces.Operate()
            await stream.write(address_space_pb2.OperateRequest(calls=[address_space_pb2.Call(id=1, thread=1)]))
            await stream.read()
        for _ in range(8):
            call = spaces.Create(address_space_pb2.CreateRequest(name="program"))
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
