#!/usr/bin/env python3
"""Record a random list of mm operations from the real Linux kernel, in the mm-trace format.

usage: record_random.py SEED COUNT PAGES PROFILE OUT.jsonl.gz

PROFILE: plain | anon | file | thp | shmem | swap | hugetlb | uffd | policy | policy-thp | policy-hugetlb

Needs root, tracefs, gcc, and a /dev/kvm that can create a VM: a process that holds a KVM VM has a real MMU notifier on
its mm, and the kvm_* tracepoints report each call of it. Recording a seed again gives the same trace, on one kernel.

The profiles thp, shmem and swap add to each operation's state what else decides the next one: `huge`, the page ranges
that are mapped by a PMD, and `swapped`, the pages whose PTE is a swap entry (numbers from the arena's base, half open).
The profile hugetlb has a third file, of hugetlbfs, and adds `huge` and `pool`: how many huge pages are free, and how
many of these are reserved. The profiles policy-... are like those named, policy like file, with memory policies.
"""

import errno
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from oracle_env import (
    HUGE_PAGES,
    HUGETLB_POOL,
    SWAPPING,
    build,
    environment,
    hugetlb_pool,
    khugepaged_asleep,
    settings,
    swap_file,
    tracefs,
)
from random_operations import (
    BASE,
    BLOCK,
    FILE_PAGES,
    HUGETLB_BLOCKS,
    LIKE,
    PAGE,
    WEIGHTS,
    Operation,
    operations,
)

CALLS = {
    "kvm_unmap_hva_range": "invalidate_range",
    "kvm_age_hva": "clear_young",
    "kvm_test_age_hva": "test_young",
}
CALL = re.compile(r"(kvm_\w+): .*range: 0x0*([0-9a-f]+) -- 0x0*([0-9a-f]+)")
MODES = {"thp": "t", "shmem": "t", "swap": "s", "uffd": "u"}
Note = tuple[str, int, int]


def write_files(files: Sequence[Path]) -> None:
    """A page at a time, so that the cache holds single pages and not one large folio."""
    for path in files:
        with open(path, "wb", buffering=0) as f:
            for _ in range(FILE_PAGES):
                f.write(bytes(PAGE))
                os.fsync(f.fileno())


@contextmanager
def hugetlb_file() -> Iterator[Path]:
    """A file of hugetlbfs that has no page yet."""
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    os.ftruncate(fd, HUGETLB_BLOCKS * BLOCK * PAGE)
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{fd}")
    finally:
        os.close(fd)


