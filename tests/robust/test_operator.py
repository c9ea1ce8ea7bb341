"""Bad luck of who runs a server, in real processes: no descriptors, a removed socket, a server that stood still."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import grpc.aio
import pytest
from mmu.v1 import address_space_pb2, address_space_pb2_grpc, inspection_pb2, inspection_pb2_grpc
from mmubusd.rpc.store import FrameStore

sys.path.insert(0, str(Path(__file__).resolve().parent))
from processes import OWN_CONNECTION, Cpu, clients, server

LIMIT_S = 60
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def create(address: str) -> int:
    async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
        spaces = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
        return int((await spaces.Create(address_space_pb2.CreateRequest(), wait_for_ready=True, timeout=LIMIT_S)).mm)


async def test_idle_connections_without_end_leave_the_state_its_files(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with server(address, "--state", str(tmp_path / "state"), "--checkpoint-bytes", "4096") as process:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (100, 100))
        async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
            spaces = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
            await spaces.Create(address_space_pb2.CreateRequest(), timeout=LIMIT_S)
            idle = [socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) for _ in range(200)]
            for _ in range(100):  # several segments of the journal
                await spaces.Create(address_space_pb2.CreateRequest(name="n" * 100), timeout=LIMIT_S)
            for one in idle:
                one.close()
        assert await create(address) == 102
        assert process.poll() is None


@pytest.mark.parametrize("more", [(), ("--unix-users", "*")], ids=["own user", "relay"])
async def test_a_server_that_stops_leaves_the_socket_of_the_next_one(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Somebody removed its file, so that another server could begin there."""
    path = tmp_path / "mmubus.sock"
    with server(f"unix:{path}", *more) as first:
        path.unlink()
        with server(f"unix:{path}", *more):
            first.terminate()
            assert await asyncio.to_thread(first.wait, LIMIT_S) == 0
            assert path.is_socket()
            assert await create(f"unix:{path}") == 1
    assert os.listdir(tmp_path) == []


async def test_a_server_that_stood_still_blames_nobody() -> None:
    """Longer than lease and ack budget together: who answers as soon as it can has done nothing wrong."""
    address = f"127.0.0.1:{free_port()}"
    with server(address, "--lease-s", "4", "--grace-s", "0.5", "--ack-budget-s", "4") as process:
        cpu = Cpu(address)
        mm = await cpu.space(8)
        with clients(address, "good", [mm], budget_s=4.0):
            await cpu.unmap(mm)
            process.send_signal(signal.SIGSTOP)
            unmap = asyncio.ensure_future(cpu.unmap(mm))
            await asyncio.sleep(9)
            process.send_signal(signal.SIGCONT)
            await asyncio.wait_for(unmap, LIMIT_S)
            async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
                inspection = inspection_pb2_grpc.InspectionServiceStub(channel)
                sessions = (await inspection.ListSessions(inspection_pb2.ListSessionsRequest())).sessions
            assert [(one.state, one.fenced_because) for one in sessions] == [("live", "")]
        await cpu.close()


async def test_calls_that_come_while_the_server_stops_are_told_why(tmp_path: Path) -> None:
    """Twenty programs that call without a pause; gRPC by itself cancels most of their last calls, with no word why."""
    address, ends = f"unix:{tmp_path}/mmubus.sock", list[tuple[grpc.StatusCode, str]]()

    async def program() -> None:
        async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
            spaces = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
            try:
                while True:
                    await spaces.Create(address_space_pb2.CreateRequest())
                    begun.release()
            except grpc.aio.AioRpcError as error:
                ends.append((error.code(), error.details()))

    with server(address) as process:
        begun = asyncio.Semaphore(0)
        programs = [asyncio.create_task(program()) for _ in range(20)]
        for _ in range(100):
            await asyncio.wait_for(begun.acquire(), LIMIT_S)
        process.terminate()
        await asyncio.wait_for(asyncio.gather(*programs), LIMIT_S)
        assert await asyncio.to_thread(process.wait, LIMIT_S) == 0
    told = sum(text.startswith("the server stops soon") for _, text in ends)
    assert told > 10, ends  # some may find the socket closed already


def test_frames_without_a_name_cannot_be_shortened() -> None:
    """Whoever did that would end the server with SIGBUS at the next look at a frame."""
    with FrameStore(16) as store:
        fd = os.open(store.path, os.O_RDWR)
        try:
            for size in (0, 17 * 4096):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, size)
            store.map[:1] = b"x"
        finally:
            os.close(fd)
