"""What the end-to-end tests share: the command in a process of its own, and the recordings."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import BUDGET_S

TRACES = Path(__file__).resolve().parents[1] / "oracle" / "traces"
COMMAND = (sys.executable, "-c", "import sys; from mmubus.cli import main; sys.exit(main())")
LIMIT_S = 240


class Done:
    """A command that has ended."""

    def __init__(self, process: "subprocess.CompletedProcess[str]") -> None:
        self.status = process.returncode
        self.out = process.stdout
        self.err = process.stderr

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document."""
        return json.loads(self.out)


@pytest.fixture
def mmubus() -> Callable[..., Done]:
    """Run `mmubus ARGUMENTS...` without a terminal."""

    def run(*arguments: object) -> Done:
        command = [*COMMAND, *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MMUBUS_")}
        environment["MMUBUS_ACK_BUDGET_S"] = str(BUDGET_S)  # of the server that the command starts for itself
        return Done(
            subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment)
        )

    return run


@pytest.fixture
def recording() -> Callable[[str], Path]:
    """A recording by its name."""
    return lambda name: TRACES / f"{name}.jsonl.gz"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server in a process of its own; its address."""
    address = f"unix:{tmp_path}/server.sock"
    command = [*COMMAND, "serve", "--listen", address, "--log-level", "error", "--ack-budget-s", str(BUDGET_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"listening on {address}\n"
        try:
            yield address
        finally:
            process.terminate()
            assert process.wait(LIMIT_S) == 0
