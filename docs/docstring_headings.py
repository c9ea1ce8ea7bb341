"""Docstrings as they are written here, as Markdown: a paragraph for each heading, a line for each argument."""

from __future__ import annotations

import re
from typing import Any

import griffe

HEADING = re.compile(r"^(Kernel|Requires|Ensures|Args|Attributes|Returns|Yields|Raises): ?", re.MULTILINE)
SECTION = re.compile(r"^\*\*(?:Args|Attributes):\*\* ?\n((?:    .*\n?)+)", re.MULTILINE)
ITEM = re.compile(r"^    (\*?[a-z_]\w*(?:, \*?[a-z_]\w*)*): ", re.MULTILINE)


class Headings(griffe.Extension):
    """Rewrites every docstring before it is rendered."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring of ours as Markdown."""
    text = HEADING.sub(r"\n**\1:** ", text + "\n")
    return SECTION.sub(lambda found: f"{found[0].splitlines()[0]}\n\n{_items(found[1])}\n", text).strip()


def _items(block: str) -> str:
    return "\n".join(ITEM.sub(r"- `\1`: ", line) if ITEM.match(line) else f"  {line}" for line in block.splitlines())
