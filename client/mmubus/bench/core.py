"""The memory manager alone, in a process of its own: no server, no loop, and the real kernel beside it."""

from __future__ import annotations

import importlib
import mmap
import time
from collections.abc import Callable, Iterator
from typing import Any

from mmubusd.mm.memory import Memory

from mmubus.bench import unnotified
from mmubus.bench.machine import own_bytes
from mmubus.bench.worker import serve

__all__ = ["memory_manager"]

BASE = 0x10_0000_0000
PAGE_SIZE = 4096
PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS_FIXED = 3, 0x32
NOHUGEPAGE, POPULATE_WRITE = 15, 23
CHUNK = 200

Operation = Iterator[Any]


def finish(operation: Operation) -> Any:
    """Run an operation that nobody has to be waited for. Returns: its value."""
    while True:
        try:
            waits_for = next(operation)
        except StopIteration as done:
            return done.value
        # Long work lets others run now and then. By name: the copy without notifiers has a class of its own.
        if type(waits_for).__name__ != "Reschedule":
            raise AssertionError(f"nobody is registered, and yet it waits for {waits_for!r}")


def unmap_us(memory: Any, pages: int, rounds: int) -> list[float]:
    """munmap of a mapping of so many resident pages, again and again. Returns: µs of each."""
    mm = memory.create_mm("bench")
    took = []
    size = pages * PAGE_SIZE
    for _ in range(rounds):
        finish(mm.mmap(BASE, size, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS_FIXED))
        finish(mm.touch(BASE, size, "write"))
        begun = time.perf_counter_ns()
        finish(mm.munmap(BASE, size))
        took.append((time.perf_counter_ns() - begun) / 1e3)
    finish(mm.exit())
    return took


async def unmap(pages: int, chunks: int) -> dict[str, list[list[float]]]:
    """The command: munmap with nobody registered, and the same without the notifier calls, chunk by chunk in turn."""
    makers: dict[str, Callable[..., Any]] = {
        "with": Memory,
        "without": importlib.import_module(f"{unnotified.PREFIX}.mmubusd.mm.memory").Memory,
    }
    memories = {name: make(frames_nr=1 << 16) for name, make in makers.items()}
    took: dict[str, list[list[float]]] = {name: [] for name in memories}
    for chunk in range(chunks):
        # Whoever comes second may find warmer caches: they take turns at that, too.
        for name in sorted(memories, reverse=chunk % 2 == 1):
            took[name].append(unmap_us(memories[name], pages, CHUNK))
    return took


async def bulk(pages: int) -> dict[str, float]:
    """The command: populate and unmap so many pages, here and in the real kernel. Returns: ms of each."""
    size = pages * PAGE_SIZE
    memory = Memory(frames_nr=pages + 1024)
    mm = memory.create_mm("bench")
    finish(mm.mmap(BASE, size, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS_FIXED))
    times = [time.perf_counter()]
    finish(mm.madvise(BASE, size, POPULATE_WRITE))
    times.append(time.perf_counter())
    assert mm.resident_pages() == pages
    times.append(time.perf_counter())
    finish(mm.munmap(BASE, size))
    times.append(time.perf_counter())
    assert memory.frames.free_nr >= pages
    real = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    real.madvise(NOHUGEPAGE)  # page by page, as the simulated one has them
    times.append(time.perf_counter())
    real.madvise(POPULATE_WRITE)
    times.append(time.perf_counter())
    real.close()
    times.append(time.perf_counter())
    begun, populated, checked, unmapped, real_begun, real_populated, real_unmapped = times
    return {
        "populate": (populated - begun) * 1e3,
        "unmap": (unmapped - checked) * 1e3,
        "kernel_populate": (real_populated - real_begun) * 1e3,
        "kernel_unmap": (real_unmapped - real_populated) * 1e3,
    }


async def resident(pages: int) -> float:
    """The command: bytes of this process a resident page, without the page's own contents."""
    memory = Memory(frames_nr=2 * pages)
    mm = memory.create_mm("bench")
    finish(mm.mmap(BASE, pages * PAGE_SIZE, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS_FIXED))
    before = own_bytes()
    finish(mm.madvise(BASE, pages * PAGE_SIZE, POPULATE_WRITE))
    grown = own_bytes() - before
    assert mm.resident_pages() == pages
    return grown / pages


async def memory_manager() -> None:
    """The role."""
    await serve({"unmap": unmap, "bulk": bulk, "resident": resident})
