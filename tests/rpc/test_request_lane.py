"""The lane of a pipelined stream, spoken by hand: who is offered one, what goes on it, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, ClassVar

import grpc
import pytest
from mmu.v1 import address_space_pb2 as pb
from mmu.v1 import device_pb2, session_pb2
from mmubusd.rpc import EmbeddedServer

PAGE = 4096
BASE = 0x7000_0000_0000
WANTED = ("mmubus-lane", "1")
INVALID = grpc.StatusCode.INVALID_ARGUMENT


class RequestLane:
    """One stream with its lane."""

    made: ClassVar[list[RequestLane]] = []

    def __init__(self, stream: Any, answer: type[Any]) -> None:
        self.made.append(self)
        self.stream = stream
        self._answer = answer
        self._got: list[Any] = []

    async def open(self) -> RequestLane:
        offered = dict(await self.stream.initial_metadata())
        self.secret = offered["mmubus-lane-secret-bin"]
        self.path = offered["mmubus-lane-path"]
        self.reader, self.writer = await asyncio.open_unix_connection(self.path)
        self.raw(session_pb2.AttachRequest(open_lane=session_pb2.OpenLane(secret=self.secret)).SerializeToString())
        opened = session_pb2.AttachResponse.FromString(await self._message())
        assert opened.WhichOneof("message") == "lane_opened"
        return self

    def raw(self, *messages: bytes) -> None:
        self.writer.write(b"".join(len(data).to_bytes(4, "big") + data for data in messages))

    def calls(self, *calls: pb.Call) -> None:
        self.raw(pb.OperateRequest(calls=calls).SerializeToString())

    async def _message(self) -> bytes:
        async with asyncio.timeout(30):
            return await self.reader.readexactly(int.from_bytes(await self.reader.readexactly(4), "big"))

    async def receive(self) -> Any:
        return self._answer.FromString(await self._message())

    async def results(self, count: int) -> list[Any]:
        """The next results of Operate; may have come with those before."""
        while len(self._got) < count:
            self._got.extend((await self.receive()).results)
        found, self._got = self._got[:count], self._got[count:]
        return found

    async def close(self) -> None:
        self.stream.cancel()
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    async def status(self) -> grpc.StatusCode:
        async with asyncio.timeout(30):
            return await self.stream.code()


def madvise(number: int, mm: int, *, thread: int = 0, page: int = 0) -> pb.Call:
    return pb.Call(id=number, thread=thread, op=pb.OP_MADVISE, mm=mm, args=(BASE + page * PAGE, PAGE, 4))


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    yield
    while RequestLane.made:
        await RequestLane.made.pop().close()


@pytest.fixture
async def lane(peer) -> RequestLane:
    return await RequestLane(peer.spaces.Operate(metadata=(WANTED,)), pb.OperateResponse).open()


async def test_calls_and_results_go_on_it(peer, lane: RequestLane) -> None:
    mm = await peer.space(8, touch=True)
    lane.calls(madvise(1, mm), madvise(2, mm, thread=1, page=3))
    assert {result.id: result.ret for result in await lane.results(2)} == {1: 0, 2: 0}
    await lane.stream.done_writing()
    assert await lane.status() is grpc.StatusCode.OK


async def test_what_was_asked_on_the_stream_is_answered_on_it_too(peer, lane: RequestLane) -> None:
    mm = await peer.space(8, touch=True)
    await lane.stream.write(pb.OperateRequest(calls=[madvise(7, mm)]))
    assert (await lane.results(1))[0].id == 7


async def test_requests_of_a_device_go_on_it(peer) -> None:
    mm = await peer.space(8, touch=True)
    attached = peer.attach()
    await attached.hello()
    registration = await attached.register(mm)
    stream = peer.devices.Access(metadata=(*attached.metadata, WANTED))
    lane = await RequestLane(stream, device_pb2.AccessResponse).open()
    fault = device_pb2.FaultRequest(registration=registration, start=BASE, end=BASE + PAGE)
    lane.raw(device_pb2.AccessRequest(id=5, fault=fault).SerializeToString())
    answer = await lane.receive()
    assert answer.id == 5
    assert answer.WhichOneof("response") == "fault"


@pytest.mark.parametrize("options", [{"operations_max": 4}])
async def test_a_burst_beyond_the_bound_waits_and_keeps_the_order_of_each_thread(peer, lane: RequestLane) -> None:
    """Hundreds of messages that are read at once, of which four may be under way."""
    mm = await peer.space(8, touch=True)
    calls = [madvise(number, mm, thread=number % 3) for number in range(1, 601)]
    lane.raw(*(pb.OperateRequest(calls=calls[at : at + 3]).SerializeToString() for at in range(0, 600, 3)))
    done = [result.id for result in await lane.results(600)]
    for thread in range(3):
        assert [number for number in done if number % 3 == thread] == [
            number for number in range(1, 601) if number % 3 == thread
        ]
    assert sorted(done) == list(range(1, 601))


async def test_what_is_no_message_ends_the_stream(lane: RequestLane) -> None:
    lane.raw(b"\xff\xff\xff")
    assert await lane.status() is INVALID


async def test_a_message_that_is_too_long_ends_the_stream(lane: RequestLane) -> None:
    lane.writer.write((1 << 31).to_bytes(4, "big"))
    assert await lane.status() is INVALID


async def test_a_lane_that_breaks_ends_its_stream_and_nothing_else(peer, lane: RequestLane) -> None:
    mm = await peer.space(8, touch=True)
    lane.calls(madvise(1, mm))
    await lane.results(1)
    lane.writer.transport.abort()
    assert await lane.status() is grpc.StatusCode.OK  # there is nobody left to read an answer
    again = await RequestLane(peer.spaces.Operate(metadata=(WANTED,)), pb.OperateResponse).open()
    again.calls(madvise(2, mm))
    assert (await again.results(1))[0].id == 2


async def test_its_secret_works_once_and_ends_with_the_stream(lane: RequestLane) -> None:
    async def knock() -> bytes:
        reader, writer = await asyncio.open_unix_connection(lane.path)
        data = session_pb2.AttachRequest(open_lane=session_pb2.OpenLane(secret=lane.secret)).SerializeToString()
        writer.write(len(data).to_bytes(4, "big") + data)
        async with asyncio.timeout(30):
            try:
                return await reader.read(64)
            except ConnectionError:
                return b""
            finally:
                writer.transport.abort()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    assert await knock() == b""


async def test_a_stream_that_ends_closes_it(lane: RequestLane) -> None:
    await lane.stream.done_writing()
    assert await lane.status() is grpc.StatusCode.OK
    async with asyncio.timeout(30):
        assert await lane.reader.read(64) == b""


async def test_who_does_not_ask_is_offered_none(peer) -> None:
    mm = await peer.space(8, touch=True)
    stream = peer.spaces.Operate()
    await stream.write(pb.OperateRequest(calls=[madvise(1, mm)]))
    assert (await stream.read()).results[0].id == 1
    assert not keys(await stream.initial_metadata())
    stream.cancel()


@pytest.mark.parametrize("kept", [False, True], ids=["without lanes", "with a state"])
async def test_a_server_that_has_none_offers_none(tmp_path, kept: bool) -> None:
    """Kept: an answer that waits for the disk gains nothing by a lane, and fails when the disk is full."""
    settings = {"state": tmp_path} if kept else {"lane": False}
    async with (
        EmbeddedServer(frames_nr=256, **settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stream = operate(channel, (WANTED,))
        await stream.write(pb.OperateRequest(calls=[pb.Call(id=1, op=pb.OP_BRK)]).SerializeToString())
        assert isinstance(await stream.read(), bytes)
        assert not keys(await stream.initial_metadata())
        stream.cancel()


def operate(channel: grpc.aio.Channel, metadata: Sequence[tuple[str, str]]) -> Any:
    return channel.stream_stream("/mmu.v1.AddressSpaceService/Operate")(metadata=metadata)


def keys(metadata: Iterable[tuple[str, object]]) -> list[str]:
    """Those of a lane."""
    return [key for key, _ in metadata if key.startswith("mmubus-lane")]
