"""The tutorial runs as it stands: its files are written, its commands typed into one shell, its output compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue

import pytest
from source_tree import ROOT

TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LINE_TIMEOUT_S = 60.0
ENDED = "__ended__"


@dataclass
class Command:
    """A line after the prompt, and what it prints: "…" stands for anything, on a line of its own for any lines."""

    line: str
    prints: list[str] = field(default_factory=list)


def steps() -> Iterator[tuple[str, str] | Command]:
    """Files to be written (name, contents) and commands, in order."""
    for language, title, body in BLOCK.findall(TUTORIAL.read_text()):
        if language == "python":
            assert title, "a file has a name"
            yield title, body
            continue
        assert language == "console", f"a block of {language} would not be run"
        command: Command | None = None
        for line in body.splitlines():
            if line.startswith("$ "):
                if command is not None:
                    yield command
                command = Command(line[2:])
            else:
                assert command is not None
                command.prints.append(line)
        if command is not None:
            yield command


class Shell:
    """One bash, as a reader has it open."""

    def __init__(self, directory: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MMUBUS_")}
        environment["MMUBUS_ACK_BUDGET_S"] = "30"  # on a machine that is busy the reader's drivers answer later
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        self._bash = subprocess.Popen(
            ["bash", "--norc"], cwd=directory, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, bufsize=1, start_new_session=True,
        )  # fmt: skip
        self._lines: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._bash.stdout is not None
        for line in self._bash.stdout:
            self._lines.put(line.rstrip("\n"))

    def run(self, command: Command) -> None:
        """Type a command and compare what comes. One that ends in & is left running when it has said its lines."""
        assert self._bash.stdin is not None
        background = command.line.endswith("&")
        self._bash.stdin.write(command.line + "\n" + ("" if background else f"echo {ENDED}$?\n"))
        self._bash.stdin.flush()
        wanted = [*command.prints, *([] if background else [f"{ENDED}0"])]
        any_lines = False
        while wanted:
            if wanted[0] == "…":
                any_lines = True
                wanted.pop(0)
                continue
            said = self._line(command, wanted[0])
            if matches(wanted[0], said):
                wanted.pop(0)
                any_lines = False
            else:
                assert any_lines, f"$ {command.line}\nprinted {said!r}\nnot     {wanted[0]!r}"
                assert ENDED not in said, f"$ {command.line}\nended ({said}) without {wanted[0]!r}"

    def _line(self, command: Command, wanted: str) -> str:
        try:
            return self._lines.get(timeout=LINE_TIMEOUT_S)
        except Empty:
            raise AssertionError(f"$ {command.line}\ndid not print {wanted!r}") from None

    def close(self) -> None:
        """Close the terminal; what was started in it ends, too."""
        assert self._bash.stdin is not None
        self._bash.stdin.write("kill $(jobs -p); wait; exit\n")
        self._bash.stdin.close()
        self._bash.wait(timeout=60)
        self._reader.join(timeout=60)
        assert self._bash.stdout is not None
        self._bash.stdout.close()


def matches(wanted: str, said: str) -> bool:
    """Whether a line is as the tutorial says; runs of spaces are alike, as tables are as wide as their contents."""
    pattern = ".*".join(re.escape(" ".join(part.split())) for part in f" {wanted} ".split("…"))
    return re.fullmatch(r"\s*" + pattern.replace(r"\ ", r"\s*") + r"\s*", " ".join(said.split())) is not None


@pytest.mark.e2e
@pytest.mark.slow
def test_the_tutorial_runs_as_it_stands(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    try:
        for step in steps():
            if isinstance(step, Command):
                shell.run(step)
            else:
                (tmp_path / step[0]).write_text(step[1])
    finally:
        shell.close()


@pytest.mark.parametrize(
    ("wanted", "said", "same"),
    [
        ("a … c", "a b c", True), ("a … c", "a b d", False), ("a  b", "a b", True), ("rounds 1", "rounds 12", False),
        ("…", "x", True), ("a…", "abc", True), ("made 1", "made 2", False),
    ],
)  # fmt: skip
def test_lines_are_compared(wanted: str, said: str, same: bool) -> None:
    assert matches(wanted, said) is same


def test_there_is_something_to_run() -> None:
    found = list(steps())
    assert sum(isinstance(step, Command) for step in found) >= 12
    assert sum(not isinstance(step, Command) for step in found) >= 5
