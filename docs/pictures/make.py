"""Make the pictures of the documents, from a server with drivers of all kinds at work.

    .venv/bin/python docs/pictures/make.py [NAME ...]

Needs the extras [top], [console] and [dev], and a Chromium (CHROMIUM=/path/to/it, else what is on the PATH).
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "tests"))

import mmubus  # noqa: E402
from browser import Browser, running  # noqa: E402
from mmubus.cli.embedded import embedded_server  # noqa: E402
from mmubus.look import Watch  # noqa: E402
from scene import SHARED, Scene, scene  # noqa: E402

OPTIONS = ("--frames-nr", "8192")
BUDGET = {"top": ("--ack-budget-s", "3"), "console": ("--ack-budget-s", "30")}
TOP_SIZE = (132, 25)
DEMO_WIDTH = 112


async def picture_of_top(address: str, stage: Scene, browser: Browser) -> None:
    """`mmubus top`, while one driver is late."""
    from mmubus.top.app import Top

    async with mmubus.connect(address, name="mmubus top") as bus:
        watch = Watch(bus, fresh_s=0.0)
        app = Top(watch, interval_s=0.5)
        async with app.run_test(size=TOP_SIZE):
            await stage.churn(40)
            work = asyncio.ensure_future(stage.churn(4000, 0.01, shared=False))
            stage.slow.may_go.clear()
            late = asyncio.ensure_future(stage.program.madvise(SHARED, 4096, mmubus.MADV_DONTNEED))
            while not (watch.latest and any(one.late for one in watch.latest.sessions) and watch.rate("rounds")):
                await asyncio.sleep(0.5)
                await app.refresh_all()
            await asyncio.sleep(0.3)
            work.cancel()
            svg = app.export_screenshot(title="mmubus top")
            stage.slow.may_go.set()
            await late
    await browser.draw(_fonts(svg), HERE / "top.png")


async def picture_of_demo(browser: Browser) -> None:
    """`mmubus demo`, when two fifths of the recording have been played."""
    from mmubus.cli.demo import DRIVERS, HOW, READERS, recording, title, view
    from mmubus.trace.format import read_trace
    from mmubus.trace.replay import Stage, replay
    from rich.console import Console

    console = Console(record=True, width=DEMO_WIDTH, force_terminal=True, color_system="truecolor", highlight=False)
    with recording(None) as path:
        trace = read_trace(path)

    async def watch(stage: Stage) -> None:
        while True:
            await asyncio.sleep(0.02)
            if stage.played > len(trace.operations) * 2 // 5:
                console.print(f"{title(trace, bundled=True)}\n\n{HOW}\n", view(stage))
                return

    async with embedded_server() as address:
        await replay(trace, address, drivers=DRIVERS, readers_max=READERS, spectator=watch)
    await browser.draw(_fonts(console.export_svg(title="mmubus demo")), HERE / "demo.png")


def _fonts(svg: str) -> str:
    """The drawing with a font of this machine's: its own would be loaded from elsewhere."""
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "DejaVu Sans Mono")


@asynccontextmanager
async def someone_late(stage: Scene, at: int) -> AsyncIterator[None]:
    """A round that one driver does not answer, for as long as this lasts."""
    stage.slow.may_go.clear()
    call = asyncio.ensure_future(stage.program.madvise(at, 20 * 4096, mmubus.MADV_DONTNEED))
    yield
    stage.slow.may_go.set()
    await call


async def pictures_of_the_console(address: str, stage: Scene, browser: Browser) -> None:
    """The console's pages, light and dark."""
    with running("console", "--server", address, "--listen", "127.0.0.1:0") as said:
        url = said.removeprefix("listening on ")
        work = asyncio.ensure_future(stage.churn(4000, 0.05))
        await browser.open(url)
        await asyncio.sleep(30.0)
        work.cancel()
        work = asyncio.ensure_future(stage.churn(4000, 0.02, shared=False))
        async with someone_late(stage, SHARED + 70 * 4096):
            await asyncio.sleep(10.5)
            await browser.shoot(HERE / "console.png")
        number = stage.program.__index__()
        await browser.open(f"{url}/mm/{number}")
        async with someone_late(stage, SHARED + 100 * 4096):
            await asyncio.sleep(2.5)
            await browser.shoot(HERE / "console-address-space.png")
        await browser.open(f"{url}/violations")
        await browser.shoot(HERE / "console-violations.png")
        await browser.open(f"{url}/mm/{number}?page=0x100c8000")
        await browser.shoot(HERE / "console-page.png")
        await browser.dark()
        await browser.open(f"{url}/mm/{number}")
        await browser.shoot(HERE / "console-dark.png")
        work.cancel()


PICTURES: dict[str, Callable[[str, Scene, Browser], Awaitable[None]]] = {
    "top": picture_of_top,
    "console": pictures_of_the_console,
}


async def main(names: list[str]) -> None:
    """Make the pictures of these names; none: all."""
    async with Browser.started() as browser:
        for name in names or ("demo", *PICTURES):
            if name == "demo":
                await picture_of_demo(browser)
                continue
            async with embedded_server((*OPTIONS, *BUDGET[name])) as address, scene(address, slow_s=0.15) as stage:
                await PICTURES[name](address, stage, browser)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
