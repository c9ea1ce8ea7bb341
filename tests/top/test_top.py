"""`mmubus top` on a real server: driven by keys, as a person does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from io import StringIO

import mmubus
import pytest
from mmubus.look import Watch
from mmubusd.rpc import EmbeddedServer
from patience import until
from rich.console import Console
from scene import SHARED, Scene, scene

pytest.importorskip("textual", reason="the extra [top] is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # of textual's own doing; ours are errors in all other tests

from mmubus.top import frame  # noqa: E402
from mmubus.top.app import Top  # noqa: E402
from textual.widgets import DataTable, Static  # noqa: E402


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(frames_nr=1 << 13, ack_budget_s=20) as running:
        yield running


@pytest.fixture
async def watch(server: EmbeddedServer) -> AsyncIterator[Watch]:
    async with mmubus.connect(server.address, name="top") as bus:
        yield Watch(bus, fresh_s=0.0)


def text(app: Top) -> str:
    """What stands on the screen."""
    console = Console(width=200, file=StringIO(), color_system=None)
    console.print(app.query_one("#headline", Static).content)
    return console.file.getvalue()


def rows(app: Top, name: str) -> list[list[str]]:
    table = app.query_one(f"#{name}", DataTable)
    return [[str(cell) for cell in table.get_row(key)] for key in table.rows]


def column(app: Top, name: str, title: str) -> list[str]:
    table = app.query_one(f"#{name}", DataTable)
    at = [str(each.label).rstrip(" ▲▼") for each in table.columns.values()].index(title)
    return [row[at] for row in rows(app, name)]


async def test_who_is_late_stands_there_by_name(server: EmbeddedServer, watch: Watch) -> None:
    async with scene(server.address) as stage:
        stage.slow.may_go.clear()
        call = asyncio.ensure_future(stage.program.madvise(SHARED, 4096, mmubus.MADV_DONTNEED))
        app = Top(watch, interval_s=0.25)
        async with app.run_test(size=(140, 40)):
            await until(lambda: column(app, "rounds", "waits for") == ["slow-dpu"])
            assert "waiting for slow-dpu" in text(app)
            assert {"trainer", "trainer-save"} <= set(column(app, "spaces", "name"))
            stage.slow.may_go.set()
            await call
            await until(lambda: column(app, "rounds", "waits for") == [])


async def outdo(server: EmbeddedServer, stage: Scene) -> None:
    """The slow driver is waited for until it has done more harm than any other, however slow the machine made those."""
    bus = server.server.bus
    harm = max(session.harm_s for session in bus.sessions.values())
    stage.slow.may_go.clear()
    call = asyncio.ensure_future(stage.program.madvise(SHARED, 4096, mmubus.MADV_DONTNEED))
    await until(lambda: bus.rounds.open)
    await asyncio.sleep(2 * harm + 0.1)
    stage.slow.may_go.set()
    await call


async def test_sessions_are_sorted_by_harm_and_by_what_keys_say(server: EmbeddedServer, watch: Watch) -> None:
    async with scene(server.address) as stage:
        await outdo(server, stage)
        app = Top(watch)
        async with app.run_test(size=(140, 40)) as pilot:
            assert column(app, "sessions", "session")[0] == "slow-dpu"
            await pilot.press("s")
            names = column(app, "sessions", "session")
            assert names == sorted(names)
            await pilot.press("r")
            assert column(app, "sessions", "session") == names[::-1]


async def test_a_filter_hides_other_rows_until_escape(server: EmbeddedServer, watch: Watch) -> None:
    async with scene(server.address):
        app = Top(watch)
        async with app.run_test(size=(140, 40)) as pilot:
            everyone = column(app, "sessions", "session")
            await pilot.press("slash", *"NIC", "enter")
            assert set(column(app, "sessions", "session")) == {"nic-1", "broken-nic"}
            await pilot.press("slash", "escape")
            assert set(column(app, "sessions", "session")) == set(everyone)


async def test_paused_stays_as_it_is(server: EmbeddedServer, watch: Watch) -> None:
    app = Top(watch)
    async with app.run_test() as pilot, mmubus.connect(server.address) as bus:
        assert column(app, "spaces", "name") == []
        await pilot.press("p")
        await bus.create_mm("new")
        await app.refresh_all()
        assert column(app, "spaces", "name") == []
        await pilot.press("p")
        await app.refresh_all()
        assert column(app, "spaces", "name") == ["new"]


@pytest.mark.parametrize(("table", "says"), [("sessions", "notifiers"), ("spaces", "pages resident")])
async def test_enter_opens_a_row_and_escape_closes_it(
    server: EmbeddedServer, watch: Watch, table: str, says: str
) -> None:
    async with scene(server.address):
        app = Top(watch)
        async with app.run_test(size=(140, 40)) as pilot:
            app.query_one(f"#{table}", DataTable).focus()
            await pilot.press("enter")
            await pilot.pause()
            assert says in str(app.screen.query_one(Static).content)
            await pilot.press("escape")
            await pilot.pause()
            assert app.screen is app.screen_stack[0]


async def test_a_server_that_goes_away_is_told_and_the_rest_stays() -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(EmbeddedServer(frames_nr=64))
        async with mmubus.connect(server.address, name="top") as bus:
            await bus.create_mm("program")
            app = Top(Watch(bus, fresh_s=0.0))
            async with app.run_test():
                await stack.aclose()
                await app.refresh_all()
                assert "not connected" in text(app)
                assert column(app, "spaces", "name") == ["program"]


async def test_nothing_there_yet(watch: Watch) -> None:
    app = Top(watch)
    async with app.run_test():
        assert rows(app, "sessions") == []
        assert "nobody is waited for" in text(app)


async def test_one_frame_has_everything(server: EmbeddedServer, watch: Watch) -> None:
    async with scene(server.address) as stage:
        await stage.churn(3)
        await watch.look()
        console = Console(width=160, file=StringIO(), color_system=None)
        console.print(frame(watch))
        said = console.file.getvalue()
    for wanted in ("rounds/s", "frames ", "slow-dpu", "trainer-save", "Open rounds", "Address spaces"):
        assert wanted in said


async def test_scene_is_what_it_says(server: EmbeddedServer) -> None:
    async with scene(server.address) as stage:
        assert isinstance(stage, Scene)
        assert "madvise" in stage.violation
