"""Files that change while the server runs are taken up by themselves, as Kubernetes and people change them."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from mmubusd.rpc.config import load
from mmubusd.rpc.identity import Principal, digest
from mmubusd.rpc.log import make_log
from mmubusd.rpc.reload import Watch
from mmubusd.rpc.server import Server

from .conftest import ROLES, TOKENS, read, token_lines

WAIT_S = 60
LOOK_S = 0.01


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - files are looked at by time
            await asyncio.sleep(LOOK_S)


def mount(directory: Path, files: dict[str, str]) -> None:
    """Put files there as the kubelet does: a new directory, and one link that is turned to it in one step."""
    number = len(list(directory.glob("..2*")))
    fresh = directory / f"..2026_{number}"
    fresh.mkdir()
    for name, text in files.items():
        (fresh / name).write_text(text)
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(f"..data/{name}")
    (directory / "..data_tmp").symlink_to(fresh.name)
    os.replace(directory / "..data_tmp", directory / "..data")


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    mount(tmp_path, {"tokens": token_lines(TOKENS), "roles.toml": ROLES})
    return tmp_path


@pytest.fixture
def options() -> dict[str, object]:
    return {"watch_s": LOOK_S}


async def test_a_mounted_secret_that_is_turned_is_taken_up(server, caller, secrets: Path, log: io.StringIO) -> None:
    """A token is taken away by the turn of a link, which touches neither path nor time of the files that are named."""
    alice, driver = caller("alice"), caller("driver")
    mm = await alice.space("shared-1")
    await driver.attach("driver")
    assert (await driver.register(mm)).registered.registration
    left = {name: token for name, token in TOKENS.items() if name != "driver"}
    mount(secrets, {"tokens": token_lines(left), "roles.toml": ROLES})
    assert "lost its rights" in (await read(driver.streams[-1])).fenced.message
    await until(lambda: "configuration read again" in log.getvalue())
    assert '"files have changed"' in log.getvalue()
    for secret in (*TOKENS.values(), *(line.split(":")[1] for line in token_lines(TOKENS).split())):
        assert secret not in log.getvalue()


async def test_what_cannot_be_read_is_told_once_and_changes_nothing(server, caller, secrets: Path, log) -> None:
    alice = caller("alice")
    mount(secrets, {"tokens": "alice:nonsense\n", "roles.toml": ROLES})
    await until(lambda: "the configuration is not read again" in log.getvalue())
    await alice.space("still hers")
    mount(secrets, {"tokens": token_lines(TOKENS), "roles.toml": ""})
    await until(lambda: "configuration read again" in log.getvalue())
    assert log.getvalue().count("not read again") == 1
    assert "nonsense" not in log.getvalue()
    driver = Principal("token:driver", digest(TOKENS["driver"]).encode())
    assert not server.server.driver.authority.roles_on_mm(driver, 1)


async def test_a_copy_that_is_under_way_is_not_read_in_half(tmp_path: Path) -> None:
    """While it grows, each look finds another file; only what stands still for one look counts."""
    path, seen = tmp_path / "roles", []
    path.write_text("before")
    watch = Watch([path], LOOK_S, lambda changed: seen.append((changed, path.read_text())))
    try:
        with path.open("w") as file:
            for _ in range(20):
                file.write("x" * 100)
                file.flush()
                watch._look()  # a look between every two pieces, whatever the loop's timer does
            assert not seen
        await until(lambda: bool(seen))
        assert seen == [([path], "x" * 2000)]
        path.unlink()
        path.with_suffix(".new").write_text("after")
        path.with_suffix(".new").rename(path)
        await until(lambda: len(seen) == 2)
        assert seen[1] == ([path], "after")
    finally:
        watch.close()


async def test_the_configuration_file_is_watched_too(tmp_path: Path) -> None:
    """As a config map that is mounted: what is live changes, and the log says what needs a restart."""
    mount(tmp_path, {"mmubusd.toml": "sessions_max = 7\n"})
    log = io.StringIO()
    argv = ["--config", f"{tmp_path}/mmubusd.toml", "--listen", f"unix:{tmp_path}/s", "--watch-s", "0.01",
            "--frames-nr", "64", "--drain-s", "0"]  # fmt: skip
    server = Server(load(argv), make_log("info", "json", log), again=lambda: load(argv))
    await server.start()
    try:
        assert server.bus.limits.sessions_max == 7
        mount(tmp_path, {"mmubusd.toml": "sessions_max = 8\nframes_nr = 128\nnodes_nr = 2\n"})
        await until(lambda: server.bus.limits.sessions_max == 8)
        assert '"needs_a_restart": ["nodes_nr"]' in log.getvalue()
        mount(tmp_path, {"mmubusd.toml": "sessions_max = 'many'\n"})
        await until(lambda: "the configuration is not read again" in log.getvalue())
        assert server.bus.limits.sessions_max == 8
    finally:
        await server.stop()


@pytest.mark.parametrize("options", [{"watch_s": 0.0}])
async def test_watching_can_be_turned_off(server, secrets: Path, log: io.StringIO) -> None:
    mount(secrets, {"tokens": token_lines(TOKENS), "roles.toml": ""})
    assert server.server._watch is None
    assert server.server.read_again()  # what SIGHUP does
    assert "files have changed" not in log.getvalue()
