"""Two models side by side: a device that is told by DMA_MAP and DMA_UNMAP, and one that faults and is notified."""

from __future__ import annotations

import asyncio
import socket
import sys

import mmubus
from mmubus import MADV_DONTNEED, PAGE_SIZE
from mmubus.drivers.vfio_user import Device, Vmm
from serving import server

PAGES, TURNS = 64, 20


async def device(descriptor: int) -> None:
    """The device process: it has a socket, and knows nothing of the bus."""
    self = Device()
    channel = self.connect(*await asyncio.open_connection(sock=socket.socket(fileno=descriptor)))
    reads = 0
    while True:
        await self.wait_mapped(0, PAGES * PAGE_SIZE)
        try:
            data = await self.read(reads % PAGES * PAGE_SIZE, 4)
            await self.write((PAGES - 1) * PAGE_SIZE + 8, data + reads.to_bytes(4, "little"))
        except mmubus.MmError:
            continue  # it was unmapped on the way: wait until it is mapped again
        except mmubus.ConnectionLost:
            break
        reads += 1
    await channel.close()
    print(f"  the device made {reads} reads and as many writes")


async def main() -> None:
    async with server(__doc__) as address, mmubus.connect(address, name="vmm") as bus:
        program = await bus.create_mm("program")
        at = await program.mmap(0, PAGES * PAGE_SIZE)
        ours, theirs = socket.socketpair()
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "device", str(theirs.fileno()), pass_fds=[theirs.fileno()]
        )
        theirs.close()
        vmm = Vmm()
        await bus.register(vmm, program)
        channel = await vmm.connect(*await asyncio.open_connection(sock=ours))
        await vmm.dma_map(0, at, PAGES * PAGE_SIZE)
        mirror = await bus.mirror(program, style="mainline", only_held=True)
        await mirror.read(at, PAGES * PAGE_SIZE)
        for turn in range(TURNS):  # one page of 64 goes, and comes back
            await program.madvise(at + turn * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
            await program.store(at + turn * PAGE_SIZE, b"%04d" % turn)
            assert await mirror.read(at + turn * PAGE_SIZE, 4) == b"%04d" % turn
            await asyncio.sleep(0.02)
        print(f"{TURNS} times one page of {PAGES} was taken away:")
        print(f"  vfio-user: {vmm.unmaps} unmaps and {vmm.remaps} maps again, each of {PAGES} pages,")
        print(f"             {channel.commands} commands to the device")
        seen = mirror.statistics
        print(
            f"  notifier:  {seen.pages_dropped} pages dropped, {seen.faults} faults, {seen.pages_granted} pages granted"
        )
        await channel.close()
        await process.wait()


if sys.argv[1:2] == ["device"]:
    asyncio.run(device(int(sys.argv[2])))
else:
    asyncio.run(main())
