"""The screen of `mmubus top`: three tables that can be sorted, filtered and opened, above them the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mmu.v1 import inspection_pb2 as pb
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Label, Static

from mmubus.errors import MmuBusError
from mmubus.look import ROUNDS, SESSIONS, SPACES, Column, Watch, late, matches
from mmubus.top.details import round_text, session_text, space_text
from mmubus.top.frame import EMPTY, TITLES, headline

__all__ = ["Top"]

INTERVAL_MIN_S = 0.25
CELL_MAX = 44
"""Characters of a cell; what is longer can be read by opening its row."""
COLUMNS: dict[str, Sequence[Column[Any]]] = {"rounds": ROUNDS, "sessions": SESSIONS, "spaces": SPACES}


class Rows(DataTable[Text]):
    """A table, with its own keys at the bottom of the screen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select_cursor", "Open"),
        Binding("tab", "app.focus_next", "Next table"),
    ]


class Details(ModalScreen[None]):
    """What is known about one row."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,q,enter", "app.pop_screen", "Back")]

    def __init__(self, text: Text) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="details"):
            yield Static(self._text)
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(VerticalScroll).focus()


class Top(App[None]):
    """Looks at a server every interval_s seconds.

    Args: watch: what to look with. interval_s: seconds between two looks.
    """

    TITLE = "mmubus top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #headline { height: auto; padding: 0 1; }
    .title { padding: 0 1; color: $text-muted; text-style: bold; margin-top: 1; }
    .title.focused { color: $text-accent; }
    DataTable { height: auto; max-height: 1fr; min-height: 2; }
    #rounds { max-height: 30%; }
    #filter { display: none; dock: bottom; height: 3; margin-bottom: 1; }
    #filter.shown { display: block; }
    Details { align: center middle; }
    #details { width: 90%; max-width: 120; height: auto; max-height: 85%; border: round $accent; padding: 0 1;
               background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "sort", "Sort"),
        Binding("r", "reverse", "Reverse"),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("p", "pause", "Pause"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, watch: Watch, *, interval_s: float = 1.0) -> None:
        super().__init__()
        self._server = watch
        self._interval_s = max(INTERVAL_MIN_S, interval_s)
        self._sorted_by = dict.fromkeys(COLUMNS, 0)
        self._reversed = dict.fromkeys(COLUMNS, False)
        self._only = dict.fromkeys(COLUMNS, "")
        self._filtering = "sessions"
        self._found: dict[str, dict[str, Any]] = {name: {} for name in COLUMNS}
        self.paused = False

    def compose(self) -> ComposeResult:
        yield Static("looking …", id="headline")
        for name in COLUMNS:
            yield Label(TITLES[name], id=f"{name}-title", classes="title")
            yield Rows(id=name, cursor_type="row", zebra_stripes=True)
        yield Input(placeholder="only rows with this text; Enter to apply, Escape for all", id="filter")
        yield Footer()

    async def on_mount(self) -> None:
        self._table("sessions").focus()
        await self.refresh_all()
        self.set_interval(self._interval_s, self.refresh_all)

    async def refresh_all(self) -> None:
        """Look, and show what there is; nothing happens while it is paused."""
        if not self.paused:
            await self._server.look()
            self._show()

    def _table(self, name: str) -> DataTable[Text]:
        return self.query_one(f"#{name}", DataTable)

    @property
    def current(self) -> str:
        """The table that has the keyboard, or had it last."""
        focused = self.focused
        return focused.id if isinstance(focused, DataTable) and focused.id in COLUMNS else self._filtering

    # What is shown.

    def _show(self) -> None:
        if self.screen_stack and self.screen is not self.screen_stack[0]:
            return  # a row is open; what is below it would not be seen
        if not self.query("#headline"):
            return  # it was left while a look was on its way
        self.query_one("#headline", Static).update(headline(self._server))
        glance = self._server.latest
        if glance is not None:
            self._fill("rounds", glance.open, lambda one: str(one.round))
            self._fill("sessions", glance.sessions, lambda one: str(one.session))
            self._fill("spaces", glance.address_spaces, lambda one: str(one.mm))

    def _fill(self, name: str, rows: Sequence[Any], number: Any) -> None:
        columns, wanted = COLUMNS[name], self._only[name]
        rows = [row for row in rows if not wanted or matches(columns, row, wanted)]
        rows.sort(key=columns[self._sorted_by[name]].key, reverse=self._reversed[name])
        self._found[name] = {number(row): row for row in rows}
        table = self._table(name)
        at, scrolled = _key_under_cursor(table), table.scroll_y
        table.clear(columns=True)
        texts = [[_clip(column.text(row)) for column in columns] for row in rows]
        for index, column in enumerate(columns):
            arrow = (" ▲" if self._reversed[name] else " ▼") if index == self._sorted_by[name] else "  "
            width = max([len(column.title) + len(arrow), *(len(line[index]) for line in texts)])
            table.add_column(Text(column.title + arrow, justify="right" if column.number else "left"), width=width)
        for (key, row), line in zip(self._found[name].items(), texts, strict=True):
            style = "bold red" if _alarming(row) else ""
            cells = zip(line, columns, strict=True)
            table.add_row(*(Text(cell, style, justify="right" if c.number else "left") for cell, c in cells), key=key)
        if at in self._found[name]:
            table.move_cursor(row=table.get_row_index(at), animate=False, scroll=False)
            table.scroll_to(y=scrolled, animate=False)
        title = TITLES[name] + (f"  (only with {wanted!r})" if wanted else "")
        self.query_one(f"#{name}-title", Label).update(title if rows else f"{title}: {EMPTY[name]}")

    # What the keys do.

    def action_sort(self) -> None:
        """The next column."""
        name = self.current
        self._sorted_by[name] = (self._sorted_by[name] + 1) % len(COLUMNS[name])
        self._show()

    def action_reverse(self) -> None:
        self._reversed[self.current] = not self._reversed[self.current]
        self._show()

    def action_pause(self) -> None:
        self.paused = not self.paused
        self.query_one("#headline", Static).update(
            Text("paused; p goes on", "bold yellow") if self.paused else headline(self._server)
        )

    def action_filter(self) -> None:
        self._filtering = self.current
        field = self.query_one("#filter", Input)
        field.value = self._only[self._filtering]
        field.add_class("shown")
        field.focus()

    def on_input_submitted(self, submitted: Input.Submitted) -> None:
        self._apply_filter(submitted.value)

    def on_key(self, event: Any) -> None:
        if event.key == "escape" and isinstance(self.focused, Input):
            self._apply_filter("")

    def _apply_filter(self, wanted: str) -> None:
        self._only[self._filtering] = wanted.strip()
        self.query_one("#filter", Input).remove_class("shown")
        self._table(self._filtering).focus()
        self._show()

    async def on_data_table_row_selected(self, selected: DataTable.RowSelected) -> None:
        """Open a row: what is known about it is asked for now."""
        row = self._found[selected.data_table.id or ""].get(selected.row_key.value or "")
        if row is not None:
            await self.push_screen(Details(await self._details(row)))

    async def _details(self, row: Any) -> Text:
        inspection = self._server.bus.inspection
        try:
            if isinstance(row, pb.Session):
                return session_text(row)
            if isinstance(row, pb.Round):
                return round_text(await inspection.explain(row.round))
            return space_text(row, await inspection.maps(row.mm), await inspection.holders(row.mm))
        except MmuBusError as error:
            return Text(f"this cannot be shown any more: {error}", "yellow")


def _key_under_cursor(table: DataTable[Text]) -> str:
    if not table.row_count:
        return ""
    return table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value or ""


def _clip(text: str) -> str:
    return text if len(text) <= CELL_MAX else f"{text[: CELL_MAX - 1]}…"


def _alarming(row: Any) -> bool:
    if isinstance(row, pb.Round):
        return late(row)
    return isinstance(row, pb.Session) and row.state == "fenced"
