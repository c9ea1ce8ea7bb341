"""The memory core against the recorded kernel: every operation of every random recording, equal in every field."""

from pathlib import Path

import pytest
from oracle.core import replay

FOLDER = Path(__file__).parent / "traces"
TRACES = sorted([*FOLDER.glob("random-*.jsonl.gz"), *FOLDER.glob("calls-*.jsonl.gz")])
"""calls-*: random operations with every advice, mlock, more flags and unaligned holes among them."""


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name.removesuffix(".jsonl.gz"))
def test_equal_in_every_operation(path: Path) -> None:
    report = replay(path)
    assert report.operations > 0
    assert report.first == []
    assert not any(report.mismatched.values())


def test_invariants_hold_after_every_operation() -> None:
    report = replay(FOLDER / "random-file-1.jsonl.gz", check=True)
    assert report.first == []
