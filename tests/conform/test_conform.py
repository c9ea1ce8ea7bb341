"""The conformance kit passes what is right, and names the rule that what is wrong breaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
COMMAND = (sys.executable, "-c", "import sys; from mmubus.cli import main; sys.exit(main())", "conform")


def conform(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=HERE, capture_output=True, text=True, timeout=240, check=False
    )  # fmt: skip


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("factory", ["good", "good_mainline"])
def test_a_good_driver_passes(factory: str) -> None:
    done = conform(f"drivers:{factory}", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 scenarios, 0 broken" in done.stdout


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "scenario", "rule"),
    [("never_drops", "same address again", "Coherent"), ("too_slow", "life", "AnswersInTime")],
)
def test_a_bad_driver_is_told_which_rule_it_breaks(factory: str, scenario: str, rule: str) -> None:
    done = conform(f"drivers:{factory}", "--only", scenario)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{rule}:" in done.stdout
    assert "program:" in done.stdout, "the transcript is there"


def test_what_is_not_there_is_said() -> None:
    done = conform("drivers:nothing")
    assert done.returncode == 2
    assert "nothing" in done.stderr
