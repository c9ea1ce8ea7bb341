"""The kit on drivers that are processes: any language, a few lines of JSON."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from conform.test_conform import HERE, conform

PROCESS = shlex.join([sys.executable, str(HERE / "process_driver.py")])

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.parametrize("scenario", ["life", "fault against invalidate", "restart"])
def test_a_process_that_is_right_passes(scenario: str) -> None:
    done = conform("--command", PROCESS, "--only", scenario)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "broken"),
    [
        (f"{PROCESS} --deaf", "Coherent: "),
        ("false", "Survives: the driver's process ended with status 1"),
        ("yes", "Survives: the driver's process does not speak the protocol"),
        ("/nowhere/driver", "Survives: /nowhere/driver could not be started"),
    ],
)
def test_one_that_is_not_is_told_which_rule_it_breaks(command: str, broken: str) -> None:
    done = conform("--command", command, "--only", "same address again")
    assert done.returncode == 1, done.stdout + done.stderr
    assert broken in done.stdout


@pytest.mark.parametrize("arguments", [(), ("drivers:good", "--command", "true")])
def test_it_is_one_or_the_other(arguments: tuple[str, ...]) -> None:
    done: subprocess.CompletedProcess[str] = conform(*arguments)
    assert done.returncode == 2
    assert "MODULE:FACTORY, or a command" in done.stderr
