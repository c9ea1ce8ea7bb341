"""The scenarios: each is a few things that a program does while a device uses its memory.

Most of them are the same random life, under another kind of chaos; the others stage one situation exactly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from mmubus.conform.kit import BASE, PAGE, PAGES, Broken, Stage, pages
from mmubus.linux import (
    MADV_DONTNEED,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PROT_READ,
    PROT_WRITE,
)

__all__ = ["SCENARIOS", "Scenario"]

MADV_PAGEOUT = 21
STEPS = 60
ELSEWHERE = BASE + 64 * PAGE


class Scenario(NamedTuple):
    """play: what happens; chaos: the knobs of the driver's session."""

    play: Callable[[Stage], Awaitable[None]]
    chaos: str = ""


def _tag(stage: Stage) -> bytes:
    return stage.random.randbytes(16)


async def life(stage: Stage) -> None:
    """Random calls and random accesses, one after another."""
    for _ in range(STEPS):
        page = stage.random.choice(pages())
        match stage.random.randrange(8):
            case 0 | 1:
                await stage.do(f"store({page:#x})", stage.cpu.store(page, _tag(stage)))
            case 2:
                await stage.do(f"madvise({page:#x}, DONTNEED)", stage.cpu.madvise(page, PAGE, MADV_DONTNEED))
            case 3:
                await stage.do(f"madvise({page:#x}, PAGEOUT)", stage.cpu.madvise(page, PAGE, MADV_PAGEOUT))
            case 4:
                prot = stage.random.choice((PROT_READ, PROT_READ | PROT_WRITE))
                await stage.do(f"mprotect({page:#x}, {prot})", stage.cpu.mprotect(page, PAGE, prot))
            case 5:
                await stage.write(page, _tag(stage))
            case _:
                await stage.coherent([page])
    await stage.coherent(pages())


async def written_and_taken(stage: Stage) -> None:
    """What the device wrote is there after the page has been reclaimed, protected and moved."""
    for page in pages():
        data = _tag(stage)
        if not await stage.write(page, data):
            continue
        await stage.do(f"madvise({page:#x}, PAGEOUT)", stage.cpu.madvise(page, PAGE, MADV_PAGEOUT))
        there = await stage.cpu.load(page, 16)
        if there != data:
            raise Broken("DirtyIsNotLost", f"the device wrote {data!r} to {page:#x}; after reclaim there is {there!r}")


async def same_address_again(stage: Stage) -> None:
    """The page at an address goes, and another one comes."""
    for page in pages():
        await stage.do(f"store({page:#x})", stage.cpu.store(page, b"before".ljust(16)))
        await stage.coherent([page])
        await stage.do(f"munmap({page:#x})", stage.cpu.munmap(page, PAGE))
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
        await stage.do(f"mmap({page:#x})", stage.cpu.mmap(page, PAGE, flags=flags))
        await stage.do(f"store({page:#x})", stage.cpu.store(page, b"after".ljust(16)))
        await stage.coherent([page])


async def fork_and_write(stage: Stage) -> None:
    """Copy-on-write: the device must follow the parent to the new page, and leave the child's alone."""
    for page in pages():
        await stage.do(f"store({page:#x})", stage.cpu.store(page, b"parent".ljust(16)))
    await stage.coherent(pages())
    child = await stage.cpu.fork("child")
    for page in pages()[::2]:
        await stage.do(f"store({page:#x})", stage.cpu.store(page, _tag(stage)))
    for page in pages()[1::2]:
        await stage.write(page, _tag(stage))
    await stage.coherent(pages())
    for page in pages():
        if await child.load(page, 16) != b"parent".ljust(16):
            raise Broken("OldPageNeverWritten", f"the child's page at {page:#x} has changed")
    await stage.do("the child's exit", child.exit())


async def remap(stage: Stage) -> None:
    """Pages move to another address, and come back."""
    for page in pages():
        await stage.do(f"store({page:#x})", stage.cpu.store(page, _tag(stage)))
    await stage.coherent(pages())
    length, flags = PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED
    await stage.do("mremap away", stage.cpu.mremap(BASE, length, length, flags, ELSEWHERE))
    await stage.coherent([*pages(), *(page - BASE + ELSEWHERE for page in pages())])
    await stage.do("mremap back", stage.cpu.mremap(ELSEWHERE, length, length, flags, BASE))
    await stage.coherent([*pages(), *(page - BASE + ELSEWHERE for page in pages())])


async def races(stage: Stage) -> None:
    """A fault against an invalidation, in both orders and at the same time."""
    for turn in range(STEPS // 2):
        page = stage.random.choice(pages())
        taking = stage.do(f"madvise({page:#x}, DONTNEED)", stage.cpu.madvise(page, PAGE, MADV_DONTNEED))
        storing = stage.do(f"store({page:#x})", stage.cpu.store(page, _tag(stage)))
        reading = stage.read(page)
        order = [(taking, reading, storing), (reading, taking, storing), (storing, reading, taking)][turn % 3]
        await asyncio.gather(*order)
        await stage.coherent([page])


async def in_the_middle(stage: Stage) -> None:
    """Revocation while the handler of another one runs: overlapping ranges, taken by several at a time."""
    for _ in range(STEPS // 4):
        await asyncio.gather(*(stage.read(page) for page in pages()[:8]))
        first = stage.random.randrange(PAGES - 4)
        await asyncio.gather(
            *(
                stage.do(
                    f"madvise({BASE + (first + n) * PAGE:#x}, {4 - n} pages, DONTNEED)",
                    stage.cpu.madvise(BASE + (first + n) * PAGE, (4 - n) * PAGE, MADV_DONTNEED),
                )
                for n in range(3)
            )
        )
    await stage.coherent(pages())


async def reclaim(stage: Stage) -> None:
    """Every page is written and reclaimed, over and over, while the device reads."""
    for _ in range(STEPS // 6):
        for page in pages()[:6]:
            await stage.do(f"store({page:#x})", stage.cpu.store(page, _tag(stage)))
        await asyncio.gather(
            stage.do("madvise(everything, PAGEOUT)", stage.cpu.madvise(BASE, PAGES * PAGE, MADV_PAGEOUT)),
            *(stage.read(page) for page in pages()[:6]),
        )
        await stage.coherent(pages()[:6])


SCENARIOS: dict[str, Scenario] = {
    "life": Scenario(life),
    "duplicates": Scenario(life, "duplicate=1"),
    "late": Scenario(life, "delay_s=0.02"),
    "supersets": Scenario(life, "flush=0.5"),
    "evictions": Scenario(life, "evict=1"),
    "non-blockable": Scenario(life, "nonblock=1"),
    "reconnects": Scenario(life, "drop=0.2 duplicate=0.3"),
    "everything at once": Scenario(life, "delay_s=0.01 duplicate=0.3 flush=0.2 evict=0.5 nonblock=0.3 drop=0.1"),
    "written and taken": Scenario(written_and_taken),
    "same address again": Scenario(same_address_again),
    "fork": Scenario(fork_and_write),
    "remap": Scenario(remap),
    "fault against invalidate": Scenario(races, "delay_s=0.005"),
    "in the middle of a handler": Scenario(in_the_middle, "delay_s=0.005"),
    "reclaim": Scenario(reclaim),
}
"""By name, in the order in which they are played. After them comes "restart", which needs a server to restart."""
