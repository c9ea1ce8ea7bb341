"""What the recorders' text becomes, and what is said when a machine offers too little."""

from pathlib import Path

import pytest
from mmubus.trace.record import capture
from mmubus.trace.record.capture import Means, RecordError
from mmubus.trace.record.kernel import Converter
from mmubus.trace.record.snapshot import read_snapshot
from mmubus.trace.record.strace import StraceConverter

SNAPSHOT = """\
00400000-00402000 r-xp 00001000 fe:00 1234                       /usr/bin/true
P 0 2 f
7ffe00000000-7ffe00003000 rw-p 00000000 00:00 0                          [stack]
P 1 2 a
P 2 3 s
"""
MAPS = [
    [0x400000, 0x402000, "r-xp", 0x1000, "fe:00:1234", "", [[0, 2, "f"]]],
    [0x7FFE00000000, 0x7FFE00003000, "rw-p", None, None, "[stack]", [[1, 2, "a"], [2, 3, "s"]]],
]


@pytest.fixture
def snapshots(tmp_path: Path) -> Path:
    for name in ("100.exec.7", "101.fork.8", "100.exec.9"):
        (tmp_path / name).write_text(SNAPSHOT)
    return tmp_path


def test_a_snapshot(snapshots: Path):
    assert read_snapshot(snapshots / "100.exec.7") == MAPS


def event(thread: int, process: int, text: str) -> str:
    return f"          prog-{thread}   (  {process}) [001] d...1 12345.678901: {text}\n"


KERNEL = [
    event(100, 100, "sys_mmap(addr: 0, len: 1000, prot: 3, flags: 22, fd: ffffffff, off: 0)"),  # not attached yet
    event(100, 100, "tracing_mark_write: MMUBUS 100 exec 7"),
    event(100, 100, "sys_mmap(addr: 0, len: 3000, prot: 3, flags: 22, fd: ffffffffffffffff, off: 0)"),
    event(100, 100, "sys_mmap -> 0x7f0000000000"),
    event(100, 100, "page_fault_user: address=0x7f0000001234 ip=0x401000 error_code=0x6"),
    event(100, 100, "page_fault_user: address=0x7f0000001234 ip=0x401000 error_code=0x7"),
    event(100, 100, "kvm_unmap_hva_range: mmu notifier unmap range: 0x7f0000001000 -- 0x7f0000002000"),
    event(100, 100, "sys_clone(clone_flags: 1200011, newsp: 0, parent_tidptr: 0, child_tidptr: 7f00, tls: 0)"),
    event(100, 100, "sched_process_fork: comm=prog pid=100 child_comm=prog child_pid=101"),
    event(100, 100, "kvm_unmap_hva_range: mmu notifier unmap range: 0x7f0000000000 -- 0x7f0000003000"),
    event(100, 100, "page_fault_kernel: address=0x7f0000002000 ip=0xffffffff81000000 error_code=0x3"),
    event(100, 100, "sys_clone -> 0x65"),
    event(101, 101, "tracing_mark_write: MMUBUS 101 fork 8"),
    event(102, 100, "sys_clone3(uargs: 7f00, size: 58)"),
    event(102, 100, "sys_clone3 -> 0x67"),
    event(100, 100, "sys_munmap(addr: 7f0000000001, len: 1000)"),
    event(100, 100, "sys_munmap -> 0xffffffffffffffea"),
    event(100, 100, "kvm_age_hva: mmu notifier age hva range: 0x7f0000000000 -- 0x7f0000001000"),
    event(101, 101, "sys_exit_group(error_code: 0)"),
    event(101, 101, "sched_process_exit: comm=prog pid=101 prio=120"),
    event(101, 101, "exit_mmap: mt_mod 00, DESTROY"),
    event(101, 101, "sys_munmap(addr: 1000, len: 1000)"),  # gone
    event(100, 100, "sys_execve(filename: 1, argv: 2, envp: 3)"),
    event(100, 100, "exit_mmap: mt_mod 00, DESTROY"),
    event(100, 100, "sys_execve -> 0x0"),
    event(
        100, 100, "page_fault_user: address=0x7f0000001234 ip=0x401000 error_code=0x6"
    ),  # the new image, not attached
    event(100, 100, "tracing_mark_write: MMUBUS 100 exec 9"),
]


