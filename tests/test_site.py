"""The documents as pages: built without a warning, and nothing on them is loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="the extra [docs] is not installed"),
]
LOADED = re.compile(r"""<(?:script|img|iframe|source|audio|video)\b[^>]*?\ssrc="([^"]*)"|<link\b[^>]*?>""")
STYLE_LOADS = re.compile(r"""(?:@import\s+|url\()["']?((?:https?:)?//[^"')]+)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built strictly: a link that leads nowhere is an error."""
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def loads(page: str) -> set[str]:
    """Addresses that a browser asks for by itself when it shows a page."""
    found = set()
    for match in LOADED.finditer(page):
        if match[1]:
            found.add(match[1])
        elif (href := re.search(r'href="([^"]*)"', match[0])) and 'rel="canonical"' not in match[0]:
            found.add(href[1])
    return found


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    outside = {
        f"{page.relative_to(site)}: {address}"
        for page in pages
        for address in loads(page.read_text())
        if re.match(r"(?:https?:)?//", address)
    }
    styles = [*site.rglob("*.css"), *pages]
    outside |= {f"{one.relative_to(site)}: {found}" for one in styles for found in STYLE_LOADS.findall(one.read_text())}
    assert outside == set()


def test_the_contract_s_page_has_every_call_and_message(site: Path) -> None:
    page = (site / "reference" / "contract.html").read_text()
    names = re.findall(r"^\s*(?:rpc|message|service|enum) (\w+)", _contract(), re.MULTILINE)
    assert len(names) > 100
    assert [name for name in names if name not in page] == []
    assert "Who holds translations of a range, or exports its frames." in page


def test_the_reference_has_the_docstrings(site: Path) -> None:
    page = (site / "reference" / "client.html").read_text()
    for wanted in ("mmu_notifier_register()", "invalidate_range_start", "<strong>Raises:</strong>"):
        assert wanted in page


def _contract() -> str:
    return "\n".join(path.read_text() for path in (ROOT / "proto").rglob("*.proto"))
