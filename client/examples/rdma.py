"""Bytes move between two processes by RDMA, into regions of three kinds, while the far program forks and unmaps."""

from __future__ import annotations

import asyncio
import sys
import time

import mmubus
from mmubus import MADV_DONTNEED, PAGE_SIZE
from mmubus.drivers.rdma import (
    Access,
    CachedRegion,
    OnDemandRegion,
    ProtectionDomain,
    QueuePair,
    QueuePairs,
    RegistrationCache,
)
from serving import server

LENGTH = 64 * PAGE_SIZE
REMOTE = Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE


async def far(address: str) -> None:
    """The far process: a program, its NIC, and no rest."""
    async with mmubus.connect(address, name="far") as bus:
        program = await bus.create_mm("far")
        at = await program.mmap(0, 3 * LENGTH)
        domain = await ProtectionDomain.open(bus, program)
        pinned = await domain.pin(at, LENGTH, REMOTE)
        on_demand = await OnDemandRegion.register(bus, program, at + LENGTH, LENGTH, REMOTE)
        cache = await RegistrationCache.open(bus, program)
        cached = CachedRegion(cache, at + 2 * LENGTH, LENGTH, REMOTE)
        keys = [pinned.key, domain.add(on_demand), domain.add(cached)]
        pairs = await QueuePairs.listen(domain, "127.0.0.1:0")
        print(pairs.address, at, *keys, flush=True)
        pair = await pairs.accept()
        churning = asyncio.create_task(churn(program, at, 3 * LENGTH))
        received = await pair.receive(on_demand, on_demand.address, LENGTH)
        churning.cancel()
        text = (await program.load(on_demand.address, received)).decode()
        print(
            f"far: received {text!r}; {on_demand.faults} faults and {on_demand.invalidations} invalidations on demand,"
        )
        print(f"far: the cache: {cache.statistics}", flush=True)


async def churn(program: mmubus.AddressSpace, at: int, length: int) -> None:
    """Every page gets another frame, again and again."""
    while True:
        child = await program.fork()
        await program.touch(at, length, write=True)
        await child.exit()
        await asyncio.sleep(0.01)


async def main() -> None:
    async with server(__doc__) as address, mmubus.connect(address, name="near") as bus:
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "far", address, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        where, at, *keys = (await process.stdout.readline()).decode().split()
        program = await bus.create_mm("near")
        buffer = await program.mmap(0, LENGTH)
        domain = await ProtectionDomain.open(bus, program)
        local = await OnDemandRegion.register(bus, program, buffer, LENGTH)
        pair = await QueuePair.connect(domain, where)
        for number, (kind, key) in enumerate(zip(("pinned", "on demand", "cached"), keys, strict=True)):
            data = bytes([number + 1]) * LENGTH
            await program.store(buffer, data)
            began = time.perf_counter()
            for _ in range(5):
                await pair.rdma_write(local, buffer, LENGTH, int(key), int(at) + number * LENGTH)
                await pair.rdma_read(local, buffer, LENGTH, int(key), int(at) + number * LENGTH)
            rate = 10 * LENGTH / (time.perf_counter() - began) / 1e6
            right = await program.load(buffer, LENGTH) == data
            print(f"{kind:10} {rate:6.1f} MB/s while every page is copied on write; the bytes are right: {right}")
            await program.madvise(buffer, LENGTH, MADV_DONTNEED)
        await program.store(buffer, b"done")
        await pair.send(local, buffer, 4)
        print((await process.stdout.read()).decode(), end="")
        await process.wait()
        await pair.close()


if sys.argv[1:2] == ["far"]:
    asyncio.run(far(sys.argv[2]))
else:
    asyncio.run(main())
