"""A server inside the test's loop, and clients that speak the bare contract: no client library here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status
from mmu.v1 import (
    address_space_pb2,
    address_space_pb2_grpc,
    device_pb2_grpc,
    inspection_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    types_pb2,
)
from mmubusd.rpc import EmbeddedServer
from patience import BUDGET_S, LIMIT_S

PAGE = 4096
BASE = 0x7000_0000_0000
READ_WRITE = 3
PRIVATE_ANON_FIXED = 0x32
SEED_OPS = [
    types_pb2.NOTIFIER_OP_RELEASE,
    types_pb2.NOTIFIER_OP_AGE_PAGE,
    types_pb2.NOTIFIER_OP_INVALIDATE_PAGE,
    types_pb2.NOTIFIER_OP_INVALIDATE_RANGE,
]


class Peer:
    """The contract's stubs on one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.spaces = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
        self.files = address_space_pb2_grpc.FileServiceStub(channel)
        self.devices = device_pb2_grpc.DeviceServiceStub(channel)
        self.inspection = inspection_pb2_grpc.InspectionServiceStub(channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(channel)

    async def space(self, pages: int = 0, touch: bool = False) -> int:
        """An address space with so many anonymous pages at BASE."""
        mm = (await self.spaces.Create(address_space_pb2.CreateRequest(name="test"))).mm
        if pages:
            await self.spaces.Mmap(
                address_space_pb2.MmapRequest(
                    mm=mm, addr=BASE, length=pages * PAGE, prot=READ_WRITE, flags=PRIVATE_ANON_FIXED
                )
            )
        if touch:
            await self.spaces.Store(address_space_pb2.StoreRequest(mm=mm, addr=BASE, data=b"\1" * pages * PAGE))
        return mm

    def attach(self) -> Attached:
        return Attached(self)

    async def alive(self) -> bool:
        """Whether the server still does its work."""
        mm = await self.space(1, touch=True)
        await self.spaces.Exit(address_space_pb2.ExitRequest(mm=mm))
        return True


class Attached:
    """One session stream, spoken by hand."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.call = peer.sessions.Attach()
        self.welcome = session_pb2.Welcome()

    @property
    def metadata(self) -> tuple[tuple[str, str]]:
        return (("mmubus-session", self.welcome.token),)

    async def send(self, **message: object) -> None:
        await self.call.write(session_pb2.AttachRequest(**message))

    async def receive(self) -> session_pb2.AttachResponse:
        """The next message that is not a heartbeat. Raises: AioRpcError when the stream has failed."""
        while True:
            got = await self.call.read()
            if got is grpc.aio.EOF:
                status = await self.call.code()
                if status is grpc.StatusCode.OK:
                    raise EOFError
                initial, trailing = await self.call.initial_metadata(), await self.call.trailing_metadata()
                raise grpc.aio.AioRpcError(status, initial, trailing, await self.call.details())
            if got.WhichOneof("message") != "heartbeat":
                return got

    async def hello(self, name: str = "client", **fields: object) -> session_pb2.Welcome:
        await self.send(hello=session_pb2.Hello(name=name, version=1, **fields))
        self.welcome = (await self.receive()).welcome
        return self.welcome

    async def register(self, mm: int, ops: list[int] = SEED_OPS, **fields: object) -> int:
        await self.send(request=7, register=session_pb2.Register(mm=mm, ops=ops, **fields))
        got = await self.receive()
        assert got.request == 7, got
        assert got.WhichOneof("message") == "registered", got
        return got.registered.registration

    async def notices(self) -> session_pb2.NoticeBatch:
        while True:
            got = await self.receive()
            assert got.WhichOneof("message") == "notices", got
            if got.notices.notices:
                return got.notices

    async def ack(self, through: int, **fields: object) -> None:
        await self.send(acknowledge=session_pb2.Acknowledge(through=through, **fields))

    async def ends_with(self, code: grpc.StatusCode, reason: str) -> ErrorInfo:
        """Read to the end, which must be this one."""
        while True:
            try:
                await self.receive()
            except grpc.aio.AioRpcError as error:
                return check_error(error, code, reason)


def check_error(error: grpc.aio.AioRpcError, code: grpc.StatusCode, reason: str) -> ErrorInfo:
    """Every failure has a code, a text and one ErrorInfo."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (error.code(), info.reason) == (code, reason), error
    assert info.domain == "mmubus"
    assert error.details()
    return info


@pytest.fixture
def fails() -> Callable[..., object]:
    async def fails(call: object, code: grpc.StatusCode, reason: str) -> ErrorInfo:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return check_error(caught.value, code, reason)

    return fails


@pytest.fixture
def options() -> dict[str, object]:
    """What the server is told; a module or test may have its own."""
    return {}


@pytest.fixture
async def server(options: dict[str, object]) -> AsyncIterator[EmbeddedServer]:
    unhurried = {"frames_nr": 1 << 14, "ack_budget_s": BUDGET_S, "lease_s": LIMIT_S}
    async with EmbeddedServer(**{**unhurried, **options}) as server:
        yield server


@pytest.fixture
async def peer(server: EmbeddedServer) -> AsyncIterator[Peer]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield Peer(channel)


@pytest.fixture
async def other(server: EmbeddedServer) -> AsyncIterator[Peer]:
    """A client on a connection of its own."""
    async with grpc.aio.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield Peer(channel)
