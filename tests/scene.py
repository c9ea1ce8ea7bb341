"""A program and its child, drivers that are quick, slow and wrong: something to look at, in tests and on pictures."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import mmubus
from mmubus import (
    MADV_DONTNEED,
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    FileKind,
)

READ_WRITE = PROT_READ | PROT_WRITE
TEXT, DATA, HEAP, SHARED, STACK = 0x400000, 0x600000, 0x10000000, 0x7F0000000000, 0x7FFFFFF00000
TEXT_PAGES, DATA_PAGES, HEAP_PAGES, SHARED_PAGES, STACK_PAGES = 64, 24, 512, 256, 32


class Slow(mmubus.Notifier):
    """A notifier that takes its time. Attributes: for_s: how long. may_go: while this is not set, for ever."""

    slips = ("age_page", "invalidate_page", "release")

    def __init__(self, for_s: float) -> None:
        self.for_s = for_s
        self.may_go = asyncio.Event()
        self.may_go.set()

    async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
        await asyncio.sleep(self.for_s)
        await self.may_go.wait()

    def invalidated_everything(self, why: str) -> None:
        """It keeps nothing."""


@dataclass
class Scene:
    """What is on the stage."""

    program: mmubus.AddressSpace
    child: mmubus.AddressSpace
    gpu: mmubus.Mirror
    nic: mmubus.Mirror
    slow: Slow
    violation: str

    async def churn(self, rounds: int, pause_s: float = 0.0, *, shared: bool = True) -> None:
        """Work that takes pages away from the drivers, which come back for them."""
        for number in range(rounds):
            at = HEAP + (number * 7 % 96) * PAGE_SIZE
            await self.nic.fault(at, at + 4 * PAGE_SIZE)
            await self.program.madvise(at, 2 * PAGE_SIZE, MADV_DONTNEED)
            await self.program.store(at, b"again")
            if shared and number % 5 == 0:
                pool = SHARED + (number % 64) * PAGE_SIZE
                await self.gpu.fault(pool, pool + 8 * PAGE_SIZE, write=True)
                await self.program.madvise(pool, PAGE_SIZE, MADV_DONTNEED)
            await asyncio.sleep(pause_s)


async def _program(bus: mmubus.Bus) -> mmubus.AddressSpace:
    mm = await bus.create_mm("trainer")
    image = await bus.open_file("/usr/lib/libtorch.so", size=(TEXT_PAGES + DATA_PAGES) * PAGE_SIZE, cached=True)
    pool = await bus.open_file("pool", size=SHARED_PAGES * PAGE_SIZE, kind=FileKind.SHM)
    fixed = MAP_PRIVATE | MAP_FIXED
    await mm.mmap(TEXT, TEXT_PAGES * PAGE_SIZE, PROT_READ | PROT_EXEC, fixed, file=image)
    await mm.mmap(DATA, DATA_PAGES * PAGE_SIZE, READ_WRITE, fixed, file=image, offset=TEXT_PAGES * PAGE_SIZE)
    for at, pages in ((HEAP, HEAP_PAGES), (STACK, STACK_PAGES)):
        await mm.mmap(at, pages * PAGE_SIZE, READ_WRITE, fixed | mmubus.MAP_ANONYMOUS)
    await mm.mmap(SHARED, SHARED_PAGES * PAGE_SIZE, READ_WRITE, MAP_SHARED | MAP_FIXED, file=pool)
    await mm.touch(TEXT, 40 * PAGE_SIZE)
    await mm.touch(DATA, 10 * PAGE_SIZE, write=True)
    await mm.touch(HEAP, 300 * PAGE_SIZE, write=True)
    await mm.touch(HEAP + 340 * PAGE_SIZE, 60 * PAGE_SIZE)
    await mm.touch(SHARED, 128 * PAGE_SIZE, write=True)
    await mm.touch(STACK + 28 * PAGE_SIZE, 4 * PAGE_SIZE, write=True)
    return mm


async def _misbehave(bus: mmubus.Bus, mm: mmubus.AddressSpace) -> str:
    """A driver that keeps a translation which was taken away from it, and uses it. Returns: what it is told."""

    class Forgetful(mmubus.Notifier):
        slips = ("age_page", "invalidate_page", "release")

        def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
            """It should drop what it has, and does not."""

    at = HEAP + 200 * PAGE_SIZE
    registration = await bus.register(Forgetful(), mm, name="dma-ring", start=HEAP, end=HEAP + HEAP_PAGES * PAGE_SIZE)
    kept = await registration.fault(at, at + PAGE_SIZE, write=True)
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    try:
        await registration.dma_write(at, b"late", [int(kept.pfns[0])], [int(kept.generations[0])])
    except mmubus.StaleTranslation as refused:
        return refused.message
    raise AssertionError("a stale access went through")


@asynccontextmanager
async def scene(address: str, *, slow_s: float = 0.02) -> AsyncIterator[Scene]:
    """Set the stage on a server. Args: slow_s: how long the slow driver takes for each notice."""
    async with AsyncExitStack() as stack:
        names = ("trainer", "gpu-0", "nic-1", "slow-dpu", "broken-nic")
        buses = {name: await stack.enter_async_context(mmubus.connect(address, name=name)) for name in names}
        program = await _program(buses["trainer"])
        child = await program.fork("trainer-save")
        await program.touch(HEAP, 100 * PAGE_SIZE, write=True)
        number = program.__index__()
        gpu = await buses["gpu-0"].mirror(number, style="mainline", name="svm")
        await gpu.fault(HEAP + 60 * PAGE_SIZE, HEAP + 220 * PAGE_SIZE)
        await gpu.fault(SHARED, SHARED + 96 * PAGE_SIZE, write=True)
        nic = await buses["nic-1"].mirror(number, name="mr-1")
        await nic.fault(HEAP, HEAP + 120 * PAGE_SIZE, write=True)
        await nic.fault(DATA, DATA + 4 * PAGE_SIZE)
        slow = Slow(slow_s)
        end = SHARED + SHARED_PAGES * PAGE_SIZE
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            registration = await buses["slow-dpu"].register(slow, number, start=SHARED, end=end, name="offload")
        await registration.fault(SHARED + 64 * PAGE_SIZE, SHARED + 128 * PAGE_SIZE)
        violation = await _misbehave(buses["broken-nic"], program)
        try:
            yield Scene(program, child, gpu, nic, slow, violation)
        finally:
            slow.for_s = 0.0
            slow.may_go.set()
            with suppress(mmubus.MmuBusError):  # the server may be gone
                await child.exit()
                await program.exit()
