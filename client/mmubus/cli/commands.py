"""A command's help is its docstring, laid out: the source's line ends are none of the reader's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import typer
from rich.markup import escape

__all__ = ["add_command", "laid_out"]

EXAMPLE = "    "


def laid_out(text: str) -> str:
    """A docstring as help: paragraphs of one line each, examples as at a prompt, brackets as they stand."""
    found: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith(EXAMPLE) and found:
            found[-1] += "".join(f"\n$ {line.strip()}" for line in paragraph.splitlines())
        else:
            found.append(" ".join(paragraph.split()))
    return escape("\n\n".join(found))


def add_command(app: typer.Typer, name: str, command: Callable[..., Any], *, help: str = "", **options: Any) -> None:
    """Add a command. Args: help: instead of the docstring; options: of `typer.Typer.command`."""
    app.command(name, help=laid_out(help or command.__doc__ or ""), **options)(command)
