"""The validators: each finds its rule broken in the shortest recording that breaks it, and nothing in a good one."""

from typing import Any

import pytest
from mmubusd.notify.history import Event, History, What
from mmubusd.notify.validators import judge
from notify.transcript import PAGE

OPS = "invalidate_range_start invalidate_range_end"
REGISTERED = Event(0.0, What.REGISTERED, session=1, registration=1, mm=1, end=1 << 40, text=OPS)
GRANTED = Event(0.0, What.GRANTED, session=1, registration=1, mm=1, start=0, end=PAGE, pfns=(7,), generations=(3,))
OPENED = Event(1.0, What.ROUND_OPENED, round=1, mm=1, ranges=((0, PAGE),), text="invalidate_range")
PUT = Event(1.0, What.PUT, round=1, session=1, registration=1, text="invalidate_range_start")
ACKED = Event(1.5, What.ACKED, round=1, session=1, registration=1)
ENDED = Event(1.5, What.ROUND_ENDED, round=1)
FREED = Event(1.5, What.FREED, pfns=(7,), generations=(3,))
LIFTED = Event(1.5, What.LIFTED, round=1)
END_PUT = Event(1.5, What.END_PUT, round=1, session=1, registration=1)
GOOD = [REGISTERED, GRANTED, OPENED, PUT, ACKED, ENDED, FREED, LIFTED, END_PUT]


def without(*left_out: Event) -> list[Event]:
    return [event for event in GOOD if event not in left_out]


def after(event: Event, *more: Event) -> list[Event]:
    at = GOOD.index(event) + 1
    return [*GOOD[:at], *more, *GOOD[at:]]


def other(what: What, **fields: Any) -> Event:
    return Event(1.6, what, **{"session": 1, "registration": 1, **fields})


WROTE = other(What.CLIENT_WROTE, start=0, pfns=(7,))
USES = other(What.CLIENT_USES, start=0, pfns=(7,), generations=(3,))
DMA = other(What.DMA_WRITTEN, mm=1, start=0, pfns=(7,), generations=(3,))
FENCED = Event(1.2, What.FENCED, session=1)
ELSEWHERE = other(What.REGISTERED, registration=2, mm=1, start=8 * PAGE, end=9 * PAGE)


def test_a_good_recording() -> None:
    assert judge(GOOD) == []
    assert judge(after(GRANTED, USES, DMA, WROTE, other(What.DIRTIED, start=0, pfns=(7,)))) == []
    withdrawn = [REGISTERED, GRANTED, OPENED, PUT, FENCED, other(What.WITHDRAWN), ENDED, FREED, LIFTED]
    assert judge(withdrawn) == [], "a fence is as good as an ack"


@pytest.mark.parametrize(
    ("rule", "events"),
    [
        ("NoUseAfterFree", without(ACKED)),
        ("NoUseAfterFree", after(FREED, USES)),
        ("BarredWhileActive", after(OPENED, GRANTED)),
        ("EveryRoundEnds", [event._replace(at=9.0) if event is ENDED else event for event in GOOD]),
        ("EveryRoundEnds", [REGISTERED, OPENED]),
        ("Complete", without(PUT, END_PUT)),
        ("Complete", without(END_PUT)),
        ("Complete", without(PUT)),
        ("Ordered", after(PUT, other(What.CLIENT_RECEIVED, number=2))),
        ("FencedStaysFenced", after(PUT, FENCED)),
        ("Isolation", [*after(REGISTERED, ELSEWHERE), other(What.PUT, round=1, registration=2)]),
        ("Isolation", [*after(REGISTERED, ELSEWHERE._replace(mm=2)), other(What.PUT, round=1, registration=2)]),
        ("DirtyIsNotLost", after(PUT, WROTE)),
        ("OldPageNeverWritten", after(ACKED, DMA)),
    ],
)
def test_each_rule_broken(rule: str, events: list[Event]) -> None:
    violations = judge(events)
    assert rule in {violation.rule for violation in violations}
    assert all(str(violation).startswith(violation.rule) for violation in violations)


def test_exports_are_known_by_their_frames() -> None:
    rmap = other(What.REGISTERED, registration=1, mm=0)
    export = other(What.GRANTED, pfns=(7, -1), generations=(3, 0))
    opened = OPENED._replace(mm=0, ranges=(), pfns=(7,), text="rmap_invalidate_page")
    good = [rmap, export, opened, PUT._replace(text=""), ACKED._replace(pfns=(7,)), ENDED, FREED, LIFTED]
    assert judge(good) == []
    assert [one.rule for one in judge([*good[:3], export, *good[3:]])] == ["BarredWhileActive"]
    assert {one.rule for one in judge([*good[:3], *good[5:]])} == {"Complete", "NoUseAfterFree"}
    assert judge([rmap, export, other(What.RETURNED, pfns=(7,)), FREED]) == []


def test_nothing_is_kept_unless_it_is_recorded() -> None:
    history = History()
    history.note(What.FENCED, session=1)
    assert history.events == []
