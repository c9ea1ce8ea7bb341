"""A guest whose memory is a program's memory: it runs on while the program forks, and while its pages go."""

from __future__ import annotations

import asyncio

import mmubus
from mmubus import MADV_DONTNEED, PAGE_SIZE
from mmubus.drivers.kvm import MemorySlot, MmioExit, Vm
from serving import server

GPA = 0x10_0000  # where the guest sees it


async def main() -> None:
    async with server(__doc__) as address, mmubus.connect(address, name="hypervisor") as bus:
        program = await bus.create_mm("vmm")
        hva = await program.mmap(0, 64 * PAGE_SIZE)
        vm = Vm()
        await bus.register(vm, program)
        await vm.set_memory_slot(MemorySlot(0, GPA, hva, 64, log_dirty=True))

        await program.store(hva, b"kernel image")
        print("the guest loads", await vm.load(GPA, 12))
        await vm.store(GPA + 5 * PAGE_SIZE, b"guest data")
        print("the program sees", await program.load(hva + 5 * PAGE_SIZE, 10))
        print("guest pages written:", [hex(gfn) for gfn in vm.dirty_log(0)])

        snapshot = await program.fork()
        await vm.store(GPA + 5 * PAGE_SIZE, b"and more  ")
        print("the fork still has", await snapshot.load(hva + 5 * PAGE_SIZE, 10))

        await program.madvise(hva, 64 * PAGE_SIZE, MADV_DONTNEED)  # a balloon: returns when the guest has let go
        print(len(vm.shadow), "shadow entries after the balloon; the guest loads", await vm.load(GPA, 4))
        try:
            await vm.load(0xFEE0_0000, 4)
        except MmioExit as exit:
            print("exit to the device model:", exit)
        print(f"{vm.faults} guest page faults, {vm.flushes} TLB flushes, sequence {vm.seq}")


asyncio.run(main())
