"""A device that mirrors an address space, told what the HMM tests of the kernel tell theirs."""

from __future__ import annotations

import asyncio

import mmubus
from mmubus import PAGE_SIZE, PROT_READ
from mmubus.drivers.hmm import Dmirror
from serving import server

PAGES = 256


async def main() -> None:
    async with server(__doc__) as address, mmubus.connect(address, name="dmirror") as bus:
        program = await bus.create_mm("hmm-tests")
        buffer = await program.mmap(0, PAGES * PAGE_SIZE)
        device = Dmirror()
        await bus.register(device, program)

        await program.load(buffer, 1)
        print("SNAPSHOT", await device.snapshot(buffer, 2))
        written = await device.write(buffer, b"gpu!" * (PAGES * PAGE_SIZE // 4))
        print(f"WRITE: {written.pages} pages, {written.faults} fault; the program reads", await program.load(buffer, 4))
        await program.store(buffer, b"cpu!")
        read = await device.read(buffer, PAGES)
        print(f"READ: {read.pages} pages, {read.faults} faults; the device reads", read.data[:8])
        print("SNAPSHOT", await device.snapshot(buffer, 2))

        await program.mprotect(buffer, PAGES * PAGE_SIZE, PROT_READ)
        print(len(device.table), "pages mirrored after mprotect,", device.invalidations, "invalidations")
        try:
            await device.write(buffer, bytes(PAGE_SIZE))
        except mmubus.MmError as error:
            print("WRITE:", error)


asyncio.run(main())
