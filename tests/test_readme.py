"""The README's drivers are 20 lines, are the ones in client/examples, and run as printed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import LIMIT_S
from source_tree import ROOT

EXAMPLES = [ROOT / "client/examples/driver.py", ROOT / "client/examples/driver_sync.py"]
LINES_MAX = 20


def python_blocks(text: str) -> list[str]:
    """The Python code blocks of a Markdown text."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


BLOCKS = python_blocks((ROOT / "README.md").read_text())


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in a process of its own."""
    socket = f"unix:{tmp_path_factory.mktemp('readme')}/bus.sock"
    code = "from mmubusd.rpc import main; raise SystemExit(main())"
    server = subprocess.Popen([sys.executable, "-c", code, "--listen", socket], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        assert server.stdout.readline().startswith("listening on")
        yield socket
    finally:
        server.terminate()
        server.communicate(timeout=LIMIT_S)


def run(script: Path, address: str) -> str:
    """Run a script as a user would, warnings being errors. Returns: what it printed."""
    environment = {**os.environ, "MMUBUS_ADDRESS": address}
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_twenty_lines_and_is_in_the_readme(example: Path) -> None:
    text = example.read_text()
    assert len(text.splitlines()) <= LINES_MAX
    assert text.strip() in [block.strip() for block in BLOCKS]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_of_the_readme_runs_as_printed(block: str, address: str, tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(block)
    assert "0 pages held after munmap" in run(script, address)


def test_the_asynchronous_example_sees_what_was_written(address: str) -> None:
    assert run(EXAMPLES[0], address).splitlines() == [
        "b'from the program'",
        "b'from the device '",
        "0 pages held after munmap",
    ]


def test_the_synchronous_example_holds_nothing_in_the_end(address: str) -> None:
    assert run(EXAMPLES[1], address).splitlines() == ["0 pages held after munmap"]
