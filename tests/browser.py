"""A headless Chromium, and commands in processes of their own for it to look at."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.async_api import Page

FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage""".split()
WIDTH, HEIGHT = 1280, 860
MARGIN = 48
"""Pixels below the contents on a picture."""
BOTTOM = """Math.max(...[...document.querySelectorAll('[data-ready] *')]
    .filter(each => !each.children.length).map(each => each.getBoundingClientRect().bottom + scrollY))"""
NAVIGATIONS_MAX = 5
LIMIT_MS = 60_000
"""How long a page may take for anything: machines that run tests are busy."""
START = "import sys; from mmubus.cli import main; sys.exit(main(sys.argv[1:]))"


def chromium() -> str | None:
    """Where a Chromium is."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page of a headless browser.

    Attributes: page: playwright's own. requests: every address that was asked for. errors: what the page complained of.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda socket: self.requests.append(socket.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)

    @classmethod
    @asynccontextmanager
    async def started(cls) -> AsyncIterator[Browser]:
        from playwright.async_api import async_playwright

        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
            try:
                page = await browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
                page.set_default_timeout(LIMIT_MS)
                yield cls(page)
            finally:
                await browser.close()

    @property
    def hosts(self) -> set[str | None]:
        """Whom the page asked for anything. What it carries in itself (data:) asks nobody."""
        return {
            urlsplit(url).hostname for url in self.requests if urlsplit(url).scheme not in ("data", "blob", "about")
        }

    async def open(self, url: str) -> None:
        """Go there and wait until the page has its contents."""
        from playwright.async_api import Error

        for left in reversed(range(NAVIGATIONS_MAX)):
            try:
                await self.page.goto(url, wait_until="domcontentloaded")
                break
            except Error as error:
                # The page before loads itself anew when its connection was lost, and that ends our going elsewhere.
                if "ERR_ABORTED" not in error.message or not left:
                    raise
        await self.page.wait_for_selector("[data-ready]")

    async def dark(self) -> None:
        await self.page.emulate_media(color_scheme="dark")

    async def shoot(self, path: Path) -> None:
        """A picture of the whole page, down to where its contents end."""
        bottom = await self.page.evaluate(BOTTOM)
        size = {"x": 0, "y": 0, "width": WIDTH, "height": bottom + MARGIN}
        await self.page.screenshot(path=str(path), full_page=True, clip=size)

    async def draw(self, svg: str, path: Path) -> None:
        """A picture of a drawing."""
        await self.page.set_content(f"<body style='margin:0;background:#111'>{svg}</body>")
        await self.page.locator("svg").first.screenshot(path=str(path))

    async def says(self, text: str) -> None:
        """Wait until the page shows a text."""
        await self.page.get_by_text(text).first.wait_for()


@contextmanager
def running(*command: str) -> Iterator[str]:
    """An `mmubus` command in a process of its own, until it is left; yields the first line that it prints."""
    process = subprocess.Popen([sys.executable, "-c", START, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline().strip()
        assert line.startswith("listening on "), line
        yield line
    finally:
        process.terminate()
        process.communicate(timeout=20)
