"""The memory manager alone, against itself without notifiers and against the real kernel."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator, Callable

from mmubus.bench.effort import Effort
from mmubus.bench.row import Row, below, ratio_at_most, ratio_below
from mmubus.bench.worker import Worker

__all__ = ["core"]

BULK_PAGES, RESIDENT_PAGES = 1 << 18, 1 << 20
ROLE = "mmubus.bench.core:memory_manager"


async def core(effort: Effort, say: Callable[[str], None]) -> AsyncIterator[Row]:
    """The fast path of those who do not use the mechanism, bulk work, memory."""
    worker = await Worker.start(ROLE)
    try:
        for pages, bound in ((1, ratio_at_most(1.05)), (64, None)):
            say(f"core: munmap of {pages} pages with nobody registered")
            chunks = await worker.ask("unmap", pages=pages, chunks=effort.chunks)
            with_calls, without = (
                statistics.median(map(statistics.median, chunks[name])) for name in ("with", "without")
            )
            what = f"munmap of {pages} page{'s' * (pages > 1)}, nobody registered, p50"
            yield Row(what, "us", with_calls, without, "the core with the notifier calls removed", bound)
        say(f"core: {BULK_PAGES} pages, and the real kernel's")
        runs = [await worker.ask("bulk", pages=BULK_PAGES) for _ in range(effort.runs)]
    finally:
        await worker.stop()
    took = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    own, real = took["populate"] + took["unmap"], took["kernel_populate"] + took["kernel_unmap"]
    kernel = "the real kernel, base pages"
    yield Row("mm: populate + unmap of 2^18 pages", "ms", own, real, kernel, ratio_below(1))
    yield Row("mm: populate of 2^18 pages", "ms", took["populate"], took["kernel_populate"], kernel)
    yield Row("mm: unmap of 2^18 pages", "ms", took["unmap"], took["kernel_unmap"], kernel)
    say(f"core: memory of {RESIDENT_PAGES} resident pages")
    worker = await Worker.start(ROLE)  # a fresh one: what was freed before would be used again unseen
    try:
        resident = await worker.ask("resident", pages=RESIDENT_PAGES)
    finally:
        await worker.stop()
    yield Row("memory of a resident page, without its contents", "B", resident, bound=below(48))
