"""A server that asks who calls, and three who do: alice owns things, mallory wants them, root administers."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status
from mmu.v1 import (
    address_space_pb2,
    address_space_pb2_grpc,
    authority_pb2_grpc,
    device_pb2_grpc,
    inspection_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    types_pb2,
)
from mmubusd.rpc import EmbeddedServer
from mmubusd.rpc.config import Settings
from mmubusd.rpc.log import make_log
from patience import BUDGET_S, LIMIT_S

PAGE = 4096
BASE = 0x7000_0000_0000
TOKENS = {name: f"{name}-0123456789abcdef0123456789abcdef" for name in ("alice", "mallory", "root", "driver")}
ROLES = """
[[grant]]
principal = "token:root"
roles = ["administer"]

[[grant]]
principal = "token:driver"
mm = "shared-*"
roles = ["attach", "access"]
"""
INVALIDATE = [types_pb2.NOTIFIER_OP_RELEASE, types_pb2.NOTIFIER_OP_INVALIDATE_RANGE]


def token_lines(tokens: dict[str, str]) -> str:
    return "".join(f"{name}:{hashlib.sha256(token.encode()).hexdigest()}\n" for name, token in tokens.items())


def metadata(token: str, session: str = "") -> tuple[tuple[str, str], ...]:
    own = (("authorization", f"Bearer {token}"),) if token else ()
    return (*own, ("mmubus-session", session)) if session else own


@dataclass
class Caller:
    """Somebody with a token, on a connection of its own; every call shows it."""

    channel: grpc.aio.Channel
    token: str
    session: str = ""
    streams: list[grpc.aio.StreamStreamCall] = field(default_factory=list)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return metadata(self.token, self.session)

    async def call(self, service: str, rpc: str, request: object, **fields: object) -> object:
        stub = {
            "spaces": address_space_pb2_grpc.AddressSpaceServiceStub,
            "files": address_space_pb2_grpc.FileServiceStub,
            "devices": device_pb2_grpc.DeviceServiceStub,
            "authority": authority_pb2_grpc.AuthorityServiceStub,
            "inspection": inspection_pb2_grpc.InspectionServiceStub,
        }[service](self.channel)
        return await getattr(stub, rpc)(request, metadata=self.metadata)

    async def space(self, name: str = "", pages: int = 4) -> int:
        mm = (await self.call("spaces", "Create", address_space_pb2.CreateRequest(name=name))).mm
        mapping = address_space_pb2.MmapRequest(mm=mm, addr=BASE, length=pages * PAGE, prot=3, flags=0x32)
        await self.call("spaces", "Mmap", mapping)
        await self.call("spaces", "Store", address_space_pb2.StoreRequest(mm=mm, addr=BASE, data=b"secret" * 10))
        return int(mm)

    async def attach(self, name: str = "client", token: str = "", **hello: object) -> session_pb2.Welcome:
        """A session; the answer's token is used in every call from now on."""
        stream = session_pb2_grpc.SessionServiceStub(self.channel).Attach(metadata=metadata(self.token))
        self.streams.append(stream)
        message = session_pb2.Hello(name=name, version=1, token=token, **hello)
        await stream.write(session_pb2.AttachRequest(hello=message))
        welcome = (await read(stream)).welcome
        self.session = welcome.token
        return welcome

    async def register(self, mm: int, **fields: object) -> session_pb2.AttachResponse:
        request = session_pb2.Register(mm=mm, ops=INVALIDATE, **fields)
        await self.streams[-1].write(session_pb2.AttachRequest(request=1, register=request))
        return await read(self.streams[-1])


async def read(stream: grpc.aio.StreamStreamCall) -> session_pb2.AttachResponse:
    """The next message that is not a heartbeat. Raises: AioRpcError when the stream has failed."""
    while True:
        got = await asyncio.wait_for(stream.read(), LIMIT_S)
        if got is grpc.aio.EOF:
            code = await stream.code()
            raise grpc.aio.AioRpcError(
                code, await stream.initial_metadata(), await stream.trailing_metadata(), await stream.details()
            )
        if got.WhichOneof("message") != "heartbeat":
            return got


def reason(error: grpc.aio.AioRpcError) -> str:
    """ErrorInfo's reason."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason


async def refused(call: object, code: grpc.StatusCode, why: str) -> str:
    """The call must fail like this. Returns: its text."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert (caught.value.code(), reason(caught.value)) == (code, why), caught.value
    return caught.value.details()


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """The directory with the files of tokens and of roles."""
    (tmp_path / "tokens").write_text(token_lines(TOKENS))
    (tmp_path / "roles.toml").write_text(ROLES)
    return tmp_path


@pytest.fixture
def options() -> dict[str, object]:
    return {}


@pytest.fixture
def log() -> io.StringIO:
    """Everything that the server has logged."""
    return io.StringIO()


@pytest.fixture
async def server(secrets: Path, options: dict[str, object], log: io.StringIO) -> AsyncIterator[EmbeddedServer]:
    given = {
        "listen": ("127.0.0.1:0", f"unix:{secrets}/mmubus.sock"),
        "tokens": secrets / "tokens",
        "roles": secrets / "roles.toml",
        "frames_nr": 1 << 12,
        "ack_budget_s": BUDGET_S,
        "lease_s": LIMIT_S,
        "drain_s": 0.0,
        **options,
    }
    settings = Settings.model_validate(given)
    async with EmbeddedServer(settings, make_log("debug", "json", log)) as server:
        yield server


@pytest.fixture
async def caller(server: EmbeddedServer) -> AsyncIterator[Callable[[str], Caller]]:
    """Makes callers by name, or by a token of their own."""
    made: list[Caller] = []

    def make(name: str = "", token: str = "", address: str = "") -> Caller:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.aio.insecure_channel(address or server.address, options=options)
        made.append(Caller(channel, token or TOKENS.get(name, "")))
        return made[-1]

    yield make
    for one in made:
        for stream in one.streams:
            stream.cancel()
        await one.channel.close()
