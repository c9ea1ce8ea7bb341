"""Addresses, health, reflection, draining, broken invariants."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from mmu.v1 import address_space_pb2, address_space_pb2_grpc, inspection_pb2, inspection_pb2_grpc, session_pb2
from mmubusd.rpc import EmbeddedServer
from mmubusd.rpc.server import LIVENESS
from patience import LIMIT_S

SERVICES = (
    "mmu.v1.AddressSpaceService",
    "mmu.v1.FileService",
    "mmu.v1.SessionService",
    "mmu.v1.DeviceService",
    "mmu.v1.InspectionService",
)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_tcp_with_a_free_port() -> None:
    async with EmbeddedServer(listen=("127.0.0.1:0", "[::1]:0"), frames_nr=64) as server:
        assert not any(address.endswith(":0") for address in server.server.addresses)
        for address in server.server.addresses:
            async with grpc.aio.insecure_channel(address) as channel:
                stub = inspection_pb2_grpc.InspectionServiceStub(channel)
                assert (await stub.GetStatistics(inspection_pb2.GetStatisticsRequest())).frames == 64


async def test_port_in_use() -> None:
    async with EmbeddedServer(listen=("127.0.0.1:0",), frames_nr=64) as server:
        with pytest.raises(OSError, match="in use"):
            await EmbeddedServer(listen=(server.address,), frames_nr=64).__aenter__()


async def test_socket_of_a_living_server_is_not_taken(server: EmbeddedServer) -> None:
    with pytest.raises(OSError, match="in use"):
        await EmbeddedServer(listen=(server.address,), frames_nr=64).__aenter__()


async def test_socket_of_a_dead_server_is(tmp_path: Path) -> None:
    path = tmp_path / "mmubus.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with EmbeddedServer(listen=(f"unix:{path}",), frames_nr=64):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert not path.exists()


async def test_what_is_not_a_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="not a socket"):
        await EmbeddedServer(listen=(f"unix:{path}",), frames_nr=64).__aenter__()
    assert path.read_text() == "data"


async def test_health(server: EmbeddedServer, peer) -> None:
    health = health_pb2_grpc.HealthStub(peer.channel)
    for name in (*SERVICES, "", LIVENESS):
        assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == SERVING
    await server.server.drain()
    for name in (*SERVICES, ""):
        assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == NOT_SERVING
    assert (await health.Check(health_pb2.HealthCheckRequest(service=LIVENESS))).status == SERVING


async def test_reflection(peer) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(peer.channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {*SERVICES, "grpc.health.v1.Health"} <= names
    await call.done_writing()


async def test_draining_refuses_new_work_and_tells_sessions(server: EmbeddedServer, peer, fails) -> None:
    mm = await peer.space(1, touch=True)
    attached = peer.attach()
    await attached.hello()
    await server.server.drain()
    got = await attached.receive()
    assert got.WhichOneof("message") == "draining"
    create = address_space_pb2.CreateRequest()
    await fails(peer.spaces.Create(create), grpc.StatusCode.UNAVAILABLE, "DRAINING")
    munmap = address_space_pb2.MunmapRequest(mm=mm, addr=0x7000_0000_0000, length=4096)
    await fails(peer.spaces.Munmap(munmap), grpc.StatusCode.UNAVAILABLE, "DRAINING")
    await attached.send(request=1, register=session_pb2.Register(mm=mm))
    assert (await attached.receive()).rejected.error.errno == "ESHUTDOWN"
    late = peer.attach()
    await late.send(hello=session_pb2.Hello(version=1))
    await late.ends_with(grpc.StatusCode.UNAVAILABLE, "DRAINING")


async def test_broken_invariant_stops_the_server(peer, server: EmbeddedServer, fails) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("two and two is five")

    server.server.memory.create_mm = broken
    info = await fails(
        peer.spaces.Create(address_space_pb2.CreateRequest()), grpc.StatusCode.INTERNAL, "BROKEN_INVARIANT"
    )
    assert "five" not in str(info)
    alarm = server.server.alarm
    assert str(alarm.broken.result()) == "two and two is five"
    alarm.broken = asyncio.get_running_loop().create_future()  # seen; the fixture need not raise it


@pytest.mark.parametrize("options", [{"drain_s": 3.0}])
async def test_open_operations_end_while_draining(server: EmbeddedServer, peer) -> None:
    mm = await peer.space(1, touch=True)
    attached = peer.attach()
    await attached.hello()
    await attached.register(mm)
    munmap = address_space_pb2.MunmapRequest(mm=mm, addr=0x7000_0000_0000, length=4096)
    unmapping = asyncio.ensure_future(peer.spaces.Munmap(munmap))
    batch = await attached.notices()
    draining = asyncio.ensure_future(server.server.drain())
    assert (await attached.receive()).WhichOneof("message") == "draining"
    assert not draining.done()
    await attached.ack(batch.first_seq)
    await unmapping
    assert await draining


@pytest.mark.parametrize("options", [{"drain_s": 0.1}])
async def test_draining_is_bounded(server: EmbeddedServer, peer) -> None:
    mm = await peer.space(1, touch=True)
    attached = peer.attach()
    await attached.hello()
    await attached.register(mm)
    operations = peer.spaces.Operate()
    args = [0x7000_0000_0000, 4096]
    call = address_space_pb2.Call(id=1, op=address_space_pb2.OP_MUNMAP, mm=mm, args=args)
    await operations.write(address_space_pb2.OperateRequest(calls=[call]))
    await attached.notices()
    assert not await server.server.drain()
    await operations.write(address_space_pb2.OperateRequest(calls=[address_space_pb2.Call(
        id=2, thread=2, op=address_space_pb2.OP_MUNMAP, mm=mm, args=args)]))  # fmt: skip
    (refused,) = (await operations.read()).results
    assert (refused.id, refused.error.errno) == (2, "ESHUTDOWN")


async def run_server(tmp_path: Path, *flags: str) -> tuple[asyncio.subprocess.Process, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import sys; from mmubusd.rpc import main; sys.exit(main())",
        "--listen", f"unix:{tmp_path}/s.sock", "--listen", "127.0.0.1:0", "--frames-nr", "64", *flags,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, "MMUBUS_LOG_FORMAT": "json"},
    )  # fmt: skip
    assert process.stdout is not None
    address = ""
    for _ in range(2):
        address = (await process.stdout.readline()).decode().strip()
        assert address.startswith("listening on "), (await process.communicate())[1].decode()
    return process, address.removeprefix("listening on ")


async def test_sigterm_drains(tmp_path: Path) -> None:
    process, address = await run_server(tmp_path)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inspection_pb2_grpc.InspectionServiceStub(channel)
        await stub.GetStatistics(inspection_pb2.GetStatisticsRequest())
        call = channel.stream_stream("/mmu.v1.SessionService/Attach")()
        await call.write(session_pb2.AttachRequest(hello=session_pb2.Hello(version=1, name="d")).SerializeToString())
        welcome = session_pb2.AttachResponse.FromString(await call.read()).welcome
        process.send_signal(signal.SIGTERM)
        kind = "heartbeat"
        while kind == "heartbeat":
            kind = session_pb2.AttachResponse.FromString(await call.read()).WhichOneof("message")
        assert kind == "draining"
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
    _, logged = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 0, logged.decode()
    for event in ("started", "session attached", "draining", "stopped"):
        assert f'"{event}"' in logged.decode()
    assert welcome.token not in logged.decode()
    assert not (tmp_path / "s.sock").exists()


async def test_broken_invariant_ends_the_process_with_status_70(tmp_path: Path) -> None:
    """The demo of it: a memory that cannot make address spaces."""
    script = """if True:
        import sys
        from mmubusd.mm.memory import Memory
        from mmubusd.rpc import main
        def broken(self, name):
            assert 2 + 2 == 5, "arithmetic"
        Memory.create_mm = broken
        sys.exit(main())
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, "--listen", f"unix:{tmp_path}/s.sock", "--frames-nr", "64",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    await process.stdout.readline()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s.sock") as channel:
        stub = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Create(address_space_pb2.CreateRequest())
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "arithmetic" not in caught.value.details()
    _, logged = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 70
    assert b"AssertionError: arithmetic" in logged


async def test_bad_configuration_is_one_line_and_status_2() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import sys; from mmubusd.rpc import main; sys.exit(main())", "--listen", "0.0.0.0:0",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert (process.returncode, out) == (2, b"")
    assert err.startswith(b"mmubusd: listen: 0.0.0.0:0")
    assert err.count(b"\n") == 1
