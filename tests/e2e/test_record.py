"""Recording programs on this machine, where it offers the means, and replaying what was recorded."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmubus.trace.format import read_trace
from mmubus.trace.record.capture import means

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Run = Callable[..., Any]
FORKING = 'x=$(seq 1 300 | sort -r | head -1); (y=$(echo $x | tr 0-9 a-j); : "$y") & wait'


def usable(how: str) -> bool:
    offered = means()
    return shutil.which("bash") is not None and not getattr(offered, how)


kvm = pytest.mark.skipif(not usable("kvm"), reason="this machine offers no tracefs with /dev/kvm")
strace = pytest.mark.skipif(not usable("strace"), reason="this machine offers no strace")


@kvm
def test_the_kernel_s_own_eyes(tmp_path: Path, mmubus: Run):
    path = tmp_path / "fork.jsonl.gz"
    done = mmubus("record", "-o", path, "--how", "kvm", "--", "bash", "-c", FORKING)
    assert done.status == 0, done.err
    trace = read_trace(path)
    ops = [operation.op for operation in trace.operations]
    assert ops.count("fork") >= 3
    assert ops.count("unmapped") == ops.count("process")
    assert any(operation.notify for operation in trace.operations if operation.op == "fork")
    replayed = mmubus("replay", path, "--json")
    assert replayed.status == 0, replayed.err
    report = replayed.json
    assert report["notifications"]["kernel"] > 50
    assert (report["notifications"]["missed"], report["stale_reads"], report["freed_before_ack"]) == (0, 0, 0)
    assert report["mismatched"]["err"] == report["mismatched"]["ret"] == 0


@kvm
def test_a_program_that_runs_another_in_its_place(tmp_path: Path, mmubus: Run):
    """Each program has a snapshot of its own."""
    path = tmp_path / "exec.jsonl.gz"
    assert mmubus("record", "-o", path, "--how", "kvm", "--", "bash", "-c", "exec env X=1 sort /etc/passwd").status == 0
    snapshots = [operation.maps for operation in read_trace(path).operations if operation.op == "process"]
    assert len(snapshots) == 3
    assert len(set(snapshots)) == 3
    assert mmubus("replay", path, "--only-state", "--json").json["notifications"]["missed"] == 0


@strace
def test_strace_s_text(tmp_path: Path, mmubus: Run):
    path = tmp_path / "fork.jsonl.gz"
    done = mmubus("record", "-o", path, "--how", "strace", "--json", "--", "bash", "-c", FORKING)
    assert done.status == 0, done.err
    assert done.json["how"] == "strace"
    trace = read_trace(path)
    assert trace.header.recorder == "strace"
    assert {operation.op for operation in trace.operations} >= {"process", "mmap", "fork", "exit"}
    report = mmubus("replay", path, "--json").json
    assert report["mismatched"]["err"] == report["mismatched"]["ret"] == report["mismatched"]["notify"] == 0
    assert report["notifications"]["kernel"] == report["notifications"]["missed"] == 0


@strace
def test_the_program_s_own_output_and_status_are_its_own(tmp_path: Path, mmubus: Run):
    done = mmubus("record", "-o", tmp_path / "x.gz", "--how", "strace", "--", "bash", "-c", "echo hello; exit 3")
    assert done.out == "hello\n"
    assert "exit status was 3" in done.err
    assert done.status == 0
