"""A recording as people read it: one line an event, from the left to the right in time, who and what."""

from __future__ import annotations

from mmubusd.notify.history import Event


def line_of(event: Event) -> str:
    """One event in one line; fields that say nothing are left out."""
    where = []
    if event.session:
        where.append(f"session {event.session}")
    if event.registration:
        where.append(f"registration {event.registration}")
    if event.round:
        where.append(f"round {event.round}")
    if event.mm:
        where.append(f"mm {event.mm}")
    if event.ranges:
        where.append(" ".join(f"{start:x}-{end:x}" for start, end in event.ranges[:4]))
    elif event.start or event.end:
        where.append(f"{event.start:x}-{event.end:x}" if event.end else f"{event.start:x}")
    if event.pfns:
        generations = event.generations or (None,) * len(event.pfns)
        frames = [f"{pfn}" if one is None else f"{pfn}.{one}" for pfn, one in zip(event.pfns, generations, strict=True)]
        where.append("frames " + " ".join(frames[:8]) + (f" and {len(frames) - 8} more" if len(frames) > 8 else ""))
    if event.number:
        where.append(f"number {event.number}")
    return f"{event.at:12.6f}  {event.what:<16} {', '.join(where)}{': ' + event.text if event.text else ''}"
