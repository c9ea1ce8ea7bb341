"""The tables that issue 4's parts are accounted for in: no row is empty."""

from __future__ import annotations

import re

import pytest
from source_tree import ROOT

TEST = re.compile(r"`tests/[\w/]+\.py(::\w+)?`")


def rows(document: str, heading: str) -> list[list[str]]:
    """The cells of each row of the first table below the heading."""
    text = (ROOT / "docs" / document).read_text()
    below = text[text.index(heading) :].splitlines()
    start = next(at for at, line in enumerate(below) if line.startswith("|"))
    table = []
    for line in below[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


@pytest.mark.parametrize(
    ("document", "heading", "count"),
    [
        ("call-sites.md", "## The seed's call sites", 19),
        ("call-sites.md", "## Mainline's call sites", 66),
        ("hmm-tests.md", "# The kernel's HMM tests", 38),
    ],
)
def test_each_row_names_a_test(document: str, heading: str, count: int) -> None:
    table = rows(document, heading)
    assert len(table) == count
    assert [row for row in table if not TEST.search(row[-1])] == []


def test_all_cases_of_the_kernels_tests_are_there() -> None:
    assert [int(row[0]) for row in rows("hmm-tests.md", "# The kernel's HMM tests")] == list(range(1, 39))


def test_each_semantic_has_a_test_of_its_number() -> None:
    found: set[int] = set()
    for name in ("test_semantics.py", "test_semantics_memory.py"):
        for match in re.finditer(r"^def test_((?:\d\d_)+)", (ROOT / "tests/notify" / name).read_text(), re.MULTILINE):
            found.update(int(number) for number in match[1].rstrip("_").split("_"))
    assert found == set(range(1, 41))
