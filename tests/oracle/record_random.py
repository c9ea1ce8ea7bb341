#!/usr/bin/env python3
"""Record a random list of mm operations from the real Linux kernel, in the mm-trace format.

usage: record_random.py SEED COUNT PAGES PROFILE OUT.jsonl.gz

PROFILE: plain | anon | file | thp | shmem | hugeshm | swap | hugetlb | uffd | bad | sealed | policy | policy-thp |
policy-hugetlb | bad-thp | bad-hugetlb | khugepaged | khugepaged-thp

Needs root, tracefs, gcc, and a /dev/kvm that can create a VM: a process that holds a KVM VM has a real MMU notifier on
its mm, and the kvm_* tracepoints report each call of it. Recording a seed again gives the same trace, on one kernel.

The profiles thp, shmem, hugeshm and swap add to each operation's state what else decides the next one: `huge`, the page
ranges that are mapped by a PMD, and `swapped`, the pages whose PTE is a swap entry (numbers from the arena's base, half
open). The profile hugeshm is of shared memory that gets huge pages by faults; the seed says which setting it has, and
its file of tmpfs is on a mount with the same, has more pages than a block, and is a hole at first.
khugepaged and khugepaged-thp are as hugeshm and thp, with passes of khugepaged over everything; nobody else may record
what it could collapse meanwhile. The profile hugetlb has a third file, of hugetlbfs, and adds `huge` and `pool`: how
many huge pages are free, and how many of these are reserved. The profiles policy-... are like those named, policy like
file, with memory policies.
The profiles bad and sealed draw calls that fail, or nearly (see hostile_operations.py), with mseal in the second;
bad-thp and bad-hugetlb are of huge pages. Their recorder has no privileges, and the header says what it has mapped
beside the arena (`maps`, as a program's recording has it) and where its heap is (`brk`: where it begins and where it
ends), since the kernel chooses addresses by that.
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
from dataclasses import dataclass
from pathlib import Path

from hostile_operations import MEMLOCK_MAX, Hostile
from oracle_env import (
    HUGE_PAGES,
    HUGETLB_POOL,
    SHMEM_ENABLED,
    SWAPPING,
    UNLIMITED,
    build,
    environment,
    hugetlb_pool,
    khugepaged_asleep,
    machine_alone,
    settings,
    swap_file,
    tmpfs,
    tracefs,
)
from random_operations import (
    BASE,
    BLOCK,
    FILE_PAGES,
    HOSTILE,
    HUGE_FILE_PAGES,
    HUGETLB_BLOCKS,
    IN_BLOCKS,
    LIKE,
    PAGE,
    PASSES,
    SHM_FILE,
    WEIGHTS,
    Drawing,
    Operation,
)

CALLS = {
    "kvm_unmap_hva_range": "invalidate_range",
    "kvm_age_hva": "clear_young",
    "kvm_test_age_hva": "test_young",
}
CALL = re.compile(r"(kvm_\w+): .*range: 0x0*([0-9a-f]+) -- 0x0*([0-9a-f]+)")
MODES = {"thp": "t", "shmem": "t", "hugeshm": "t", "swap": "s", "uffd": "u"}
ERRNO_NAMES = {errno.EOPNOTSUPP: "EOPNOTSUPP"}
"""Where a number has two names."""
CHOSEN_BY_KERNEL = 0x10_0010
"""Without MAP_FIXED and MAP_FIXED_NOREPLACE."""
SHMEM_SETTINGS = ("within_size", "advise", "always")
"""What the profile hugeshm has shared memory get huge pages for, by its seed."""
Note = tuple[str, int, int]


@dataclass(frozen=True)
class Layout:
    """What the recorder of bad calls has mapped beside the arena, and what its symbols stand for."""

    maps: list[list[object]]
    helper: int
    heap: tuple[int, int]
    symbols: dict[str, int]


def layout(lines: Sequence[str]) -> Layout:
    """Args: lines: what the runner says first."""
    maps: list[list[object]] = []
    for line in lines[:-1]:
        span, protection, offset, _, _, *name = line.split()[1:]
        start, end = (int(x, 16) for x in span.split("-"))
        maps.append([start, end, protection, int(offset, 16), None, " ".join(name), []])
    helper, start, first_break, total, data = lines[-1].split()[1:]
    symbols = {"n": int(first_break, 16), "t": int(total, 16), "w": int(data, 16), "@": 0}
    return Layout(maps, int(helper), (int(start, 16), symbols["n"]), symbols)


def resolved(ops: Sequence[Operation], answers: Sequence[str], symbols: dict[str, int]) -> Iterator[Operation]:
    """The operations with numbers instead of symbols."""
    for (name, *args), answer in zip(ops, answers, strict=True):
        numbers = [x if isinstance(x, int) else symbols[x[0]] + int(x[1:], 16) for x in args]
        yield name, *numbers
        _, failure, result, *_ = answer.split()
        if name == "mmap" and failure == "0" and not numbers[3] & CHOSEN_BY_KERNEL:
            symbols["@"] = int(result, 16)


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


def run(
    trace: Path, pages: int, modes: str, files: Sequence[Path], ops: Sequence[Operation]
) -> tuple[int, list[str], list[str]]:
    """Let the kernel do it; returns the runner's process id, what it printed of itself and of each operation."""
    for name, value in (("tracing_on", "0"), ("buffer_size_kb", "65536"), ("trace", ""), ("set_event_pid", "")):
        (trace / name).write_text(value)
    for event in CALLS:
        (trace / f"events/kvm/{event}/enable").write_text("1")
    (trace / "tracing_on").write_text("1")
    command = [build("runner.c"), f"{BASE:x}", str(pages), str(trace), modes, *map(str, files)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    text = "".join(
        " ".join([str(name), *(x if isinstance(x, str) else f"{x:x}" for x in args)]) + "\n" for name, *args in ops
    )
    lines = process.communicate(text)[0].splitlines()
    about = [line for line in lines if line[0] in "ML"]
    answers = lines[len(about) :]
    (trace / "tracing_on").write_text("0")
    (trace / "events/enable").write_text("0")
    if process.returncode or len(answers) != len(ops):
        raise RuntimeError(f"the runner failed with {process.returncode} after {len(answers)} operations")
    return process.pid, about, answers


def notifications(trace: Path, tasks: Sequence[str], pages: int) -> Mapping[int, list[Note]]:
    """The notifier calls inside the arena, by the operation during which the kernel made them.

    Args: tasks: who makes them, as the trace names them. khugepaged asks about the age of pages one by one, which is
    left out: the core asks once for many.
    """
    found: dict[int, list[Note]] = {}
    current: int | None = None
    with open(trace / "trace") as lines:
        for line in lines:
            if not any(task in line for task in tasks) or ("khugepaged-" in line and "age_hva" in line):
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
    answers: Sequence[str],
    notes: Mapping[int, list[Note]],
    inodes: Mapping[int, int],
    profile: str,
    lost: int,
) -> Iterator[dict[str, object]]:
    """Args: lost: huge pages that were reserved before the recording."""
    for line in answers:
        m = STATE.fullmatch(line)
        assert m, line
        i, failure = int(m[1]), int(m[2])
        found: dict[str, object] = {
            "i": i,
            "pid": 1,
            "op": ops[i][0],
            "args": list(ops[i][1:]),
            "err": ERRNO_NAMES.get(failure, errno.errorcode.get(failure)),
            "ret": None if failure else int(m[3], 16),
            "notify": notes.get(i, []),
            "vmas": [mapping(text, inodes) for text in m[4].split()],
            "present": page_ranges(m[5]),
        }
        if profile in (*IN_BLOCKS, "hugetlb"):
            found["huge"] = page_ranges(m[6])
        if profile == "hugetlb":
            found["pool"] = [int(m[8]) - lost, int(m[9]) - lost]
        elif profile == "swap":
            found["swapped"] = page_ranges(m[7])
        yield found


