"""An accelerator with a TLB of eight entries, two contexts on one address space, and pages that go away under it."""

from __future__ import annotations

import asyncio

import mmubus
from mmubus import MADV_DONTNEED, PAGE_SIZE
from mmubus.drivers.gru import Gru
from serving import server


async def main() -> None:
    async with server(__doc__) as address, mmubus.connect(address, name="gru") as bus:
        program = await bus.create_mm("program")
        at = await program.mmap(0, 64 * PAGE_SIZE)
        gru = Gru(bus, entries_max=8)
        context, same = await gru.get(program), await gru.get(program)
        print("one notifier for both users:", context is same, bus.session.registrations)

        data = bytes(range(256)) * 16 * 40
        await context.store(at, data)
        print("copied through the TLB:", await program.load(at, len(data)) == data)
        print(len(gru.tlb), "entries,", context.faults, "faults")

        await asyncio.gather(
            *(program.madvise(at + n * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED) for n in range(40)),
            *(context.load(at + n * PAGE_SIZE, 100) for n in range(40)),
        )
        print(f"{context.flushes} purges, {context.waits} faults waited, {context.range_active} ranges active now")
        print("what is left:", await context.load(at, 4))
        await gru.put(same)
        await gru.put(context)


asyncio.run(main())
