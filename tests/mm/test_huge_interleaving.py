"""Operations on parts of the same huge pages, several at once, resumed in any order: as test_interleaving, but huge."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from mm.driver import ANON_PRIVATE, FIXED, RW, Mirror, at, run
from mm.test_interleaving import Running, Thread, World
from mmubusd.mm import Memory, Mm
from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.check import check_idle, check_memory
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.idle import CLEAR
from mmubusd.mm.madvise import COLD, COLLAPSE, DONTNEED, FREE, PAGEOUT, POPULATE_WRITE

BLOCK = 512
SHARE = 128
"""Pages of each thread's own part: four threads share a block."""
ZERO = bytes(8)
DEVICE = 7


class HugeThread(Thread):
    """Works on its part of a block; its part is compared with a dict of pages."""

    world: HugeWorld

    def __init__(self, world: World, number: int, rng: random.Random) -> None:
        super().__init__(world, number, rng)
        self.first = number * SHARE
        self.lazy: set[int] = set()

    def _range(self) -> tuple[int, int]:
        start = self.rng.randrange(SHARE)
        return self.first + start, self.rng.randint(1, min(40, SHARE - start))

    def _calls(self) -> Iterator[Running]:
        mm, rng = self.world.mm, self.rng
        kinds = ["store"] * 5 + ["load"] * 4 + ["drop", "age", "age", "free", "protect", "move", "device", "device"]
        kinds += ["whole", "fork", "khugepaged", "idle"] + ["there", "back"] * self.world.has_device
        while True:
            page, count = self._range()
            address, size, span = at(page), count * PAGE_SIZE, range(page, page + count)
            kind = rng.choice(kinds)
            if kind == "store":
                data = rng.randbytes(8)
                self.pages[page] = data
                self.lazy.discard(page)
                yield Running("store", mm.store(address, data))
            elif kind == "load":
                yield from self._load(page)
            elif kind == "drop":
                self._forget(span)
                yield Running("dontneed", mm.madvise(address, size, DONTNEED))
            elif kind == "age":
                yield Running("age", mm.madvise(address, size, rng.choice([COLD, PAGEOUT])))
            elif kind == "free":
                self.lazy.update(span)
                yield Running("free", mm.madvise(address, size, FREE))
            elif kind == "protect":
                yield Running("mprotect", mm.mprotect(address, size, 1))
                yield from self._load(page)
                yield Running("mprotect", mm.mprotect(address, size, RW))
            elif kind == "move":
                yield Running("mremap", mm.mremap(address, size, size, 3, at(page + 4 * BLOCK)))
                yield Running("mremap", mm.mremap(at(page + 4 * BLOCK), size, size, 3, address))
            elif kind == "device":
                yield self.world.fault(page, count, rng.random() < 0.5)
            elif kind == "whole":
                block = at(page) & -(BLOCK * PAGE_SIZE)
                advice = rng.choice([COLLAPSE, COLLAPSE, COLD, PAGEOUT, POPULATE_WRITE])
                yield Running("whole", mm.madvise(block, BLOCK * PAGE_SIZE, advice))
            elif kind == "khugepaged":
                yield Running("khugepaged", self.world.memory.khugepaged_scan(rng.choice([0, BLOCK])))
            elif kind == "idle":
                yield Running("idle", mm.idle_scan(at(0), 2 * BLOCK * PAGE_SIZE, CLEAR))
            elif kind in ("there", "back"):
                start, end = rng.choice([(at(0), at(BLOCK)), (at(BLOCK), at(2 * BLOCK)), (address, address + size)])
                move = mm.migrate_to_device if kind == "there" else mm.migrate_to_system
                yield Running(kind, move(start, end, DEVICE))
            else:
                yield self.world.fork_or_exit()

    def _load(self, page: int) -> Iterator[Running]:
        call = Running("load", self.world.mm.load(at(page), 8))
        yield call
        wanted = self.pages.get(page, ZERO)
        assert call.then == wanted or (page in self.lazy and call.then == ZERO), f"page {page}"
        if call.then == ZERO:
            self.pages.pop(page, None)

    def check(self) -> None:
        mm = self.world.mm
        for page in range(self.first, self.first + SHARE):
            there = page if mm.vmas.find(at(page)) else page + 4 * BLOCK  # or just moved away
            got, wanted = run(mm.load(at(there), 8)), self.pages.get(page, ZERO)
            assert got == wanted or (page in self.lazy and got == ZERO), f"page {page}"


class HugeWorld(World):
    def __init__(self, seed: int, frames_nr: int) -> None:
        self.rng = random.Random(seed)
        self.has_device = frames_nr > 4096  # what is in its memory cannot be reclaimed
        self.memory = Memory(frames_nr=frames_nr, swap_slots_nr=4096, thp=Thp.ALWAYS)
        self.mm = self.memory.create_mm("main")
        self.mm.notified = True
        self.mirror = Mirror(self.memory)
        self.children: list[Mm] = []
        self.files: list[int] = []
        run(self.mm.mmap(at(0), 2 * BLOCK * PAGE_SIZE, RW, ANON_PRIVATE | FIXED))
        self.threads = [HugeThread(self, n, random.Random(f"{seed}-{n}")) for n in range(6)]
        self.running = []


@pytest.mark.parametrize("frames_nr", [1400, 8192])
@pytest.mark.parametrize("seed", range(6))
def test_threads_on_parts_of_huge_pages(seed: int, frames_nr: int) -> None:
    world = HugeWorld(seed, frames_nr)
    for turn in range(500):
        world.step()
        if turn % 10 == 0:
            check_memory(world.memory)
        world.mirror.check_alive()
    world.finish()
    check_idle(world.memory)
    world.mirror.check_current()
    for thread in world.threads:
        thread.check()
