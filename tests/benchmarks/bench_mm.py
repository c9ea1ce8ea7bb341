"""What the memory core costs, beside the real kernel's own calls in the same run.

usage: python tests/benchmarks/bench_mm.py [--json]
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from statistics import median

from mmubusd.mm import Memory, Mm
from mmubusd.mm.addr import PMD_SIZE
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.notification import ANSWERED, Operation

PAGES = 1 << 18
LENGTH = PAGES << 12
BASE = 0x200000000000
PROT_RW, MAP_PRIVATE_ANON, MAP_FIXED, MAP_POPULATE = 3, 0x22, 0x10, 0x8000


def run(operation: Operation[int]) -> int:
    try:
        next(operation)
        while True:
            operation.send(ANSWERED)
    except StopIteration as stop:
        return int(stop.value)


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def kernel_populate_unmap() -> float:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def work() -> None:
        address = libc.mmap(None, LENGTH, PROT_RW, MAP_PRIVATE_ANON | MAP_POPULATE, -1, 0)
        assert address not in (None, ctypes.c_void_p(-1).value), "1 GiB is there to be mapped"
        libc.munmap(address, LENGTH)

    return median(timed(work) for _ in range(3))


def core_populate_unmap(mm: Mm) -> float:
    def work() -> None:
        run(mm.mmap(BASE, LENGTH, PROT_RW, MAP_PRIVATE_ANON | MAP_FIXED | MAP_POPULATE))
        run(mm.munmap(BASE, LENGTH))

    return median(timed(work) for _ in range(5))


def fault_us(mm: Mm, access: str) -> float:
    """One page fault, through the call's own generator."""
    count = 20000
    run(mm.mmap(BASE, count << 12, PROT_RW, MAP_PRIVATE_ANON | MAP_FIXED))
    costs = []
    for page in range(count):
        operation = mm.touch(BASE + (page << 12), 4096, access)
        begin = time.perf_counter()
        run(operation)
        costs.append(time.perf_counter() - begin)
    run(mm.munmap(BASE, count << 12))
    return median(costs) * 1e6


def small_unmap_us(mm: Mm) -> float:
    """mmap and munmap of one page, nobody registered."""
    count = 5000

    def work() -> None:
        for _ in range(count):
            run(mm.mmap(BASE, 4096, PROT_RW, MAP_PRIVATE_ANON | MAP_FIXED))
            run(mm.munmap(BASE, 4096))

    return median(timed(work) for _ in range(3)) / count * 1e6


def bytes_a_page() -> float:
    """Server memory for each resident page beside its data: what numpy and Python really hold of it."""
    memory = Memory(frames_nr=PAGES + 1024)
    mm = memory.create_mm()
    tracemalloc.start()
    run(mm.mmap(BASE, LENGTH, PROT_RW, MAP_PRIVATE_ANON | MAP_FIXED | MAP_POPULATE))
    tables = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    frames = memory.frames
    state = sum(a.itemsize for a in (frames.flags, frames.refcount, frames.mapcount, frames.generation, frames.mapping))
    return tables / PAGES + state + frames.index.itemsize + 4  # 4: its place in the free list


def thp_migration_us(thp: Thp) -> float:
    """2 MiB to a device's memory and back, as a huge page or as small ones; the kernel's hmm-tests time the same."""
    mm = Memory(frames_nr=8192, thp=thp).create_mm()
    block = (BASE + PMD_SIZE - 1) & -PMD_SIZE
    run(mm.mmap(block, PMD_SIZE, PROT_RW, MAP_PRIVATE_ANON | MAP_FIXED))
    for at in range(block, block + PMD_SIZE, 4096):
        run(mm.store(at, b"data"))

    def work() -> None:
        run(mm.migrate_to_device(block, block + PMD_SIZE, 7))
        run(mm.migrate_to_system(block, block + PMD_SIZE, 7))

    return median(timed(work) for _ in range(9)) * 1e6


def main() -> None:
    mm = Memory(frames_nr=PAGES + 65536).create_mm()
    kernel, core = kernel_populate_unmap(), core_populate_unmap(mm)
    figures = {
        "populate_unmap_kernel_ms": kernel * 1e3,
        "populate_unmap_core_ms": core * 1e3,
        "kernel_over_core": kernel / core,
        "write_fault_us": fault_us(mm, "write"),
        "read_fault_us": fault_us(mm, "read"),
        "mmap_munmap_one_page_us": small_unmap_us(mm),
        "bytes_a_resident_page": bytes_a_page(),
        "migrate_2_mib_huge_us": thp_migration_us(Thp.ALWAYS),
        "migrate_2_mib_small_us": thp_migration_us(Thp.NEVER),
    }
    if "--json" in sys.argv:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:28} {value:10.2f}")


if __name__ == "__main__":
    main()
