"""Recording with the kernel's own eyes: every process has a real MMU notifier (KVM), the tracepoints report its calls.

The trace's lines become operations in the order in which they began. A thread is in at most one operation at a time, a
system call or the page fault that came last; notifications belong to the operation that their thread is in. What comes
before a process has its notifier is not seen.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmubus.trace.record.snapshot import read_snapshot
from mmubus.trace.record.tracefs import TraceFs

__all__ = ["CALLS", "Converter", "record_with_kernel"]

CALLS = (
    "mmap munmap mprotect mremap madvise brk remap_file_pages msync mlock munlock execve exit_group clone clone3 fork "
    "vfork"
).split()
EVENTS = (
    "kvm/kvm_unmap_hva_range",
    "kvm/kvm_age_hva",
    "kvm/kvm_test_age_hva",
    "exceptions/page_fault_user",
    "exceptions/page_fault_kernel",
    "sched/sched_process_fork",
    "sched/sched_process_exit",
    "mmap/exit_mmap",
)
NOTIFIER_CALLS = {
    "kvm_unmap_hva_range": "invalidate_range",
    "kvm_age_hva": "clear_young",
    "kvm_test_age_hva": "test_young",
}
FORKS = frozenset({"clone", "clone3", "fork", "vfork"})
FAULTS = frozenset({"read", "write", "execute"})
CLONE_VM = 0x100
PR_SET_THP_DISABLE = 41
PAGE = 4096
ERRNO_MAX = 4095
USER_END = 1 << 47
# Bits of a page fault's error code, x86: arch/x86/include/asm/trap_pf.h.
PF_PROT, PF_WRITE, PF_INSTR = 1, 2, 16

EVENT = re.compile(r"^.+-(\d+)\s+\(\s*([\d-]+)\)\s+\[\d+\]\s+\S+\s+[\d.]+: (\w+)(.*)$")
"""thread, process, the event's or call's name, the rest."""
NUMBER = re.compile(r": (0x)?([0-9a-f]+)$")

Line = dict[str, Any]


def record_with_kernel(
    command: Sequence[str], root: Path, library: Path, snapshots: Path, environment: Mapping[str, str], *, thp: bool
) -> tuple[int, list[Line], int]:
    """Run a command and record it.

    Args: root: of tracefs; library: the built attach.c; snapshots: an empty directory; thp: leave huge pages on.
    Returns: the command's exit status, the operations, and how many events were lost.
    Raises: OSError.
    """
    with TraceFs.instance(root) as trace:
        for call in CALLS:
            trace.enable(f"syscalls/sys_enter_{call}")
            trace.enable(f"syscalls/sys_exit_{call}")
        for event in EVENTS:
            trace.enable(event)

        def prepare() -> None:
            if not thp:
                ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
            trace.write("set_event_pid", str(os.getpid()))

        env = {
            **environment,
            "LD_PRELOAD": str(library),
            "MMUBUS_RECORD_DIR": str(snapshots),
            "MMUBUS_RECORD_MARKER": str(trace.marker),
            "MMUBUS_RECORD_KVM": "1",
        }
        trace.write("tracing_on", "1")
        status = subprocess.run(command, env=env, preexec_fn=prepare, check=False).returncode
        trace.write("tracing_on", "0")
        operations = list(Converter(snapshots).convert(trace.lines()))
        return status, operations, trace.lost()


@dataclass(slots=True)
class Converter:
    """Turns the trace's lines into operations.

    Args: snapshots: where attach.c has written.
    """

    snapshots: Path
    _ids: dict[int, int] = field(default_factory=dict)  # real pid -> the recording's
    _seen: set[int] = field(default_factory=set)  # real pids whose notifier is attached
    _leaving: set[int] = field(default_factory=set)  # those that have exited
    _current: dict[int, Line | None] = field(default_factory=dict)  # thread -> the operation that it is in
    _done: list[Line] = field(default_factory=list)

    def convert(self, lines: Iterable[str]) -> Iterator[Line]:
        """The operations, in the order in which they began."""
        for line in lines:
            if not (found := EVENT.match(line)):
                continue
            thread = int(found[1])
            process = int(found[2]) if found[2].isdigit() else thread
            self._event(thread, process, found[3], found[4])
        for operation in self._done:
            call = operation.pop("_call", None)
            if operation["op"] != "thread" or operation["notify"]:
                yield operation | ({"call": call} if call in FORKS else {})

    def _event(self, thread: int, process: int, name: str, rest: str) -> None:
        if name == "tracing_mark_write":
            self._mark(thread, rest)
        elif name == "exit_mmap":
            self._unmapped(process)
        elif process not in self._seen:
            return
        elif name.startswith("sys_"):
            self._call(thread, process, name.removeprefix("sys_"), rest)
        elif name.startswith("page_fault_"):
            self._fault(thread, process, rest)
        elif name in NOTIFIER_CALLS:
            self._notification(thread, process, NOTIFIER_CALLS[name], rest)
        elif name == "sched_process_fork":
            self._forked(thread, rest)
        elif name == "sched_process_exit" and thread == process:
            self._enter(process, "exit")
            self._leaving.add(process)

    def _enter(self, process: int, op: str, args: Sequence[int] = (), **more: Any) -> Line:
        line = {"pid": self._ids[process], "op": op, "args": list(args), "err": None, "ret": None, "notify": [], **more}
        self._done.append(line)
        return line

    def _mark(self, thread: int, rest: str) -> None:
        """attach.c has written a snapshot: from here on the process is seen."""
        if not (found := re.search(r"MMUBUS (\d+) (exec|fork) (\d+)", rest)):
            return
        process, why = int(found[1]), found[2]
        self._ids.setdefault(process, len(self._ids) + 1)
        maps = read_snapshot(self.snapshots / f"{process}.{why}.{found[3]}")
        self._enter(process, "process", why=why, maps=maps)
        self._current[thread] = None
        self._seen.add(process)

    def _unmapped(self, process: int) -> None:
        """The last page of an address space is gone: at exit, or of the old one in execve."""
        if process in self._ids:
            self._enter(process, "unmapped")
            if process in self._leaving:
                self._seen.discard(process)

    def _call(self, thread: int, process: int, name: str, rest: str) -> None:
        if found := re.match(r" -> 0x([0-9a-f]+)", rest):
            self._returned(thread, process, name, int(found[1], 16))
        elif rest.startswith("("):
            args = [int(part[2], 16) for text in rest[1:-1].split(", ") if (part := NUMBER.search(text))]
            op = name
            if name in FORKS:
                shares = name in ("clone3", "vfork") or (name == "clone" and bool(args and args[0] & CLONE_VM))
                op, args = "thread" if shares else "fork", []
            elif name in ("execve", "exit_group"):
                args = []
            more = {"child": None} if op in ("fork", "thread") else {}
            self._current[thread] = self._enter(process, op, args, _call=name, **more)

    def _returned(self, thread: int, process: int, name: str, value: int) -> None:
        operation = self._current.get(thread)
        self._current[thread] = None
        if operation is None or operation.get("_call") != name:
            return
        if value >= 2**64 - ERRNO_MAX:
            operation["err"] = errno.errorcode.get(2**64 - value, str(2**64 - value))
        elif name not in FORKS:
            operation["ret"] = value
            if name == "execve":
                self._seen.discard(process)

    def _fault(self, thread: int, process: int, rest: str) -> None:
        found = re.match(r": address=0x([0-9a-f]+) ip=\S+ error_code=0x([0-9a-f]+)", rest)
        if not found or (address := int(found[1], 16)) >= USER_END:
            return
        code = int(found[2], 16)
        op = "execute" if code & PF_INSTR else "write" if code & PF_WRITE else "read"
        line = self._enter(process, op, [address & -PAGE, PAGE], protection=bool(code & PF_PROT))
        outer = self._current.get(thread)
        if outer is not None and outer["op"] not in FAULTS:
            line["during"] = outer["op"]
        else:
            self._current[thread] = line

    def _notification(self, thread: int, process: int, call: str, rest: str) -> None:
        if not (found := re.search(r"range: 0x([0-9a-f]+) -- 0x([0-9a-f]+)", rest)):
            return
        operation = self._current.get(thread) or self._enter(process, "kernel")
        operation["notify"].append([call, int(found[1], 16), int(found[2], 16)])

    def _forked(self, thread: int, rest: str) -> None:
        operation = self._current.get(thread)
        if operation is not None and operation["op"] == "fork" and (found := re.search(r"child_pid=(\d+)", rest)):
            self._ids[int(found[1])] = operation["child"] = len(self._ids) + 1
