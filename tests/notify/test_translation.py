"""Translation tables: against a dict of pages."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mmubusd.notify.translation import NOTHING, Dropped, ExportTable, TranslationTable
from notify.transcript import PAGE

PAGES = 1500  # three leaf tables
pages = st.integers(0, PAGES - 1)
steps = st.lists(st.tuples(st.sampled_from(("grant", "drop")), pages, st.integers(1, 700)), max_size=12)


def grant(table: TranslationTable, first: int, count: int, rights: int = 3) -> None:
    numbers = np.arange(first, first + count)
    table.grant(
        first * PAGE, (numbers + 5).astype(np.uint64), (numbers % 7).astype(np.uint32), np.full(count, rights, np.uint8)
    )


@settings(deadline=None)  # machines are shared
@given(steps)
def test_as_a_dict_of_pages(script: list[tuple[str, int, int]]) -> None:
    table, model = TranslationTable(), dict[int, int]()
    watchers: dict[int, set[Any]] = {}
    owner: Any = "owner"
    table.watchers, table.owner = watchers, owner
    generation = np.zeros(PAGES * 2 + 10, np.uint32)
    generation[5 : PAGES * 2 + 5] = np.arange(PAGES * 2) % 7
    for what, first, count in script:
        if what == "grant":
            grant(table, first, count)
            model.update((page, page + 5) for page in range(first, first + count))
        else:
            gone = [page for page in model if first <= page < first + count]
            assert table.count(first * PAGE, (first + count) * PAGE) == len(gone)
            assert table.holds(first * PAGE, (first + count) * PAGE) == bool(gone)
            assert table.drop(first * PAGE, (first + count) * PAGE, generation)[:2] == Dropped(len(gone), 0)[:2]
            for page in gone:
                del model[page]
        assert table.held == len(model)
        assert set(watchers) == {page >> 9 for page in model}
    for page in range(0, PAGES + 700, 97):
        held = table.get(page * PAGE)
        assert (held.pfn if held is not None else None) == model.get(page)
    assert table.drop_all(generation).pages == len(model)
    assert table.held == 0
    assert not watchers


def test_frames_freed_before_the_drop_are_noticed() -> None:
    table = TranslationTable()
    grant(table, 0, 4)
    generation = np.arange(16, dtype=np.uint32) - np.uint32(5)
    generation[5 + 2] += 1
    assert table.drop(0, 4 * PAGE, generation)[:2] == Dropped(4, 1)[:2]


def test_pages_without_rights_are_left_as_they_are() -> None:
    table = TranslationTable()
    grant(table, 0, 2, rights=1)
    grant(table, 0, 600, rights=0)
    assert table.held == 2
    held = table.get(PAGE)
    assert held is not None
    assert held.rights == 1
    assert table.drop(10 * PAGE, 20 * PAGE, np.zeros(16, np.uint32)) == NOTHING


def test_rights_add_up_until_they_are_acked_away() -> None:
    table = TranslationTable()
    grant(table, 0, 1, rights=3)
    grant(table, 0, 1, rights=1)
    held = table.get(0)
    assert held is not None
    assert held.rights == 3


def test_exports() -> None:
    table = ExportTable()
    generation = np.zeros(16, np.uint32)
    table.grant(3, 0, 1)
    table.grant(3, 0, 2)
    held = table.get(3)
    assert held is not None
    assert held.rights == 3, "rights add up"
    table.grant(3, 1, 1)
    held = table.get(3)
    assert held is not None
    assert held.rights == 1, "not over two lives of a frame"
    assert table.held == 1
    assert table.drop(4, generation) == NOTHING
    assert table.drop(3, generation)[:2] == Dropped(1, 1)[:2]
    table.grant(5, 0, 1)
    assert table.pfns() == [5]
    assert table.drop_all(generation)[:2] == Dropped(1, 0)[:2]