def run(trace: Path, pages: int, profile: str, files: Sequence[Path], ops: Sequence[Operation]) -> tuple[int, str]:
    """Let the kernel do it; returns the runner's process id and what it printed."""
    for name, value in (("tracing_on", "0"), ("buffer_size_kb", "65536"), ("trace", ""), ("set_event_pid", "")):
        (trace / name).write_text(value)
    for event in CALLS:
        (trace / f"events/kvm/{event}/enable").write_text("1")
    (trace / "tracing_on").write_text("1")
    command = [build("runner.c"), f"{BASE:x}", str(pages), str(trace), MODES.get(profile, "-"), *map(str, files)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    text = "".join(" ".join([str(name), *(f"{x:x}" for x in args)]) + "\n" for name, *args in ops)
    answer = process.communicate(text)[0]
    (trace / "tracing_on").write_text("0")
    (trace / "events/enable").write_text("0")
    if process.returncode or answer.count("\n") != len(ops):
        raise RuntimeError(f"the runner failed with {process.returncode} after {answer.count(chr(10))} operations")
    return process.pid, answer


def notifications(trace: Path, pid: int, pages: int) -> Mapping[int, list[Note]]:
    """The notifier calls inside the arena, by the operation during which the kernel made them."""
    found: dict[int, list[Note]] = {}
    current: int | None = None
    with open(trace / "trace") as lines:
        for line in lines:
            if f"runner-{pid} " not in line:
                continue
            if m := re.search(r"tracing_mark_write: ([BE]) (\d+)", line):
                current = int(m[2]) if m[1] == "B" else None
            elif current is not None and (m := CALL.search(line)):
                start, end = int(m[2], 16), int(m[3], 16)
                if end > BASE and start < BASE + pages * PAGE:
                    found.setdefault(current, []).append((CALLS[m[1]], start, end))
    return found


def page_ranges(text: str) -> list[list[int]]:
    return [] if text == "-" else [[int(x) for x in span.split("-")] for span in text.split(",")]


def mapping(text: str, inodes: Mapping[int, int]) -> list[object]:
    span, protection, offset, inode = text.split(",")
    start, end = (int(x, 16) for x in span.split("-"))
    known = int(inode) in inodes
    return [start, end, protection, int(offset, 16) if known else None, inodes.get(int(inode))]


STATE = re.compile(r"(\d+) (\d+) (\w+) V(.*) R (\S+) H (\S+) S (\S+) P (\d+),(\d+)")


def operation_lines(
    ops: Sequence[Operation],
    answer: str,
    notes: Mapping[int, list[Note]],
    inodes: Mapping[int, int],
    profile: str,
    lost: int,
) -> Iterator[dict[str, object]]:
    """Args: lost: huge pages that were reserved before the recording."""
    for line in answer.splitlines():
        m = STATE.fullmatch(line)
        assert m, line
        i, failure = int(m[1]), int(m[2])
        found: dict[str, object] = {
            "i": i,
            "pid": 1,
            "op": ops[i][0],
            "args": list(ops[i][1:]),
            "err": errno.errorcode[failure] if failure else None,
            "ret": None if failure else int(m[3], 16),
            "notify": notes.get(i, []),
            "vmas": [mapping(text, inodes) for text in m[4].split()],
            "present": page_ranges(m[5]),
        }
        if profile in ("thp", "shmem", "hugetlb"):
            found["huge"] = page_ranges(m[6])
        if profile == "hugetlb":
            found["pool"] = [int(m[8]) - lost, int(m[9]) - lost]
        elif profile == "swap":
            found["swapped"] = page_ranges(m[7])
        yield found


def record(seed: int, count: int, pages: int, profile: str, out: str) -> tuple[int, int]:
    """Record one trace; returns the numbers of operations and of notifications."""
    ops, trace, lost = operations(seed, count, pages, profile), tracefs(), 0
    name, profile = profile, LIKE.get(profile, profile)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one CPU: its page batches empty in a fixed order
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oracle-")))
        files = [work / "disk", Path("/dev/shm") / f"{work.name}-shm"]
        stack.callback(files[1].unlink)
        write_files(files)
        sizes = [("disk", FILE_PAGES), ("shm", FILE_PAGES)]
        if profile in ("thp", "shmem"):
            stack.enter_context(settings(HUGE_PAGES))
            stack.enter_context(khugepaged_asleep())
        elif profile == "swap":
            stack.enter_context(settings(SWAPPING))
            stack.enter_context(swap_file(work))
        elif profile == "hugetlb":
            lost = stack.enter_context(hugetlb_pool())
            files.append(stack.enter_context(hugetlb_file()))
            sizes.append(("hugetlb", HUGETLB_BLOCKS * BLOCK))
        inodes = {path.stat().st_ino: i for i, path in enumerate(files)}
        pid, answer = run(trace, pages, profile, files, ops)
        surroundings = environment(work)
    notes = notifications(trace, pid, pages)
    if profile == "hugetlb":
        surroundings["hugetlb_pool"] = HUGETLB_POOL
    if profile in MODES:
        surroundings |= {"settled": profile == "swap", "page_cluster": 0 if profile == "swap" else None}
    header = {
        "format": "mm-trace",
        "version": 1,
        "source": "random",
        "kernel": os.uname().release.split("-")[0],
        "page_size": PAGE,
        "thp": profile in ("thp", "shmem"),
        "base": BASE,
        "pages": pages,
        "profile": name,
        "seed": seed,
        "environment": surroundings,
        "files": [{"id": i, "kind": kind, "pages": pages} for i, (kind, pages) in enumerate(sizes)],
    }
    with open(out, "wb") as f, gzip.GzipFile("", "wb", fileobj=f, mtime=0) as g:  # no name and time: same bytes
        for item in (header, *operation_lines(ops, answer, notes, inodes, profile, lost)):
            g.write((json.dumps(item, separators=(",", ":")) + "\n").encode())
    return len(ops), sum(map(len, notes.values()))


def main() -> None:
    seed, count, pages, profile, out = sys.argv[1:]
    if profile not in WEIGHTS:
        sys.exit(f"unknown profile {profile}: {', '.join(WEIGHTS)}")
    done, notified = record(int(seed), int(count), int(pages), profile, out)
    print(f"{done} operations, {notified} notifications")


if __name__ == "__main__":
    main()