def record(seed: int, count: int, pages: int, profile: str, out: str) -> tuple[int, int]:
    """Record one trace; returns the numbers of operations and of notifications."""
    drawing = (Hostile if profile in HOSTILE else Drawing)(seed, pages, profile)
    ops, trace, lost = list(drawing.operations(count)), tracefs(), 0
    name, profile = profile, LIKE.get(profile, profile)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one CPU: its page batches empty in a fixed order
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oracle-")))
        shmem_enabled = SHMEM_SETTINGS[seed % len(SHMEM_SETTINGS)] if profile == "hugeshm" else "never"
        files = [work / "disk", Path("/dev/shm") / f"{work.name}-shm"]
        if profile == "hugeshm":
            files[1] = stack.enter_context(tmpfs(work, shmem_enabled)) / "shm"
            write_files(files[:1])
            files[1].touch()
            os.truncate(files[1], HUGE_FILE_PAGES * PAGE)
            sizes = [("disk", FILE_PAGES), ("shm", HUGE_FILE_PAGES)]
        else:
            stack.callback(files[1].unlink)
            write_files(files)
            sizes = [("disk", FILE_PAGES), ("shm", FILE_PAGES)]
        if profile in IN_BLOCKS:
            stack.enter_context(settings(HUGE_PAGES))
            stack.enter_context(khugepaged_asleep())
        if profile == "hugeshm":
            stack.enter_context(machine_alone())
            stack.enter_context(settings({SHMEM_ENABLED: shmem_enabled}))
        elif profile == "swap":
            stack.enter_context(settings(SWAPPING))
            stack.enter_context(swap_file(work))
        elif profile == "hugetlb":
            lost = stack.enter_context(hugetlb_pool())
            files.append(stack.enter_context(hugetlb_file()))
            sizes.append(("hugetlb", HUGETLB_BLOCKS * BLOCK))
        if name in HOSTILE:
            stack.enter_context(settings(UNLIMITED))
        inodes = {path.stat().st_ino: i for i, path in enumerate(files)}
        modes = MODES.get(profile, "-") + ("b" if name in HOSTILE else "")
        pid, about, answers = run(trace, pages, modes, files, ops)
        surroundings = environment(work)
    own, pids = None, [pid]
    if about:
        own = layout(about)
        pids.append(own.helper)
        ops = list(resolved(ops, answers, own.symbols))
    tasks = [f"runner-{each} " for each in pids] + (["khugepaged-"] if name in PASSES else [])
    notes = notifications(trace, tasks, pages)
    if profile == "hugeshm":
        surroundings["shmem_enabled"] = shmem_enabled
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
        "thp": profile in IN_BLOCKS,
        "base": BASE,
        "pages": pages,
        "profile": name,
        "seed": seed,
        "environment": surroundings,
        "files": [{"id": i, "kind": kind, "pages": pages} for i, (kind, pages) in enumerate(sizes)],
    }
    if profile == "hugeshm":
        header["files"][SHM_FILE]["cached"] = False
    if own is not None:
        header |= {"maps": own.maps, "brk": own.heap, "locked_limit": MEMLOCK_MAX}
    with open(out, "wb") as f, gzip.GzipFile("", "wb", fileobj=f, mtime=0) as g:  # no name and time: same bytes
        for item in (header, *operation_lines(ops, answers, notes, inodes, profile, lost)):
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
