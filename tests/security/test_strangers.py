"""Nobody knows who they are, and they do not even finish what they say: who is known is served all the same."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mmu.v1 import address_space_pb2 as space_pb2
from mmubusd.notify import LimitReached
from mmubusd.rpc import EmbeddedServer
from mmubusd.rpc.bystanders import PER_HOST_MAX, SHARE, Bystanders
from mmubusd.rpc.server import LIVENESS
from robust.http2 import Client

from .conftest import PAGE, TOKENS, Caller, reason

LIMIT_S = 60
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
CREATE, ATTACH = "/mmu.v1.AddressSpaceService/Create", "/mmu.v1.SessionService/Attach"
FEW_CALLS = {"calls_max": 24}

Connect = Callable[..., Client]


@pytest.fixture
async def connect(server: EmbeddedServer) -> AsyncIterator[Connect]:
    made: list[Client] = []

    def make(**options: int) -> Client:
        made.append(Client(server.address, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


async def served(who: Caller) -> None:
    """Once the crowd has been turned away, every call is served."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                await who.call("spaces", "Create", space_pb2.CreateRequest())
                break
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                await asyncio.sleep(0.05)
        for _ in range(10):
            await who.call("spaces", "Create", space_pb2.CreateRequest())


@pytest.mark.parametrize("options", [FEW_CALLS])
@pytest.mark.parametrize("data", [None, b""], ids=["only the headers", "a message"])
@pytest.mark.parametrize("path", [CHECK, WATCH, REFLECTION, CREATE, ATTACH])
async def test_calls_of_nobody_take_none_from_who_is_known(
    caller, connect: Connect, path: str, data: bytes | None
) -> None:
    stranger = connect()
    for _ in range(200):
        stranger.call(path, data, end=False)
    await served(caller("alice"))


@pytest.mark.parametrize("options", [FEW_CALLS | {"calls_per_principal_max": 4}])
async def test_calls_of_which_only_the_headers_come_are_their_sender_s(
    server: EmbeddedServer, caller, connect: Connect
) -> None:
    mallory = connect()
    shown = [("authorization", f"Bearer {TOKENS['mallory']}")]
    for _ in range(200):
        mallory.call(CREATE, None, shown)
    await served(caller("alice"))
    in_flight = server.server.driver.quotas._calls
    assert in_flight["token:mallory"] <= 4
    mallory.close()
    async with asyncio.timeout(LIMIT_S):
        while in_flight["token:mallory"]:  # noqa: ASYNC110 - each is given back
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("path", [WATCH, CHECK, REFLECTION, ATTACH])
async def test_who_does_not_read_keeps_the_server_from_nothing(
    server: EmbeddedServer, connect: Connect, path: str
) -> None:
    """Of the health service that comes with gRPC one such watcher kept everybody from being told, and from draining."""
    deaf = connect(window=0)
    for _ in range(5):
        deaf.call(path, b"", end=False)
    async with grpc.aio.insecure_channel(server.address) as channel, asyncio.timeout(LIMIT_S):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await server.server.drain()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


async def test_the_health_service_as_it_is_specified(server: EmbeddedServer) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel, asyncio.timeout(LIMIT_S):
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", LIVENESS, "mmu.v1.SessionService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nobody's"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest(service="nobody's"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()
        listed = await health.List(health_pb2.HealthListRequest())
        assert {"", LIVENESS, "mmu.v1.SessionService"} <= set(listed.statuses)


async def test_one_host_has_so_many_watchers(server: EmbeddedServer) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel, asyncio.timeout(LIMIT_S):
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(PER_HOST_MAX)]
        for watch in watches:
            await watch.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest())
        assert (caught.value.code(), reason(caught.value)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
        watches[0].cancel()
        while True:
            try:
                await health.Check(health_pb2.HealthCheckRequest())
                break
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.01)
        for watch in watches:
            watch.cancel()


class _From:
    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer


def test_a_probe_from_elsewhere_has_its_answer() -> None:
    gate = Bystanders(calls_max=PER_HOST_MAX * 2 * SHARE)
    taken = [gate.enter(_From(f"ipv4:10.0.0.9:{port}")) for port in range(PER_HOST_MAX)]  # type: ignore[arg-type]
    for peer in ("ipv4:10.0.0.9:1", "ipv4:10.0.0.9:70"):
        with pytest.raises(LimitReached, match="from one host"):
            gate.enter(_From(peer))  # type: ignore[arg-type]
    for peer in ("ipv4:10.0.0.8:1", "ipv6:%5B::1%5D:5", "unix:", "unix:/run/peer"):
        taken.append(gate.enter(_From(peer)))  # type: ignore[arg-type]
    others = [gate.enter(_From(f"ipv4:10.0.1.{n}:1")) for n in range(PER_HOST_MAX - 4)]  # type: ignore[arg-type]
    with pytest.raises(LimitReached, match="health and reflection"):
        gate.enter(_From("ipv4:10.0.2.1:1"))  # type: ignore[arg-type]
    for host in (*taken, *others):
        gate.leave(host)
    assert not gate._calls


@pytest.mark.slow
async def test_a_connection_on_which_nothing_comes_is_closed(server: EmbeddedServer) -> None:
    """As shipped, gRPC waits for two minutes."""
    host, _, port = server.address.rpartition(":")
    loop = asyncio.get_running_loop()
    with socket.create_connection((host, int(port))) as silent:
        silent.setblocking(False)
        async with asyncio.timeout(LIMIT_S):
            while await loop.sock_recv(silent, PAGE):
                pass
