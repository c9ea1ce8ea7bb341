"""Two other processes attach to a program's memory, write to it, and lose it together with it."""

from __future__ import annotations

import asyncio
import sys

import mmubus
from mmubus import MADV_DONTNEED, PAGE_SIZE
from mmubus.drivers.xpmem import Exporter, Importer
from serving import server


async def importer(address: str, segment: int, name: str) -> None:
    """A process that knows the exporter's address and nothing of the bus."""
    connection = await Importer.connect(address)
    attached = await connection.attach(segment)
    print(f"  {name} reads", await attached.read(0, 7))
    await attached.write(PAGE_SIZE * int(name[-1]), name.encode())
    print(f"  {name} has written; it holds {len(attached.table)} pages", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print(f"  {name} holds {len(attached.table)} pages now, and reads", await attached.read(0, 7))
    await connection.close()


async def main() -> None:
    async with server(__doc__) as address, mmubus.connect(address, name="exporter") as bus:
        program = await bus.create_mm("program")
        at = await program.mmap(0, 4 * PAGE_SIZE)
        await program.store(at, b"program")
        exporter = Exporter(bus)
        where = await exporter.serve("127.0.0.1:0")
        segment = await exporter.make(program, at, 4 * PAGE_SIZE, by="rmap")
        print(f"segment {segment} at {where}, frames exported through the global rmap list")
        processes = [
            await asyncio.create_subprocess_exec(
                sys.executable, __file__, "import", where, str(segment), name, stdin=asyncio.subprocess.PIPE
            )
            for name in ("importer1", "importer2")
        ]
        for _ in range(400):  # until both have written
            if all([await program.load(at + n * PAGE_SIZE, 8) == b"importer" for n in (1, 2)]):
                break
            await asyncio.sleep(0.05)
        print("the program sees", [await program.load(at + n * PAGE_SIZE, 9) for n in (1, 2)])

        await program.madvise(at, 4 * PAGE_SIZE, MADV_DONTNEED)  # returns when both have let go of it
        print("taken away from all of them:", exporter.segments[segment].table)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
        await asyncio.gather(*(process.wait() for process in processes))
        await exporter.close()


if sys.argv[1:2] == ["import"]:
    asyncio.run(importer(sys.argv[2], int(sys.argv[3]), sys.argv[4]))
else:
    asyncio.run(main())
