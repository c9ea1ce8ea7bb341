"""The lane, spoken by hand: who may open it, what may be said on it, what becomes of notices when it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator
from typing import ClassVar

import grpc
import pytest
from mmu.v1 import address_space_pb2 as spaces_pb
from mmu.v1 import inspection_pb2, session_pb2, types_pb2
from mmubusd.rpc import EmbeddedServer
from mmubusd.rpc import lane as lane_module

PAGE = 4096
BASE = 0x7000_0000_0000
INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Lane:
    """One connection to the lane's socket."""

    made: ClassVar[list[Lane]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.made.append(self)

    @classmethod
    async def open(cls, welcome: session_pb2.Welcome) -> Lane:
        lane = await cls.connect(welcome.lane_path)
        lane.send(open_lane=session_pb2.OpenLane(secret=welcome.lane_secret))
        assert (await lane.receive()).WhichOneof("message") == "lane_opened"
        return lane

    @classmethod
    async def connect(cls, path: str) -> Lane:
        return cls(*await asyncio.open_unix_connection(path))

    def send(self, **message: object) -> None:
        self.raw(session_pb2.AttachRequest(**message).SerializeToString())

    def raw(self, data: bytes) -> None:
        self.writer.write(len(data).to_bytes(4, "big") + data)

    async def receive(self) -> session_pb2.AttachResponse:
        """Raises: EOFError, ConnectionError when it has ended."""
        async with asyncio.timeout(20):
            length = int.from_bytes(await self.reader.readexactly(4), "big")
            return session_pb2.AttachResponse.FromString(await self.reader.readexactly(length))

    async def notices(self) -> session_pb2.NoticeBatch:
        while True:
            got = await self.receive()
            if got.WhichOneof("message") == "notices" and got.notices.notices:
                return got.notices

    def ack(self, through: int, **fields: object) -> None:
        self.send(acknowledge=session_pb2.Acknowledge(through=through, **fields))

    async def ends(self) -> None:
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                await self.receive()

    def close(self) -> None:
        self.writer.transport.abort()


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    yield
    while Lane.made:
        Lane.made.pop().close()
    await asyncio.sleep(0.01)


def munmap(peer, mm: int, page: int = 0, pages: int = 1) -> asyncio.Task:
    request = spaces_pb.MunmapRequest(mm=mm, addr=BASE + page * PAGE, length=pages * PAGE)
    return asyncio.ensure_future(peer.spaces.Munmap(request))


async def state(peer, name: str = "client") -> str:
    answer = await peer.inspection.ListSessions(inspection_pb2.ListSessionsRequest())
    return {session.name: session.state for session in answer.sessions}[name]


async def test_the_socket_is_this_user_s_alone(peer) -> None:
    welcome = await peer.attach().hello()
    assert stat.S_IMODE(os.stat(welcome.lane_path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(welcome.lane_path)).st_mode) == 0o700
    assert len(welcome.lane_secret) == 32


async def test_notices_come_on_the_lane_and_are_acknowledged_there(peer) -> None:
    mm = await peer.space(8, touch=True)
    attached = peer.attach()
    lane = await Lane.open(await attached.hello())
    registration = await attached.register(mm)
    assert (await lane.receive()).registered.registration == registration  # there too, before its notices
    unmapping = [munmap(peer, mm, page) for page in range(4)]
    seen = 0
    while seen < 4:
        batch = await lane.notices()
        assert batch.first_seq == seen + 1
        seen += len(batch.notices)
    await asyncio.sleep(0.05)
    assert not any(one.done() for one in unmapping)
    lane.ack(4)
    await asyncio.gather(*unmapping)
    lane.send(heartbeat=session_pb2.Heartbeat())
    assert await state(peer) == "live"


async def test_results_and_selective_acknowledgements_work_as_on_the_stream(peer) -> None:
    mm = await peer.space(4, touch=True)
    attached = peer.attach()
    lane = await Lane.open(await attached.hello())
    await attached.register(mm)
    first, second = munmap(peer, mm, 0), munmap(peer, mm, 2)
    seen = 0
    while seen < 2:
        seen += len((await lane.notices()).notices)
    lane.ack(0, also=[2], results=[session_pb2.NoticeResult(seq=1, busy=True)])
    await second
    assert not first.done()
    lane.ack(1)
    await first


async def test_what_waits_unread_on_the_stream_comes_on_the_lane_from_the_first(peer) -> None:
    mm = await peer.space(4, touch=True)
    attached = peer.attach()
    welcome = await attached.hello()
    await attached.register(mm)
    unmapping = munmap(peer, mm)
    assert (await attached.notices()).first_seq == 1
    lane = await Lane.open(welcome)
    batch = await lane.notices()
    assert (batch.first_seq, len(batch.notices)) == (1, 1)
    await attached.ack(1)  # the stream still counts, too
    await unmapping


async def test_a_lane_that_breaks_gives_its_notices_back_to_the_stream_in_order(peer) -> None:
    mm = await peer.space(8, touch=True)
    attached = peer.attach()
    lane = await Lane.open(await attached.hello())
    await attached.register(mm)
    done = munmap(peer, mm, 0)
    await lane.notices()
    lane.ack(1)
    await done
    unmapping = [munmap(peer, mm, page) for page in (2, 3, 4)]
    while (await lane.notices()).first_seq < 2:
        pass
    lane.close()
    seen = 1
    while seen < 4:
        batch = await attached.notices()
        assert batch.first_seq == seen + 1
        seen += len(batch.notices)
    assert not any(one.done() for one in unmapping)
    await attached.ack(4)
    await asyncio.gather(*unmapping)
    assert await state(peer) == "live"


async def test_the_lane_ends_with_its_stream_and_a_resumed_session_gets_another(peer) -> None:
    mm = await peer.space(4, touch=True)
    attached = peer.attach()
    welcome = await attached.hello()
    lane = await Lane.open(welcome)
    await attached.register(mm)
    unmapping = munmap(peer, mm)
    await lane.notices()
    again = peer.attach()
    second = await again.hello(token=welcome.token)
    assert second.resumed
    assert second.lane_secret not in (b"", welcome.lane_secret)
    await lane.ends()
    other = await Lane.open(second)
    assert (await other.notices()).first_seq == 1
    other.ack(1)
    await unmapping


async def test_a_secret_opens_one_lane_once(peer) -> None:
    attached = peer.attach()
    welcome = await attached.hello()
    first = await Lane.open(welcome)
    second = await Lane.connect(welcome.lane_path)
    second.send(open_lane=session_pb2.OpenLane(secret=welcome.lane_secret))
    await second.ends()
    mm = await peer.space(2, touch=True)
    await attached.register(mm)
    unmapping = munmap(peer, mm)
    await first.notices()
    first.ack(1)
    await unmapping


async def test_the_secret_of_a_stream_that_has_ended_opens_nothing(peer) -> None:
    attached = peer.attach()
    welcome = await attached.hello()
    await attached.send(leave=session_pb2.Leave())
    with pytest.raises(EOFError):
        await attached.receive()
    lane = await Lane.connect(welcome.lane_path)
    lane.send(open_lane=session_pb2.OpenLane(secret=welcome.lane_secret))
    await lane.ends()


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"\xff\xff\xff",
        session_pb2.AttachRequest(open_lane=session_pb2.OpenLane(secret=b"x" * 32)).SerializeToString(),
        session_pb2.AttachRequest(acknowledge=session_pb2.Acknowledge(through=1)).SerializeToString(),
        session_pb2.AttachRequest(hello=session_pb2.Hello(name="x" * 500)).SerializeToString(),
    ],
)
async def test_whoever_has_no_secret_is_turned_away(peer, first: bytes) -> None:
    welcome = await peer.attach().hello()
    lane = await Lane.connect(welcome.lane_path)
    lane.raw(first)
    await lane.ends()
    assert await peer.alive()


