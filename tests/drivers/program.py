"""A program of the soak: it has memory, changes it in every way there is, and knows what must be in it."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import TYPE_CHECKING

import mmubus
from drivers.cells import UNMAPPED, Cell, Value
from mmubus import (
    MADV_COLD,
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_MERGEABLE,
    MADV_PAGEOUT,
    MADV_UNMERGEABLE,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
    MmError,
    Op,
)

if TYPE_CHECKING:
    from drivers.outcome import Outcome

ANON_PAGES, FILE_PAGES, STEADY_PAGES = 24, 12, 4
RECORD = 16  # bytes of a page that are looked at
ZERO = bytes(RECORD)
BASE = 0x10_0000_0000
FILE_AT = BASE + (ANON_PAGES + 8) * PAGE_SIZE
STEADY_AT = FILE_AT + (FILE_PAGES + 8) * PAGE_SIZE  # memory that is never unmapped: what pins are for
HUGE_PAGES = 512
HUGE_AT = BASE + HUGE_PAGES * PAGE_SIZE  # memory that asks for huge pages; some of its pages are looked at
HUGE_LOOKED_AT = (0, 1, 7, 255, 256, 300, 510, 511)
MAPPINGS = ((BASE, ANON_PAGES), (FILE_AT, FILE_PAGES), (STEADY_AT, STEADY_PAGES), (HUGE_AT, HUGE_PAGES))
ANON = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED


class Program:
    """One address space and its oracle. Attributes: cells: address -> what may be there."""

    def __init__(self, mm: mmubus.AddressSpace, file: mmubus.File, random: Random, outcome: Outcome) -> None:
        self.mm = mm
        self.file = file
        self.random = random
        self.outcome = outcome
        self.anon = [BASE + n * PAGE_SIZE for n in range(ANON_PAGES)]
        self.shared = [FILE_AT + n * PAGE_SIZE for n in range(FILE_PAGES)]
        self.steady = [STEADY_AT + n * PAGE_SIZE for n in range(STEADY_PAGES)]
        self.huge = [HUGE_AT + n * PAGE_SIZE for n in HUGE_LOOKED_AT]
        self.cells = {address: Cell(ZERO) for address in (*self.anon, *self.shared, *self.steady, *self.huge)}
        self._serial = 0
        self._structure = asyncio.Lock()  # one change of the layout at a time; accesses go on meanwhile

    @classmethod
    async def start(cls, bus: mmubus.Bus, random: Random, name: str, outcome: Outcome) -> Program:
        mm = await bus.create_mm(name)
        file = await bus.open_file(name, size=FILE_PAGES * PAGE_SIZE)
        await mm.mmap(BASE, ANON_PAGES * PAGE_SIZE, flags=ANON)
        await mm.mmap(FILE_AT, FILE_PAGES * PAGE_SIZE, flags=MAP_SHARED | MAP_FIXED, file=file)
        await mm.mmap(STEADY_AT, STEADY_PAGES * PAGE_SIZE, flags=ANON)
        await mm.mmap(HUGE_AT, HUGE_PAGES * PAGE_SIZE, flags=ANON)
        await mm.madvise(HUGE_AT, HUGE_PAGES * PAGE_SIZE, MADV_HUGEPAGE)
        return cls(mm, file, random, outcome)

    async def run(self, until: float) -> None:
        await asyncio.gather(self._access(until), self._change(until), self._fork(until))

    # Accesses, of the program and of devices alike.

    def record(self, by: str) -> bytes:
        """A value that was never written before."""
        self._serial += 1
        return f"{by[:6]}{self.mm.id}-{self._serial}".encode().ljust(RECORD, b".")[:RECORD]

    def check(self, by: str, address: int, possible: set[Value], got: Value) -> None:
        """What was read must have been possible."""
        if got not in possible:
            shown = sorted(map(str, possible))
            self.outcome.wrong.append(f"{by} read {got!r} at {address:#x}, possible were {shown}")
            if by in self.outcome.drivers:
                self.outcome.row(by).wrong += 1

    @contextmanager
    def changing(self, addresses: Iterable[int], *outcomes: Value) -> Iterator[list[bool]]:
        """An operation on pages, each of which it may leave as one of these. Put False into the list: perhaps not."""
        addresses, done = list(addresses), [True]
        for address in addresses:
            self.cells[address].begin(*outcomes)
        try:
            yield done
        except BaseException:
            done[0] = False
            raise
        finally:
            for address in addresses:
                self.cells[address].end(done=done[0])

    async def _access(self, until: float) -> None:
        """The CPU loads and stores."""
        addresses = list(self.cells)
        while time.monotonic() < until:
            address = self.random.choice(addresses)
            if self.random.random() < 0.5:
                await self._store(address)
            else:
                await self._load(address)
            self.outcome.acts["load or store"] += 1

    async def _load(self, address: int) -> None:
        with self.cells[address].watched() as possible:
            try:
                got: Value = await self.mm.load(address, RECORD)
            except MmError as error:
                got = self._failed("a load", error)
            self.check("the program", address, possible, got)

    async def _store(self, address: int) -> None:
        data = self.record("cpu")
        with self.changing([address], data) as done:
            try:
                await self.mm.store(address, data)
            except MmError as error:
                self._failed("a store", error)
                done[0] = False

    def _failed(self, what: str, error: MmError) -> None:
        if error.errno not in (errno.EFAULT, errno.ENXIO):
            self.outcome.wrong.append(f"{what} failed with {error}")

    # Changes of the layout.

    async def _change(self, until: float) -> None:
        changes = [
            self._dontneed, self._unmap, self._move, self._protect, self._fsync, self._reclaim, self._truncate,
            self._punch, self._pwrite, self._migrate, self._merge, self._huge, self._huge, self._soft_dirty,
        ]  # fmt: skip
        while time.monotonic() < until:
            change = self.random.choice(changes)
            async with self._structure:
                await change()
            self.outcome.acts[change.__name__.strip("_")] += 1
            await asyncio.sleep(self.random.random() * 0.01)

    def _some(self, pages: list[int]) -> list[int]:
        first = self.random.randrange(len(pages))
        return pages[first : first + self.random.randint(1, 6)]

    async def _dontneed(self) -> None:
        some = self._some(self.anon)
        with self.changing(some, ZERO):
            await self.mm.madvise(some[0], len(some) * PAGE_SIZE, MADV_DONTNEED)

    async def _unmap(self) -> None:
        """munmap, and sooner or later the same address again: whoever kept the old frame is found out."""
        some = self._some(self.anon)
        length = len(some) * PAGE_SIZE
        with self.changing(some, UNMAPPED):
            await self.mm.munmap(some[0], length)
        await asyncio.sleep(self.random.random() * 0.005)
        with self.changing(some, ZERO):
            await self.mm.mmap(some[0], length, flags=ANON)

    async def _move(self) -> None:
        """mremap to another place; the contents go along, and so do writes that come in meanwhile."""
        count = self.random.randint(1, 3)
        source = self.random.randrange(ANON_PAGES - 2 * count)
        target = self.random.randint(source + count, ANON_PAGES - count)
        old, new = self.anon[source : source + count], self.anon[target : target + count]
        came: set[Value] = set()
        for address in old:
            came |= self.cells[address].candidates
        with ExitStack() as stack:
            sets = [stack.enter_context(self.cells[address].watched()) for address in old]
            with self.changing(new, UNMAPPED, *came), self.changing(old, UNMAPPED) as done:
                for here, there in zip(old, new, strict=True):
                    self.cells[here].follower = self.cells[there]
                try:
                    flags = MREMAP_MAYMOVE | MREMAP_FIXED
                    await self.mm.mremap(old[0], count * PAGE_SIZE, count * PAGE_SIZE, flags, new[0])
                except MmError as error:  # the pages belong to several mappings
                    if error.errno != errno.EFAULT:
                        raise
                    done[0] = False
                finally:
                    for here in old:
                        self.cells[here].follower = None
                for address, seen in zip(new, sets, strict=True):
                    self.cells[address].begin(*seen)
                    self.cells[address].end()
        for address in new:
            await self._load(address)
        for pages in (old, new):  # after an error the target may be gone, too
            with self.changing(pages, ZERO):
                await self.mm.mmap(pages[0], count * PAGE_SIZE, flags=ANON)

    async def _protect(self) -> None:
        some = self._some(self.random.choice([self.anon, self.shared]))
        for address in some:
            self.cells[address].protected += 1
            self.cells[address].protections += 1
        await self.mm.mprotect(some[0], len(some) * PAGE_SIZE, PROT_READ)
        await asyncio.sleep(self.random.random() * 0.005)
        await self.mm.mprotect(some[0], len(some) * PAGE_SIZE, PROT_READ | PROT_WRITE)
        for address in some:
            self.cells[address].protected -= 1

    async def _fsync(self) -> None:
        if self.random.random() < 0.5:
            await self.file.fsync()
        else:
            await self.mm.msync(FILE_AT, FILE_PAGES * PAGE_SIZE)

    async def _reclaim(self) -> None:
        some = self._some(self.random.choice([self.anon, self.shared, self.steady, self.huge]))
        advice = self.random.choice([MADV_PAGEOUT, MADV_COLD])
        await self.mm.madvise(some[0], some[-1] + PAGE_SIZE - some[0], advice)

    async def _truncate(self) -> None:
        keep = self.random.randrange(FILE_PAGES)
        with self.changing(self.shared[keep:], UNMAPPED, ZERO):
            await self.file.truncate(keep * PAGE_SIZE)
            await self.file.truncate(FILE_PAGES * PAGE_SIZE)

    async def _punch(self) -> None:
        some = self._some(self.shared)
        with self.changing(some, ZERO):
            await self.file.punch_hole(some[0] - FILE_AT, len(some) * PAGE_SIZE)

    async def _pwrite(self) -> None:
        address, data = self.random.choice(self.shared), self.record("pwrite")
        with self.changing([address], data):
            await self.file.pwrite(data, address - FILE_AT)

    async def _migrate(self) -> None:
        """To the other node, and it is all the same."""
        some = self._some(self.random.choice([self.anon, self.shared, self.steady, self.huge]))
        length = some[-1] + PAGE_SIZE - some[0]
        await self.mm.call(Op.MOVE_PAGES, some[0], length, self.random.randrange(2))

    async def _merge(self) -> None:
        """The same bytes into several pages, which become one until somebody writes."""
        some, data = self._some(self.anon), self.record("twin")
        for address in some:
            with self.changing([address], data) as done:
                try:
                    await self.mm.store(address, data.ljust(PAGE_SIZE, b"\0"))
                except MmError as error:
                    self._failed("a store", error)
                    done[0] = False
        length = len(some) * PAGE_SIZE
        await self.mm.madvise(some[0], length, MADV_MERGEABLE)
        for _ in range(3):
            await self.mm.call(Op.KSM_SCAN)
        if self.random.random() < 0.5:
            await self.mm.madvise(some[0], length, MADV_UNMERGEABLE)

    async def _huge(self) -> None:
        """Part of a huge page goes, or all of it, and then it comes as a whole."""
        if self.random.random() < 0.5:
            some = self._some(self.huge)
            with self.changing(some, ZERO):
                await self.mm.madvise(some[0], some[-1] + PAGE_SIZE - some[0], MADV_DONTNEED)
            return
        with self.changing(self.huge, ZERO):
            await self.mm.madvise(HUGE_AT, HUGE_PAGES * PAGE_SIZE, MADV_DONTNEED)
        await self._store(self.random.choice(self.huge))

    async def _soft_dirty(self) -> None:
        """All of it write-protected, to see what is written from now on."""
        await self.mm.call(Op.CLEAR_REFS, 4)

    async def _fork(self, until: float) -> None:
        """Children come and go: each sees what was there when it was made, whatever parent and devices write."""
        while time.monotonic() < until:
            some = self.random.sample([*self.anon, *self.steady, *self.huge], 6)
            with ExitStack() as stack:
                sets = [stack.enter_context(self.cells[address].watched()) for address in some]
                async with self._structure:
                    child = await self.mm.fork()
            await asyncio.sleep(self.random.random() * 0.02)
            for address, possible in zip(some, sets, strict=True):
                try:
                    got: Value = await child.load(address, RECORD)
                except MmError as error:
                    got = self._failed("a child's load", error)
                self.check("a child", address, possible, got)
                if got is not UNMAPPED and self.random.random() < 0.5:
                    await child.store(address, b"of the child....")
            await child.exit()
            self.outcome.acts["fork"] += 1
            await asyncio.sleep(self.random.random() * 0.05)


class Hog:
    """Somebody else, whose file does not fit into memory, nor does what it writes: what nobody uses has to go, to its
    file or to swap, and devices are asked first.

    Now and then it gives all of it back; then there is room for huge pages, until it begins again.
    """

    PAGES, AT_A_TIME, TIMES = 10_000, 512, 40

    def __init__(
        self, mm: mmubus.AddressSpace, file: mmubus.File, mapped: int, own: int, random: Random, outcome: Outcome
    ) -> None:
        self.mm, self.file, self.mapped, self.own, self.random, self.outcome = mm, file, mapped, own, random, outcome

    @classmethod
    async def start(cls, bus: mmubus.Bus, random: Random, outcome: Outcome) -> Hog:
        mm = await bus.create_mm("hog")
        file = await bus.open_file("large", size=cls.PAGES * PAGE_SIZE)
        mapped = await mm.mmap(0, cls.PAGES * PAGE_SIZE, PROT_READ, MAP_SHARED, file)
        own = await mm.mmap(0, cls.PAGES * PAGE_SIZE)
        return cls(mm, file, mapped, own, random, outcome)

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            for _ in range(self.TIMES):
                first, write = self.random.randrange(self.PAGES - self.AT_A_TIME), self.random.random() < 0.5
                start = (self.own if write else self.mapped) + first * PAGE_SIZE
                await self.mm.touch(start, self.AT_A_TIME * PAGE_SIZE, write=write)
                self.outcome.acts["hog"] += 1
                await asyncio.sleep(0.02)
                if time.monotonic() > until:
                    return
            await self.file.truncate(0)
            await self.file.truncate(self.PAGES * PAGE_SIZE)
            await self.mm.madvise(self.own, self.PAGES * PAGE_SIZE, MADV_DONTNEED)
            self.outcome.acts["hog gives back"] += 1
            await asyncio.sleep(self.random.random() * 2.0)
