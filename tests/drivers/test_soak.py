"""All drivers at once, for a while; `drivers.soak` runs it for as long as is asked."""

from __future__ import annotations

import pytest
from drivers.cells import UNMAPPED, Cell
from drivers.soak import soak


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("seed", [1])
async def test_all_drivers_at_once(seed: int) -> None:
    outcome = await soak(20.0, seed)
    if not outcome.good and outcome.starved:
        pytest.skip(f"this process was not scheduled for {outcome.stall_s[0]:.1f} s, and connections broke")
    assert outcome.good, str(outcome)
    assert outcome.rounds > 20
    assert not outcome.idle, str(outcome)


def test_a_cell_holds_what_was_written_last() -> None:
    cell = Cell(b"old")
    cell.begin(b"new")
    assert cell.candidates == {b"old", b"new"}
    cell.end()
    assert cell.candidates == {b"new"}


def test_what_overlaps_may_have_happened_in_either_order() -> None:
    cell = Cell(b"old")
    cell.begin(b"one")
    with cell.watched() as seen:
        cell.begin(UNMAPPED)
        cell.end()
    cell.end(done=False)
    assert seen == {b"old", b"one", UNMAPPED}
    assert cell.candidates == {b"one", UNMAPPED}


def test_what_perhaps_did_not_happen_leaves_both() -> None:
    cell = Cell(b"old")
    cell.begin(b"new")
    cell.end(done=False)
    assert cell.candidates == {b"old", b"new"}
