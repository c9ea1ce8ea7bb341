"""How commands print: tables for people on a terminal or in a pipe, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from mmubus.channel import ADDRESS_VARIABLE

__all__ = ["AsJson", "Mm", "Server", "errors", "plain", "print_json", "print_table", "standard"]

Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        "-s",
        envvar=ADDRESS_VARIABLE,
        metavar="ADDRESS",
        help="unix:/path or host:port. Default: this user's own Unix socket.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]

Mm = Annotated[int, typer.Argument(metavar="MM", help="The address space's number, from `mmubus mm list`.")]

WIDE = 160


def standard() -> Console:
    """Standard output. In a pipe, lines are not cut at 80 columns."""
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)


def errors() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False)


def plain(value: Any) -> Any:
    """A message or a value as JSON has it: the contract's own field names, numbers as numbers."""
    if isinstance(value, Message):
        return _numbers(
            value, MessageToDict(value, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        )
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    if isinstance(value, (list, tuple)):
        value = [plain(one) for one in value]
    print(json.dumps(plain(value), indent=2))


def print_table(titles: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """A table; columns whose title ends in # are numbers. empty: what to say when there are no rows."""
    console = standard()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_header=any(titles))
    for title in titles:
        table.add_column(title.rstrip("#"), justify="right" if title.endswith("#") else "left")
    found = False
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
        found = True
    console.print(table if found else empty)


def _numbers(message: Message, found: dict[str, Any]) -> dict[str, Any]:
    """protobuf's JSON writes 64-bit numbers as text; every number is a number here."""
    for field in message.DESCRIPTOR.fields:
        value = found.get(field.name)
        if value is None:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            found[field.name] = dict(getattr(message, field.name))  # of plain values, as all maps of the contract are
        elif field.message_type is not None:
            inner = getattr(message, field.name)
            if isinstance(value, list):
                found[field.name] = [_numbers(one, part) for one, part in zip(inner, value, strict=True)]
            elif isinstance(value, dict):
                found[field.name] = _numbers(inner, value)
        elif field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
            found[field.name] = [int(one) for one in value] if isinstance(value, list) else int(value)
    return found
