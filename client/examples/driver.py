# A driver: mirror a program's memory, use it, and lose it when the program takes it away.
import asyncio

import mmubus


async def main() -> None:
    async with mmubus.connect(name="my-driver") as bus:
        mm = await bus.create_mm("program")  # another process's: bus.mm(number)
        address = await mm.mmap(0, 16 * mmubus.PAGE_SIZE)
        await mm.store(address, b"from the program")
        mirror = await bus.mirror(mm)  # from now on we are asked before a page goes away
        print(await mirror.read(address, 16))
        await mirror.write(address, b"from the device ")
        print(await mm.load(address, 16))
        await mm.munmap(address, 16 * mmubus.PAGE_SIZE)  # returns when the mirror has let go
        print(len(mirror.held), "pages held after munmap")


asyncio.run(main())