async def test_connections_that_say_nothing_are_few_and_not_for_long(peer, monkeypatch) -> None:
    monkeypatch.setattr(lane_module, "OPENING_S", 0.2)
    monkeypatch.setattr(lane_module, "OPENING_MAX", 3)
    welcome = await peer.attach().hello()
    silent = [await Lane.connect(welcome.lane_path) for _ in range(5)]
    await asyncio.gather(*[one.ends() for one in silent])
    lane = await Lane.connect(welcome.lane_path)  # there is room again
    lane.send(open_lane=session_pb2.OpenLane(secret=welcome.lane_secret))
    assert (await lane.receive()).WhichOneof("message") == "lane_opened"


async def test_another_user_is_turned_away(peer, monkeypatch) -> None:
    welcome = await peer.attach().hello()
    monkeypatch.setattr(lane_module, "peer_uid", lambda end: os.geteuid() + 12345)
    lane = await Lane.connect(welcome.lane_path)
    lane.send(open_lane=session_pb2.OpenLane(secret=welcome.lane_secret))
    await lane.ends()


@pytest.mark.parametrize(
    "data",
    [
        session_pb2.AttachRequest(register=session_pb2.Register(mm=1)).SerializeToString(),
        session_pb2.AttachRequest(leave=session_pb2.Leave()).SerializeToString(),
        session_pb2.AttachRequest(open_lane=session_pb2.OpenLane()).SerializeToString(),
        session_pb2.AttachRequest(acknowledge=session_pb2.Acknowledge(through=77)).SerializeToString(),
        b"\xff\xff\xff",
        b"",
    ],
)
async def test_what_breaks_the_contract_there_fences_the_session(peer, data: bytes) -> None:
    attached = peer.attach()
    lane = await Lane.open(await attached.hello())
    lane.raw(data)
    await attached.ends_with(INVALID, "PROTOCOL_VIOLATION")
    await lane.ends()
    assert await peer.alive()


