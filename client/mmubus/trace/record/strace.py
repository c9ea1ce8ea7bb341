"""Recording from strace's text: every memory call of every process, without page faults and notifications.

What existed at the start comes from attach.c, as with the kernel's tracepoints; its mark is a prctl that strace shows.
"""

from __future__ import annotations

import errno
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmubus.trace.record.snapshot import read_snapshot

__all__ = ["StraceConverter", "record_with_strace"]

MEMORY_CALLS = "mmap munmap mprotect mremap madvise brk remap_file_pages msync mlock munlock".split()
PROCESS_CALLS = "execve exit_group clone clone3 fork vfork".split()
MARK = 0x6D6D7562
ARGUMENTS = {"mmap": 6, "mremap": 5, "remap_file_pages": 5, "mprotect": 3, "madvise": 3, "msync": 3, "brk": 1}

LINE = re.compile(r"^(\d+)\s+(.*)$")
CALL = re.compile(r"^(\w+)\((.*)\)\s+= (-?\w+)(?: (E\w+))?")
RESUMED = re.compile(r"^<\.\.\. (\w+) resumed>(.*)$")
UNFINISHED = " <unfinished ...>"

Line = dict[str, Any]


def record_with_strace(
    command: Sequence[str], library: Path, snapshots: Path, environment: Mapping[str, str]
) -> tuple[int, list[Line]]:
    """Run a command under strace.

    Args: library: the built attach.c; snapshots: an empty directory.
    Returns: the command's exit status and the operations.
    Raises: OSError.
    """
    text = snapshots / "strace"
    raw = ",".join([*MEMORY_CALLS, "prctl"])
    wanted = ",".join([*MEMORY_CALLS, *PROCESS_CALLS, "prctl"])
    preload = ["-E", f"LD_PRELOAD={library}", "-E", f"MMUBUS_RECORD_DIR={snapshots}"]
    options = ["-f", "-q", "-o", str(text), "-e", f"trace={wanted}", "-e", f"raw={raw}", "-e", "signal=none", *preload]
    status = subprocess.run(["strace", *options, "--", *command], env=dict(environment), check=False).returncode
    if not text.exists():
        return status, []
    with text.open(errors="replace") as lines:
        return status, list(StraceConverter(snapshots).convert(lines))


@dataclass(slots=True)
class StraceConverter:
    """Turns strace's lines into operations. Args: snapshots: where attach.c has written."""

    snapshots: Path
    _ids: dict[int, int] = field(default_factory=dict)
    _process: dict[int, int] = field(default_factory=dict)  # thread -> process
    _seen: set[int] = field(default_factory=set)
    _begun: dict[int, tuple[str, Line | None]] = field(default_factory=dict)  # calls that strace shows in two halves
    _done: list[Line] = field(default_factory=list)

    def convert(self, lines: Iterable[str]) -> Iterator[Line]:
        """The operations, in the order in which they began."""
        for line in lines:
            if found := LINE.match(line.rstrip("\n")):
                self._line(int(found[1]), found[2])
        yield from (operation for operation in self._done if operation["op"] != "thread")

    def _line(self, thread: int, text: str) -> None:
        if text.startswith("+++"):
            process = self._process.get(thread, thread)
            if process == thread and process in self._seen:
                self._enter(process, "exit")
                self._seen.discard(process)
        elif text.endswith(UNFINISHED):
            text = text.removesuffix(UNFINISHED)
            self._begun[thread] = text, self._begin(thread, text)
        elif found := RESUMED.match(text):
            before, operation = self._begun.pop(thread, ("", None))
            self._whole(thread, before + found[2], operation)
        else:
            self._whole(thread, text, None)

    def _begin(self, thread: int, text: str) -> Line | None:
        """The line of a call that has only begun, so that it stands where it began."""
        name = text.partition("(")[0]
        process = self._process.get(thread, thread)
        if process not in self._seen or name not in (*MEMORY_CALLS, *PROCESS_CALLS):
            return None
        return self._enter(process, self._op(name, text))

    def _whole(self, thread: int, text: str, operation: Line | None) -> None:
        found = CALL.match(text)
        if not found:
            if text.startswith("exit_group("):
                self._whole(thread, "exit_group() = 0", operation)
            return
        name, arguments, value, failed = found[1], found[2], found[3], found[4]
        process = self._process.get(thread, thread)
        if name == "prctl":
            self._mark(process, arguments)
            return
        if process not in self._seen or name not in (*MEMORY_CALLS, *PROCESS_CALLS):
            if name in ("clone", "clone3") and "CLONE_THREAD" in arguments and value.isdigit():
                self._process[int(value)] = process
            return
        if operation is None:
            operation = self._enter(process, self._op(name, text))
        self._fill(operation, process, name, arguments, value, failed)

    def _fill(self, operation: Line, process: int, name: str, arguments: str, value: str, failed: str | None) -> None:
        """What the whole line tells."""
        if name in MEMORY_CALLS:
            numbers = [int(part, 0) & (1 << 64) - 1 for part in arguments.split(", ") if part]
            count = ARGUMENTS.get(name, 2)
            operation["args"] = (numbers + [0] * count)[:count]
        if failed:
            operation["err"] = failed if hasattr(errno, failed) else value
        elif name in MEMORY_CALLS or name == "execve":
            operation["ret"] = int(value, 0) & (1 << 64) - 1
        elif name in ("clone", "clone3", "fork", "vfork") and value.isdigit():
            child = int(value)
            if "CLONE_THREAD" in arguments:
                self._process[child] = process
            elif operation["op"] == "fork":
                self._ids.setdefault(child, len(self._ids) + 1)
                operation["child"] = self._ids[child]
        if name == "execve" and not failed:
            self._seen.discard(process)

    def _op(self, name: str, text: str) -> str:
        if name in ("clone", "clone3", "fork", "vfork"):
            return "thread" if name == "vfork" or "CLONE_VM" in text else "fork"
        return name

    def _enter(self, process: int, op: str, **more: Any) -> Line:
        line: Line = {"pid": self._ids[process], "op": op, "args": [], "err": None, "ret": None, "notify": [], **more}
        if op == "fork":
            line["child"] = None
        self._done.append(line)
        return line

    def _mark(self, process: int, arguments: str) -> None:
        """attach.c has written a snapshot."""
        numbers = [int(part, 0) for part in arguments.split(", ")]
        if len(numbers) < 4 or numbers[0] != MARK:
            return
        why = "fork" if numbers[2] else "exec"
        self._ids.setdefault(process, len(self._ids) + 1)
        maps = read_snapshot(self.snapshots / f"{process}.{why}.{numbers[3]}")
        self._enter(process, "process", why=why, maps=maps)
        self._seen.add(process)
