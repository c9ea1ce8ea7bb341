"""A device that uses a program's own addresses, by an IOMMU that shares the page table."""

from __future__ import annotations

import asyncio

import mmubus
from mmubus import PAGE_SIZE, PROT_READ
from mmubus.drivers.sva import Iommu
from serving import server


async def main() -> None:
    async with server(__doc__) as address, mmubus.connect(address, name="iommu") as bus:
        program = await bus.create_mm("program")
        at = await program.mmap(0, 16 * PAGE_SIZE)
        await program.store(at, b"in the program's page table already")
        pasid = await Iommu(bus).bind(program)
        print(await pasid.read(at, 35))
        await pasid.write(at + 4 * PAGE_SIZE, b"not there until the device asked for it")
        print(f"{pasid.walks} walks of the table, {pasid.page_requests} page request")

        await program.mprotect(at, PAGE_SIZE, PROT_READ)
        print(pasid.flushes, "flush;", len(pasid.iotlb), "entry left in the IOTLB")
        try:
            await pasid.write(at, b"x")
        except mmubus.MmError as error:
            print("the page request is answered:", error)
        await program.exit()
        try:
            await pasid.read(at + 4 * PAGE_SIZE, 1)
        except mmubus.MmError as error:
            print("after exit:", error)


asyncio.run(main())