def test_the_kernel_s_trace(snapshots: Path):
    operations = list(Converter(snapshots).convert(KERNEL))
    shown = [(one["pid"], one["op"], one["args"], one["err"], one["ret"]) for one in operations]
    assert shown == [
        (1, "process", [], None, None),
        (1, "mmap", [0, 0x3000, 3, 0x22, 0xFFFFFFFFFFFFFFFF, 0], None, 0x7F0000000000),
        (1, "write", [0x7F0000001000, 4096], None, None),
        (1, "write", [0x7F0000001000, 4096], None, None),
        (1, "fork", [], None, None),
        (1, "write", [0x7F0000002000, 4096], None, None),
        (2, "process", [], None, None),
        (1, "munmap", [0x7F0000000001, 0x1000], "EINVAL", None),
        (1, "kernel", [], None, None),
        (2, "exit_group", [], None, None),
        (2, "exit", [], None, None),
        (2, "unmapped", [], None, None),
        (1, "execve", [], None, 0),
        (1, "unmapped", [], None, None),
        (1, "process", [], None, None),
    ]
    assert [one.get("protection") for one in operations[2:4]] == [False, True]
    assert operations[3]["notify"] == [["invalidate_range", 0x7F0000001000, 0x7F0000002000]]
    assert operations[4]["child"] == 2
    assert operations[4]["notify"] == [["invalidate_range", 0x7F0000000000, 0x7F0000003000]]
    assert operations[5]["during"] == "fork"
    assert operations[6]["why"] == "fork"
    assert operations[6]["maps"] == MAPS
    assert operations[8]["notify"] == [["clear_young", 0x7F0000000000, 0x7F0000001000]]


STRACE = """\
100   execve("/usr/bin/true", ["true"], 0x7ffe /* 20 vars */) = 0
100   prctl(0x6d6d7562, 0x64, 0, 0x7, 0) = -1 EINVAL (Invalid argument)
100   brk(0)                            = 0x55d000000000
100   mmap(0, 0x1000, 0x3, 0x22, 0xffffffff, 0) = 0x7f0000000000
100   munmap(0x1, 0x1000)               = -1 EINVAL (Invalid argument)
100   clone(child_stack=NULL, flags=CLONE_CHILD_CLEARTID|CLONE_CHILD_SETTID|SIGCHLD <unfinished ...>
101   prctl(0x6d6d7562, 0x65, 0x1, 0x8, 0 <unfinished ...>
100   <... clone resumed>, child_tidptr=0x7f) = 101
101   <... prctl resumed>)              = -1 EINVAL (Invalid argument)
100   clone3({flags=CLONE_VM|CLONE_VFORK, exit_signal=SIGCHLD}, 88) = 102
100   clone3({flags=CLONE_VM|CLONE_THREAD, exit_signal=0}, 88) = 103
103   madvise(0x7f0000000000, 0x1000, 0x4) = 0
101   mprotect(0x7f0000000000, 0x1000, 0x1 <unfinished ...>
100   munmap(0x7f0000000000, 0x1000)    = 0
101   <... mprotect resumed>)           = 0
103   +++ exited with 0 +++
101   exit_group(0)                     = ?
101   +++ exited with 0 +++
100   execve("/usr/bin/true", ["true"], 0x7ffe /* 20 vars */) = 0
100   brk(0)                            = 0x55d000000000
100   +++ exited with 0 +++
"""


def test_strace_s_text(snapshots: Path):
    operations = list(StraceConverter(snapshots).convert(STRACE.splitlines(keepends=True)))
    shown = [(one["pid"], one["op"], one["args"], one["err"], one["ret"]) for one in operations]
    assert shown == [
        (1, "process", [], None, None),
        (1, "brk", [0], None, 0x55D000000000),
        (1, "mmap", [0, 0x1000, 3, 0x22, 0xFFFFFFFF, 0], None, 0x7F0000000000),
        (1, "munmap", [1, 0x1000], "EINVAL", None),
        (1, "fork", [], None, None),
        (2, "process", [], None, None),
        (1, "madvise", [0x7F0000000000, 0x1000, 4], None, 0),
        (2, "mprotect", [0x7F0000000000, 0x1000, 1], None, 0),
        (1, "munmap", [0x7F0000000000, 0x1000], None, 0),
        (2, "exit_group", [], None, None),
        (2, "exit", [], None, None),
        (1, "execve", [], None, 0),
    ]
    assert operations[4]["child"] == 2
    assert operations[5]["maps"] == MAPS


def test_the_best_way_is_taken_and_what_is_missing_is_said():
    assert Means((), ()).best("auto") == "kvm"
    assert Means(("no /dev/kvm",), ()).best("auto") == "strace"
    with pytest.raises(RecordError, match="cannot record with kvm: no /dev/kvm"):
        Means(("no /dev/kvm",), ()).best("kvm")
    with pytest.raises(RecordError, match="for kvm, no /dev/kvm; for strace, no strace"):
        Means(("no /dev/kvm",), ("no strace",)).best("auto")


def test_a_machine_that_offers_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture.shutil, "which", lambda name: None)
    monkeypatch.setattr(capture, "tracefs_root", lambda: None)
    found = capture.means()
    assert any("C compiler" in clause for clause in found.strace)
    assert any("strace is not installed" in clause for clause in found.strace)
    assert any("tracefs" in clause for clause in found.kvm)