async def test_a_message_that_is_too_long_fences_the_session(peer) -> None:
    attached = peer.attach()
    lane = await Lane.open(await attached.hello())
    lane.writer.write((1 << 31).to_bytes(4, "big"))
    await attached.ends_with(INVALID, "PROTOCOL_VIOLATION")


async def test_messages_may_come_in_pieces_of_any_size(peer) -> None:
    mm = await peer.space(2, touch=True)
    attached = peer.attach()
    lane = await Lane.open(await attached.hello())
    await attached.register(mm)
    unmapping = munmap(peer, mm)
    await lane.notices()
    message = session_pb2.AttachRequest(acknowledge=session_pb2.Acknowledge(through=1)).SerializeToString()
    beat = session_pb2.AttachRequest(heartbeat=session_pb2.Heartbeat()).SerializeToString()
    data = b"".join(len(one).to_bytes(4, "big") + one for one in (beat, beat, message, beat))
    for at in range(len(data)):
        lane.writer.write(data[at : at + 1])
        await asyncio.sleep(0)
    await unmapping
    assert await state(peer) == "live"


async def test_a_client_that_does_not_read_its_lane_is_fenced_when_its_budget_is_over(peer) -> None:
    mm = await peer.space(1, touch=True)
    attached = peer.attach()
    lane = await Lane.open(await attached.hello(ack_budget_s=0.3))
    await attached.register(mm)
    lane.writer.transport.pause_reading()
    await munmap(peer, mm)  # its budget, not for ever
    await attached.ends_with(grpc.StatusCode.FAILED_PRECONDITION, "FENCED")
    assert await state(peer) == "fenced"


async def test_answers_that_are_not_read_there_are_bounded_and_still_come_on_the_stream(peer, monkeypatch) -> None:
    monkeypatch.setattr(lane_module, "BUFFER_HIGH_BYTES", 1 << 10)
    monkeypatch.setattr(lane_module, "BUFFER_MAX_BYTES", 1 << 12)
    mm = await peer.space(1)
    attached = peer.attach()
    lane = await Lane.open(await attached.hello())
    lane.writer.transport.pause_reading()
    many = 3000

    async def ask() -> None:
        for number in range(1, many + 1):
            await attached.send(
                request=number, register=session_pb2.Register(mm=mm, ops=[types_pb2.NOTIFIER_OP_INVALIDATE_RANGE])
            )

    asking = asyncio.ensure_future(ask())
    for number in range(1, many + 1):
        assert (await attached.receive()).request == number
    await asking
    lane.writer.transport.resume_reading()
    await lane.ends()
    assert await state(peer) == "live"


class TestOff:
    @pytest.fixture
    def options(self) -> dict[str, object]:
        return {"lane": False}

    async def test_nothing_is_offered(self, peer) -> None:
        welcome = await peer.attach().hello()
        assert (welcome.lane_path, welcome.lane_secret) == ("", b"")


async def test_the_socket_goes_with_the_server() -> None:
    async with EmbeddedServer(frames_nr=64) as server:
        path = server.server._lanes.path
        assert stat.S_ISSOCK(os.stat(path).st_mode)
    with pytest.raises(FileNotFoundError):
        os.stat(os.path.dirname(path))
