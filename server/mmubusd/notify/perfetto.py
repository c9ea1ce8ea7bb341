"""A recording as a picture: Chrome's trace-event JSON, which ui.perfetto.dev and chrome://tracing open.

Two groups of tracks: address spaces, with their rounds from opening to lifting; and sessions, with each notice from its
outbox to its answer. Grants, accesses, fences and freed frames are marks on them. Times are in µs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mmubusd.notify.history import Event, What

MMS, SESSIONS = 1, 2
US = 1e6
MARKS = {
    What.GRANTED, What.DMA_READ, What.DMA_WRITTEN, What.STALE, What.FENCED, What.DEMOTED, What.REGISTERED,
    What.UNREGISTERED, What.DIRTIED, What.RETURNED, What.WITHDRAWN, What.CLIENT_USES, What.CLIENT_WROTE,
}  # fmt: skip


def trace_events(events: Iterable[Event]) -> Iterator[dict[str, object]]:
    """The traceEvents of a recording, in no particular order."""
    yield from _names(MMS, "address spaces")
    yield from _names(SESSIONS, "sessions")
    rounds: dict[int, Event] = {}
    notices: dict[tuple[int, int, int], Event] = {}
    seen: set[tuple[int, int]] = set()
    for event in events:
        for group, track, name in ((MMS, event.mm, "mm"), (SESSIONS, event.session, "session")):
            if track and (group, track) not in seen:
                seen.add((group, track))
                yield _meta("thread_name", group, track, f"{name} {track}")
        match event.what:
            case What.ROUND_OPENED:
                rounds[event.round] = event
            case What.LIFTED if event.round in rounds:
                opened = rounds.pop(event.round)
                where = " ".join(f"{start:x}-{end:x}" for start, end in opened.ranges[:3])
                yield _span(opened, event.at, MMS, opened.mm, f"round {opened.round}: {opened.text} {where}".rstrip())
            case What.PUT:
                notices[event.round, event.session, event.registration] = event
            case What.ACKED | What.REFUSED:
                put = notices.pop((event.round, event.session, event.registration), None)
                if put is not None:
                    answer = "" if event.what is What.ACKED else ", refused"
                    yield _span(put, event.at, SESSIONS, put.session, f"round {put.round}: {put.text}{answer}")
            case What.FREED:
                yield _mark(event, MMS, 0, f"{len(event.pfns)} frames freed")
            case what if what in MARKS:
                yield _mark(event, SESSIONS, event.session, f"{what.value}{': ' + event.text if event.text else ''}")


def _span(begun: Event, ended_at: float, group: int, track: int, name: str) -> dict[str, object]:
    return {
        "ph": "X", "name": name, "pid": group, "tid": track, "ts": begun.at * US,
        "dur": max(ended_at - begun.at, 0.0) * US, "args": {"registration": begun.registration, "round": begun.round},
    }  # fmt: skip


def _mark(event: Event, group: int, track: int, name: str) -> dict[str, object]:
    args = {"registration": event.registration, "start": event.start, "frames": list(event.pfns[:16])}
    return {"ph": "i", "s": "t", "name": name, "pid": group, "tid": track, "ts": event.at * US, "args": args}


def _names(group: int, name: str) -> Iterator[dict[str, object]]:
    yield _meta("process_name", group, 0, name)


def _meta(what: str, group: int, track: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": what, "pid": group, "tid": track, "args": {"name": name}}
