"""The memory core against the recorded kernel: every operation of every random recording, equal in every field."""

from pathlib import Path

import pytest
from oracle.core import replay

FOLDER = Path(__file__).parent / "traces"
KINDS = (
    "random",
    "calls",
    "swap",
    "thp",
    "shmem",
    "hugeshm",
    "khugepaged",
    "hugetlb",
    "uffd",
    "policy",
    "bad",
    "sealed",
)
TRACES = sorted(path for kind in KINDS for path in FOLDER.glob(f"{kind}-*.jsonl.gz"))
"""calls-*: every advice, mlock, more flags, unaligned holes; swap-*: with a swap file; thp-*: huge pages, shmem-*: of
shared memory too, hugeshm-*: made by faults, khugepaged-*: by passes; hugetlb-*; uffd-*: registered with userfaultfds,
and moved by them; policy-*: memory policies, and pages that move by them, also of hugetlb; bad-*, sealed-*: calls that
fail, or nearly."""


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name.removesuffix(".jsonl.gz"))
def test_equal_in_every_operation(path: Path) -> None:
    report = replay(path)
    assert report.operations > 0
    assert report.first == []
    assert not any(report.mismatched.values())


@pytest.mark.parametrize(
    ("name", "each"),
    [("random-file-1", 1), ("swap-1", 1), ("hugetlb-1", 9), ("policy-4", 1), ("bad-1", 1), ("sealed-1", 1)],
)
def test_invariants_hold_after_every_operation(name: str, each: int) -> None:
    """each: after so many operations, where thousands of pages are looked at each time."""
    report = replay(FOLDER / f"{name}.jsonl.gz", check_each=each)
    assert report.first == []
