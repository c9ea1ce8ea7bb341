"""HTML by hand: every text that comes from a server or a driver is escaped here, and nowhere else is it needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TypeVar

from mmubus.look import Column

__all__ = ["Html", "join", "link", "note", "section", "table", "tag"]

T = TypeVar("T")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(content: object) -> Html:
    """HTML that shows a text as it is."""
    return content if isinstance(content, Html) else Html(escape(str(content)))


def tag(kind: str, /, *contents: object, **attributes: object) -> Html:
    """An element. Attributes: class_ is class, under_scores are hyphens; one that is None is left out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{kind}{said}>{join(contents)}</{kind}>")


def join(contents: Iterable[object]) -> Html:
    """One after another."""
    return Html("".join(text(one) for one in contents))


def link(address: str, content: object, **attributes: object) -> Html:
    """A link, with an id by which the focus is found again after the page has changed."""
    return tag("a", content, href=address, id=f"to-{address}", **attributes)


def note(content: object) -> Html:
    """What stands where there is nothing to show."""
    return tag("p", content, class_="note")


def section(title: str, *contents: object, about: str = "") -> Html:
    """A part of a page under a heading."""
    said = tag("span", about, class_="about") if about else ""
    return tag("section", tag("h2", title, said), *contents)


def table(
    caption: str,
    columns: Sequence[Column[T]],
    rows: Sequence[T],
    *,
    empty: object,
    to: Callable[[T], str] | None = None,
    link_at: int = 0,
    alarming: Callable[[T], bool] = lambda row: False,
) -> Html:
    """A table, or a note when it has no rows.

    Args: caption: for those who hear the page. to: where the link in column link_at goes. alarming: rows to be marked.
    """
    if not rows:
        return note(empty)
    head = [tag("th", column.title, scope="col", class_="number" if column.number else None) for column in columns]
    body = []
    for row in rows:
        cells = []
        for index, column in enumerate(columns):
            content: object = column.text(row)
            if to is not None and index == link_at:
                content = link(to(row), content or "(no name)")
            cells.append(tag("td", content, class_="number" if column.number else None))
        body.append(tag("tr", *cells, class_="alarming" if alarming(row) else None))
    whole = tag("table", tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body))
    return tag("div", whole, class_="scrolled")
