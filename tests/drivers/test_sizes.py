"""Each driver is short enough to be read as the description of its protocol."""

from __future__ import annotations

from pathlib import Path

import mmubus.drivers
import pytest
from source_tree import ROOT

LINES_MAX = 300
MODULES = sorted(Path(mmubus.drivers.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_driver_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < LINES_MAX


def test_the_list_of_drivers_is_complete() -> None:
    told = (ROOT / "docs" / "drivers" / "README.md").read_text()
    missing = [path.name for path in MODULES if path.name != "__init__.py" and path.name not in told]
    assert missing == []
