"""A finding: what the server has to say to a session about its behaviour. Nothing waits for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """kind: a `Breach`; message: a sentence for people; lines: the story behind it, one sentence a line."""

    kind: str
    message: str
    lines: tuple[str, ...] = ()
