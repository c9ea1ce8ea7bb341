"""Running it: health that tells the truth, logs that stay small, configuration that changes, a stop in its bound."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import grpc
import grpc.aio
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mmu.v1 import address_space_pb2, address_space_pb2_grpc, session_pb2, session_pb2_grpc, types_pb2
from mmubusd.rpc import EmbeddedServer
from mmubusd.rpc import log as log_module
from mmubusd.rpc.config import Settings
from mmubusd.rpc.lag import TICK_S
from mmubusd.rpc.log import EVENTS_PER_S, Level, Sampler, make_log
from mmubusd.rpc.reload import LIVE, reload
from mmubusd.rpc.server import LIVENESS
from patience import LIMIT_S, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
BASE = 0x7000_0000_0000


BUSY_S = 8.0
"""What a machine that is busy may add, to end a process; far less than the budgets that are waited for otherwise."""


async def health_of(peer, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(peer.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def until_serving(peer) -> None:
    async def serving() -> bool:
        return await health_of(peer) == SERVING

    await until(serving)


@pytest.mark.parametrize("options", [{"health_lag_s": 0.5}])
async def test_a_loop_that_lags_is_not_serving_and_comes_back(server: EmbeddedServer, peer) -> None:
    await until_serving(peer)  # a busy machine may lag by itself
    time.sleep(TICK_S + 0.8)  # noqa: ASYNC251 - the point of it
    await asyncio.sleep(0.05)
    assert await health_of(peer) == NOT_SERVING
    assert await health_of(peer, LIVENESS) == SERVING
    assert server.server.lag.take_worst() >= 0.5
    await until_serving(peer)


async def test_lag_does_not_undo_draining(server: EmbeddedServer, peer) -> None:
    await server.server.drain()
    server.server.lag.over = True
    server.server.lag._set(False)
    await asyncio.sleep(0.05)
    assert await health_of(peer) == NOT_SERVING


def test_of_what_happens_often_some_is_written() -> None:
    now = [0.0]
    sample = Sampler(3, lambda: now[0])
    for n in range(3):
        assert sample(None, "info", {"event": "often", "n": n}) == {"event": "often", "n": n}
    for _ in range(7):
        with pytest.raises(structlog.DropEvent):
            sample(None, "info", {"event": "often"})
    assert sample(None, "error", {"event": "often"})["not_written"] == 7  # errors always are
    assert sample(None, "info", {"event": "rare"}) == {"event": "rare"}
    now[0] = 1.0
    assert sample(None, "info", {"event": "often"}) == {"event": "often"}


def test_the_level_can_be_changed_and_secrets_are_hidden() -> None:
    out = io.StringIO()
    level = Level("warning")
    log = make_log(level, "json", out)
    log.info("quiet")
    level.change("info")
    log.info("loud", token="precious", session=7)
    assert "quiet" not in out.getvalue()
    assert "precious" not in out.getvalue()
    assert '"session": 7' in out.getvalue()


async def test_sessions_that_come_and_go_do_not_fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "Sampler", partial(Sampler, clock=lambda: 0.0))  # all within one second
    out = io.StringIO()
    settings = Settings.model_validate({"listen": ("127.0.0.1:0",), "frames_nr": 64, "drain_s": 0.0})
    async with (
        EmbeddedServer(settings, make_log("info", "json", out)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub = session_pb2_grpc.SessionServiceStub(channel)
        for _ in range(4 * EVENTS_PER_S):
            call = stub.Attach()
            await call.write(session_pb2.AttachRequest(hello=session_pb2.Hello(version=1)))
            await call.read()
            await call.write(session_pb2.AttachRequest(leave=session_pb2.Leave()))
            await call.code()
    assert out.getvalue().count("session attached") == EVENTS_PER_S


async def test_limits_change_while_it_runs(server: EmbeddedServer, peer, fails) -> None:
    old = server.server.settings
    fresh = old.model_copy(update={"address_spaces_max": 1, "sessions_max": 1, "touch_pages_max": 1, "frames_nr": 99})
    mm = await peer.space(2)
    assert reload(server.server, fresh)
    await fails(peer.space(), grpc.StatusCode.ABORTED, "EAGAIN")
    await peer.attach().hello()
    second = peer.attach()
    await second.send(hello=session_pb2.Hello(version=1))
    await second.ends_with(grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
    call = address_space_pb2.Call(op=address_space_pb2.OP_WRITE, mm=mm, args=[BASE, 8192])
    result = (await peer.spaces.Call(address_space_pb2.CallRequest(call=call))).result
    assert result.error.errno == "E2BIG"
    assert server.server.settings.frames_nr == old.frames_nr  # that one needs a restart
    assert reload(server.server, old)
    await peer.space()


def test_live_options_are_options() -> None:
    assert set(Settings.model_fields) >= LIVE


async def start(tmp_path: Path, *flags: str) -> tuple[asyncio.subprocess.Process, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import sys; from mmubusd.rpc import main; sys.exit(main())",
        "--listen", f"unix:{tmp_path}/s.sock", "--frames-nr", "64", *flags,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, "MMUBUS_LOG_FORMAT": "json"},
    )  # fmt: skip
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode().strip()
    assert line.startswith("listening on "), (await process.communicate())[1].decode()
    return process, line.removeprefix("listening on ")


async def test_what_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    """The last door is taken: those before it are closed again, whichever they are."""
    async with EmbeddedServer(listen=("127.0.0.1:0",), frames_nr=64) as other:
        for taken in ({"metrics_listen": other.address}, {"listen": (f"unix:{tmp_path}/s.sock", other.address)}):
            given = {"listen": (f"unix:{tmp_path}/s.sock",), "unix_users": ("*",), "frames_nr": 64, **taken}
            with pytest.raises(OSError, match="in use"):
                await EmbeddedServer(**given).__aenter__()
            assert not (tmp_path / "s.sock").exists()


async def test_sighup_reads_the_file_again(tmp_path: Path) -> None:
    file = tmp_path / "mmubus.toml"
    file.write_text('log_level = "warning"\naddress_spaces_max = 1\n')
    process, address = await start(tmp_path, "--config", str(file), "--watch-s", "0")
    assert process.stderr is not None
    async with grpc.aio.insecure_channel(address) as channel:
        stub = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
        await stub.Create(address_space_pb2.CreateRequest())
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Create(address_space_pb2.CreateRequest())
        file.write_text('log_level = "nonsense"\n')
        process.send_signal(signal.SIGHUP)
        assert b"not read again" in await asyncio.wait_for(process.stderr.readline(), LIMIT_S)
        file.write_text('log_level = "info"\naddress_spaces_max = 9\nmessage_bytes_max = 100000\n')
        process.send_signal(signal.SIGHUP)
        told = await asyncio.wait_for(process.stderr.readline(), LIMIT_S)
        assert b'"changed": ["address_spaces_max", "log_level"]' in told
        assert b'"needs_a_restart": ["message_bytes_max"]' in told
        await stub.Create(address_space_pb2.CreateRequest())
    process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 0


async def test_a_stop_is_bounded_whatever_clients_do(tmp_path: Path) -> None:
    """A notifier that never answers, and one that does not even read: SIGTERM to end within drain_s and two seconds."""
    process, address = await start(tmp_path, "--drain-s", "0.5", "--ack-budget-s", "30")
    async with grpc.aio.insecure_channel(address) as channel:
        spaces = address_space_pb2_grpc.AddressSpaceServiceStub(channel)
        mm = (await spaces.Create(address_space_pb2.CreateRequest())).mm
        await spaces.Mmap(address_space_pb2.MmapRequest(mm=mm, addr=BASE, length=4096, prot=3, flags=0x32))
        await spaces.Store(address_space_pb2.StoreRequest(mm=mm, addr=BASE, data=b"x"))
        streams = []
        for _ in range(2):
            stream = session_pb2_grpc.SessionServiceStub(channel).Attach()
            await stream.write(session_pb2.AttachRequest(hello=session_pb2.Hello(version=1)))
            await stream.read()
            register = session_pb2.Register(mm=mm, ops=[types_pb2.NOTIFIER_OP_INVALIDATE_RANGE])
            await stream.write(session_pb2.AttachRequest(request=1, register=register))
            await stream.read()
            streams.append(stream)
        unmapping = asyncio.ensure_future(spaces.Munmap(address_space_pb2.MunmapRequest(mm=mm, addr=BASE, length=4096)))
        await streams[0].read()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, logged = await asyncio.wait_for(process.communicate(), 25)
        assert time.monotonic() - began < 0.5 + 2.0 + BUSY_S
        with pytest.raises(grpc.aio.AioRpcError):
            await unmapping
        for stream in streams:
            stream.cancel()
    assert process.returncode == 0
    assert b"operations were still open" in logged
