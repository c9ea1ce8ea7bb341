"""The pages: at which address they are, what they ask the server for, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from nicegui import ui

from mmubus.console import content
from mmubus.console.content import SpaceLook
from mmubus.console.markup import Html, note, section, tag
from mmubus.errors import CallFailed, MmuBusError
from mmubus.linux import PAGE_SIZE, TASK_SIZE
from mmubus.look import Timeline, Watch

__all__ = ["Pages"]

EVERY_S = 1.0
RUNS_MAX = 4096
STYLE = Path(__file__).with_name("console.css").read_text()
# The focus and the colours outlive an update and a page: what is redrawn is found again by its id.
SCRIPT = """<script>
document.documentElement.dataset.theme = localStorage.getItem("theme") || "";
function turnTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  localStorage.setItem("theme", document.documentElement.dataset.theme = now === "dark" ? "light" : "dark");
}
let focused = "";
document.addEventListener("focusin", event => { focused = event.target.id; });
document.addEventListener("pointerdown", () => { focused = ""; });
new MutationObserver(() => {
  if (focused && document.activeElement === document.body)
    document.getElementById(focused)?.focus({preventScroll: true});
}).observe(document, {childList: true, subtree: true});
</script>"""


class Pages:
    """The console's pages, all of one server. Args: watch: what they look with."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._timeline = Timeline()

    def add_to(self, app: FastAPI) -> None:
        """Put the pages where browsers find them."""
        ui.page("/")(self._overview_page)
        ui.page("/mm/{mm}")(self._space_page)
        ui.page("/round/{number}")(self._round_page)
        ui.page("/session/{number}")(self._session_page)
        ui.page("/violations")(self._violations_page)
        ui.run_with(app, title="mmubus", favicon="🚌", show_welcome_message=False)

    async def _overview_page(self) -> None:
        await self._show("Overview", self._overview)

    async def _space_page(self, mm: int, start: str = "", end: str = "", page: str = "") -> None:
        await self._show(f"mm {mm}", lambda: self._space(mm, start, end, page))

    async def _round_page(self, number: int) -> None:
        await self._show(f"Round {number}", lambda: self._round(number))

    async def _session_page(self, number: int) -> None:
        await self._show(f"Session {number}", lambda: self._session(number))

    async def _violations_page(self) -> None:
        await self._show("Violations", self._violations)

    async def _show(self, title: str, make: Callable[[], Awaitable[Html]]) -> None:
        """A page that is made again every second while somebody looks at it."""
        ui.page_title(f"{title} - mmubus")
        ui.add_css(STYLE)
        ui.add_head_html(SCRIPT)
        page = ui.html(await self._make(title, make), sanitize=False)

        async def again() -> None:
            page.set_content(await self._make(title, make))

        ui.timer(EVERY_S, again, immediate=False)

    async def _make(self, title: str, make: Callable[[], Awaitable[Html]]) -> Html:
        watch = self._watch
        await watch.look()
        if watch.latest is not None and watch.failed is None:
            self._timeline.add(watch.latest)
        try:
            async with asyncio.timeout(10.0):
                main = await make()
        except CallFailed as error:
            main = section("Not to be shown", note(error.message or str(error)))
        except (MmuBusError, TimeoutError) as error:
            main = note("" if watch.failed is not None else str(error) or "the server did not answer in time")
        old = "old" if watch.failed is not None else None
        body = tag("main", content.banner(watch), tag("div", main, class_=old), id="main", data_ready="", tabindex=-1)
        return tag("div", tag("a", "Skip to the contents", href="#main", class_="skip"), self._header(title), body,
                   class_="console")  # fmt: skip

    def _header(self, title: str) -> Html:
        pages = (("Overview", "/"), ("Violations", "/violations"))
        links = [
            tag("a", name, href=where, id=f"nav-{name}", aria_current="page" if name == title else None)
            for name, where in pages
        ]
        server = [self._watch.bus.address]
        if self._watch.latest is not None and self._watch.latest.statistics is not None:
            server.append(f"version {self._watch.latest.statistics.version}")
        button = tag("button", "Light / dark", type="button", id="theme", onclick="turnTheme()")
        brand = tag("a", "mmubus", href="/", class_="brand", id="nav-brand")
        return tag("header", brand, tag("nav", *links), tag("span", ", ".join(server), class_="server"), button)

    # What each page asks for.

    async def _overview(self) -> Html:
        return content.overview(self._watch, self._timeline)

    async def _space(self, mm: int, start: str, end: str, page: str) -> Html:
        inspection = self._watch.bus.inspection
        try:
            low, high = (int(start, 0), int(end, 0)) if end else (0, 0)
            at = int(page, 0) if page else None
        except ValueError:
            return section("Not an address", note(f"Write {page or start or end!r} as 4096 or 0x1000."))
        if at is not None and not 0 <= at < TASK_SIZE:
            return section("Not an address", note(f"{at:#x} is outside of every address space."))
        low, high = low & -PAGE_SIZE, -(-high // PAGE_SIZE) * PAGE_SIZE
        mappings, runs, holders = await asyncio.gather(
            inspection.maps(mm),
            inspection.pagemap(mm, low, high, swapped=True),
            inspection.holders(mm, low, high, runs_max=RUNS_MAX),
        )
        if at is not None and not low <= at < (high or TASK_SIZE):
            runs = [*runs, *await inspection.pagemap(mm, at & -PAGE_SIZE, (at & -PAGE_SIZE) + PAGE_SIZE, swapped=True)]
        glance = self._watch.latest
        names = {} if glance is None else {one.mm: one.name for one in glance.address_spaces}
        return content.space(
            SpaceLook(
                mm, names.get(mm, ""), mappings, runs, holders,
                [] if glance is None else [one for one in glance.open if one.mm == mm],
                [] if glance is None else glance.ended,
                low, high, at, None if at is None else await inspection.explain_page(mm, at),
            )
        )  # fmt: skip

    async def _round(self, number: int) -> Html:
        return content.one_round(await self._watch.bus.inspection.explain(number))

    async def _session(self, number: int) -> Html:
        for one in () if self._watch.latest is None else self._watch.latest.sessions:
            if one.session == number:
                return content.one_session(one)
        return section("No such session", note(f"Session {number} is not there, nor is it remembered."))

    async def _violations(self) -> Html:
        return content.violations(await self._watch.bus.inspection.violations(100))
