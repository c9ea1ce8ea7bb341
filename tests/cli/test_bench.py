"""`mmubus bench`: what it prints where, and its exit status."""

from __future__ import annotations

import json

import pytest
from mmubus.bench import effort
from mmubus.cli import main

KEYS = ["measure", "unit", "ours", "other", "against", "ratio", "bound", "met"]


@pytest.mark.slow
def test_json_is_a_list_of_rows_and_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = effort.Effort(runs=1, rounds=5, flights=50, chunks=2, operations=300, curve=False)
    monkeypatch.setattr("mmubus.bench.QUICK", tiny)
    assert main(["bench", "--quick", "--json", "--part", "core"]) == 0
    said = capsys.readouterr()
    rows = json.loads(said.out)
    assert len(rows) == 6
    assert all(list(row) == KEYS for row in rows)
    assert any(row["bound"] == "ratio <= 1.05" and isinstance(row["met"], bool) for row in rows)
    assert "core: munmap" in said.err


def test_an_unknown_part_is_a_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--part", "nonsense"]) == 2
    assert "there are core, rounds" in capsys.readouterr().err
