"""Driving the memory core over a random recording, without any room above it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmubusd.mm import Memory, MmError
from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.mm import Mapping
from mmubusd.mm.notification import ANSWERED, Operation, ranges
from mmubusd.mm.set_mempolicy import POLICY
from mmubusd.mm.shmem_huge import ShmemHuge
from mmubusd.mm.syscall import call

FIELDS = ("err", "ret", "vmas", "present", "huge", "swapped", "pool", "notify")
SWAP_SLOTS = (64 << 20) >> 12
MAP_ANONYMOUS = 0x20


@dataclass
class Report:
    """How many operations of a recording came out otherwise, by field, and the first of them."""

    operations: int = 0
    mismatched: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIELDS, 0))
    first: list[tuple[int, str, Any, Any, Any]] = field(default_factory=list)
    wrong: int = 0


def read_trace(path: Path) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    lines = gzip.open(path, "rt")  # noqa: SIM115 (the iterator keeps it)
    return json.loads(next(lines)), map(json.loads, lines)


class Driver:
    """One arena as the recorder made it: a process with two files, and at most one forked child."""

    def __init__(self, head: dict[str, Any]) -> None:
        self.base, self.end = head["base"], head["base"] + head["pages"] * head["page_size"]
        environment = head["environment"]
        self.memory = Memory(
            frames_nr=1 << 16,
            swap_slots_nr=SWAP_SLOTS if environment.get("swap") else 0,
            thp=Thp.MADVISE if head["thp"] else Thp.NEVER,
            shmem_enabled=ShmemHuge(environment.get("shmem_enabled", "never")),
            tmpfs_huge=ShmemHuge(environment.get("shmem_enabled", "never")),
            hugetlb_nr=environment.get("hugetlb_pool", 0),
        )
        self.settled = environment.get("settled", False)
        self.mm = self.memory.create_mm("runner")
        self.mm.notified = True
        self.mm.thp_disabled = not head["thp"]
        for start, end, prot, _, _, name, resident in head.get("maps", ()):
            self.mm.adopt(Mapping(start, end, prot, 0, None, name), resident)
        self.mm.brk_start, self.mm.brk_end = head.get("brk", (self.mm.brk_start, self.mm.brk_end))
        self.mm.locked_limit = head.get("locked_limit")
        self.files = {
            f["id"]: self.memory.create_file("", f["kind"], f["pages"], cached=f.get("cached", f["kind"] != "hugetlb"))
            for f in head["files"]
        }
        self.names = {file: number for number, file in self.files.items()}
        self.child = None

    def run(self, operation: Operation[int]) -> tuple[int, list[list[Any]]]:
        heard: list[list[Any]] = []
        self.heard = heard
        try:
            notification = next(operation)
            while True:
                heard += [["invalidate_range", a, b] for a, b in ranges(notification)]
                notification = operation.send(ANSWERED)
        except StopIteration as stop:
            return stop.value, heard

    def step(self, line: dict[str, Any]) -> dict[str, Any]:
        """Run one line's call; what came out, in the fields of the format."""
        op, args = line["op"], list(line["args"])
        target = self.mm
        if op == "mmap":
            args[4] = 0 if args[3] & MAP_ANONYMOUS else self.files.get(args[4], 0)
        elif op in ("fsync", "ftruncate", "punch"):
            args[0] = self.files[args[0]]
        elif op == "reap":
            op, target = "exit", self.child
        err, ret = None, None
        if self.settled:
            self.memory.lru.drain()
        operation = self.write(*args, line["i"]) if op == "write" else call(target, op, args)
        try:
            ret, _ = self.run(operation)
        except MmError as error:
            err = error.errno
        if op == "get_mempolicy" and ret is not None:
            mode, nodes = POLICY.unpack(ret)
            ret = nodes << 16 | mode
        if op == "fork" and ret is not None:
            self.child, ret = self.memory.mms[ret], 0
        if op == "khugepaged_scan" and ret is not None:
            ret = 0  # the kernel does not say how many huge pages it has made
        return {
            "err": err,
            "ret": ret,
            "notify": [n for n in self.heard if n[2] > self.base and n[1] < self.end],
            "vmas": self.vmas(),
            "present": [list(run) for run in self.mm.present(self.base, self.end)],
            "swapped": [list(run) for run in self.mm.swapped(self.base, self.end)],
            "huge": [list(run) for run in self.mm.huge(self.base, self.end)],
            "pool": [self.memory.frames.hugetlb.free_nr, self.memory.frames.hugetlb.reserved_nr],
        }

    def write(self, start: int, length: int, number: int) -> Operation[int]:
        """One byte a page, as the recorder's: what a page holds decides whether a folio's split keeps it."""
        for address in range(start, start + length, PAGE_SIZE):
            yield from self.mm.store(address, bytes([number + 1 & 0xFF]))
        return 0

    def vmas(self) -> list[list[Any]]:
        return [
            [m.start, m.end, m.prot, m.offset if m.file else None, self.names.get(m.file)]
            for m in self.mm.mappings()
            if m.end > self.base and m.start < self.end
        ]


def replay(path: Path, check_each: int = 0, stop_at: int | None = None) -> Report:
    """Replay a recording; with check_each every invariant is recomputed after so many operations."""
    from mmubusd.mm.check import check_memory

    head, lines = read_trace(path)
    driver, report = Driver(head), Report()
    for line in lines:
        got = driver.step(line)
        report.operations += 1
        wrong = [name for name in FIELDS if name in line and got[name] != line[name]]
        report.wrong += bool(wrong)
        for name in wrong:
            report.mismatched[name] += 1
            if len(report.first) < 5:
                report.first.append((line["i"], name, [line["op"], line["args"]], line[name], got[name]))
        if check_each and report.operations % check_each == 0:
            check_memory(driver.memory)
        if wrong and stop_at is not None and len(report.first) >= stop_at:
            break
    return report
