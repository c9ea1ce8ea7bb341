"""The console in a real browser, against a real server."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import mmubus
import pytest
from browser import Browser, chromium, running
from mmubus.cli import main
from mmubus.cli.embedded import embedded_server
from mmubus.errors import UnsafeConnection
from scene import HEAP, SHARED, Scene, scene

MISSING = [name for name in ("nicegui", "playwright") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extras [console] and [dev])"),
    pytest.mark.skipif(chromium() is None, reason="there is no Chromium (apt-get install chromium, or CHROMIUM=path)"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    address = f"unix:{tmp_path_factory.mktemp('console')}/bus.sock"
    with running("serve", "--listen", address, "--frames-nr", "8192", "--ack-budget-s", "30") as said:
        assert said == f"listening on {address}"
        yield address


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with Browser.started() as started:
        yield started


@pytest.fixture(scope="module")
def console(server: str) -> Iterator[str]:
    with running("console", "--server", server, "--listen", "127.0.0.1:0") as said:
        yield said.removeprefix("listening on ")


@pytest.fixture
async def stage(server: str) -> AsyncIterator[Scene]:
    async with scene(server) as set_up:
        yield set_up


async def test_nothing_comes_from_elsewhere(console: str, browser: Browser, stage: Scene) -> None:
    number = stage.program.__index__()
    await stage.churn(3)
    for path in ("/", f"/mm/{number}", f"/mm/{number}?page={HEAP:#x}", "/violations", "/session/1", "/round/1"):
        await browser.open(console + path)
    await asyncio.sleep(1.5)  # updates come over a socket
    assert len(browser.requests) > 20
    assert browser.hosts == {"127.0.0.1"}
    assert browser.errors == []


async def test_who_is_late_stands_there_and_the_round_says_who_is_to_blame(
    console: str, browser: Browser, stage: Scene
) -> None:
    await browser.open(console)
    await browser.says("Nobody is waited for.")
    stage.slow.may_go.clear()
    call = asyncio.ensure_future(stage.program.madvise(SHARED, 4096, mmubus.MADV_DONTNEED))
    row = browser.page.locator("tr.alarming", has_text="slow-dpu")
    await row.wait_for()  # without reloading, and marked as late after a second
    await browser.page.locator("circle.open").wait_for()  # strictly one
    await row.locator("a").click()
    await browser.says("slow-dpu: read after")
    stage.slow.may_go.set()
    await call
    await browser.says("it ended after")


async def test_an_address_space_is_a_picture(console: str, browser: Browser, stage: Scene) -> None:
    await browser.open(f"{console}/mm/{stage.program.__index__()}")
    page = browser.page
    assert await page.locator(".mapping").count() == 5
    assert await page.locator(".track", has_text="nic-1").locator(".bar").count() == 2
    widths = [(await box.bounding_box() or {})["width"] for box in await page.locator(".mapping").all()]
    heap, pool = widths[2], widths[3]
    assert 1.7 < heap / pool < 2.1  # 512 pages and 256, but for the least width
    await page.locator(".mapping").nth(2).click()
    await page.wait_for_url("**start=0x10000000*")
    await page.wait_for_selector("[data-ready]")
    assert await page.locator(".mapping").count() == 1
    await browser.says("show everything")


async def test_one_page_s_history(console: str, browser: Browser, stage: Scene) -> None:
    await browser.open(f"{console}/mm/{stage.program.__index__()}")
    await browser.page.get_by_label("Address").fill(f"{HEAP + 200 * 4096:#x}")
    await browser.page.get_by_role("button", name="Show its history").click()
    await browser.says("It is not resident.")
    await browser.says("taken by madvise(0x100c8000")
    await browser.says("acknowledged at")
    await browser.page.get_by_label("Address").fill("nonsense")
    await browser.page.keyboard.press("Enter")
    await browser.says("Write 'nonsense' as 4096 or 0x1000.")


async def test_violations_are_explained(console: str, browser: Browser, stage: Scene) -> None:
    await browser.open(f"{console}/violations")
    await browser.says("stale-access, refused: broken-nic")
    await browser.says("taken by madvise")
    await browser.page.get_by_role("link", name=f"the page 0x100c8000 of mm {stage.program.__index__()}").first.click()
    await browser.says("Who holds translations")


async def test_everything_is_reached_by_keyboard_and_the_focus_stays(
    console: str, browser: Browser, stage: Scene
) -> None:
    await browser.open(console)
    page = browser.page
    for _ in range(40):
        await page.keyboard.press("Tab")
        if await page.evaluate("document.activeElement.matches('a') && document.activeElement.text") == "trainer-save":
            break
    where = await page.evaluate("document.activeElement.id")
    assert where.startswith("to-/mm/")
    await stage.churn(5, 0.3)  # the page changes below the focus
    await asyncio.sleep(1.2)
    assert await page.evaluate("document.activeElement.id") == where
    await page.keyboard.press("Enter")
    await page.wait_for_url(f"**/mm/{stage.child.__index__()}")


async def test_dark_and_light(console: str, browser: Browser) -> None:
    await browser.open(console)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = await browser.page.evaluate(ground)
    await browser.dark()
    dark = await browser.page.evaluate(ground)
    assert light != dark
    await browser.page.get_by_role("button", name="Light / dark").click()
    assert await browser.page.evaluate(ground) == light
    await browser.open(f"{console}/violations")
    assert await browser.page.evaluate(ground) == light  # remembered


async def test_addresses_of_what_is_not_there_say_so(console: str, browser: Browser) -> None:
    await browser.open(f"{console}/mm/99")
    await browser.says("Not to be shown")
    await browser.open(f"{console}/session/99")
    await browser.says("Session 99 is not there")


async def test_names_are_text(console: str, server: str, browser: Browser) -> None:
    async with mmubus.connect(server, name="<img src=x onerror=alert(1)>") as bus:
        mm = await bus.create_mm("<script>document.title='taken'</script>")
        await bus.mirror(mm)
        await browser.open(console)
        await browser.says("<img src=x onerror=alert(1)>")
        await browser.open(f"{console}/mm/{mm.__index__()}")
        await browser.says("<script>")
        assert "taken" not in await browser.page.title()
        assert browser.errors == []


async def test_a_server_that_goes_away_and_comes_back(browser: Browser, tmp_path: object) -> None:
    address = f"unix:{tmp_path}/bus.sock"
    with running("console", "--server", address, "--listen", "127.0.0.1:0") as said:
        url = said.removeprefix("listening on ")
        await browser.open(url)
        await browser.says(f"Not connected to {address}")
        await browser.says("mmubus serve")
        async with embedded_server(("--listen", address)) as again, mmubus.connect(again) as bus:
            await browser.says("No driver is connected.")
            await browser.says("mmubus demo --server ADDRESS")
            await bus.create_mm("here-again")
            await browser.says("here-again")
            assert await browser.page.get_by_role("alert").count() == 0
        await browser.page.get_by_role("alert").wait_for()
        await browser.says("here-again")  # what was known stays, marked as old


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:8080", "example.org:80"])
def test_an_address_that_others_reach_is_refused(listen: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mmubus.console.serve import serve

    with pytest.raises(UnsafeConnection, match="--public"):
        serve(None, listen)
    assert main(["console", "--listen", listen]) == 1
    assert "--public" in capsys.readouterr().err


async def test_a_name_that_is_not_ours_is_refused(console: str) -> None:
    """A page elsewhere whose name is turned to this machine (DNS rebinding) gets nothing."""
    host, port = console.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    with suppress(ConnectionError):
        await writer.drain()
    assert b" 400 " in (await reader.readline())
    writer.close()
