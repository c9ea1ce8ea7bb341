"""An application or a driver on a host of its own, told by a test what to do: one JSON object a line, both ways.

    {"id": 1, "do": "munmap", "mm": 1, "address": 268435456, "pages": 16}
    {"id": 1, "result": 1.02}              or {"id": 1, "error": "MmError: EINVAL: ..."}

Orders are carried out side by side. python member.py ADDRESS NAME
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import mmubus
from mmubus.drivers.rdma.mr import Access
from mmubus.drivers.rdma.odp import OnDemandRegion
from mmubus.linux import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_READ, PROT_WRITE

LEASE_S = 10.0


class Member:
    """What can be asked for; each method is an order."""

    def __init__(self, bus: mmubus.Bus, fences: list[dict[str, Any]]) -> None:
        self.bus = bus
        self.fences = fences
        self.device: mmubus.Mirror | OnDemandRegion | None = None

    # The application's side.

    async def create(self, name: str) -> int:
        return (await self.bus.create_mm(name)).id

    async def mmap(self, mm: int, address: int, pages: int) -> int:
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
        return await self.bus.mm(mm).mmap(address, pages * mmubus.PAGE_SIZE, PROT_READ | PROT_WRITE, flags)

    async def store(self, mm: int, address: int, data: str) -> None:
        await self.bus.mm(mm).store(address, bytes.fromhex(data))

    async def load(self, mm: int, address: int, length: int) -> str:
        return (await self.bus.mm(mm).load(address, length)).hex()

    async def munmap(self, mm: int, address: int, pages: int) -> float:
        """Seconds that it took."""
        start = time.monotonic()
        await self.bus.mm(mm).munmap(address, pages * mmubus.PAGE_SIZE)
        return time.monotonic() - start

    async def statistics(self) -> dict[str, int]:
        found = await self.bus.inspection.statistics()
        return {"freed_before_ack": found.freed_before_ack, "rounds_open": found.rounds_open}

    async def sessions(self) -> dict[str, list[str]]:
        """States of the sessions of each name, oldest first."""
        states: dict[str, list[str]] = {}
        for one in sorted(await self.bus.inspection.sessions(), key=lambda one: one.session):
            states.setdefault(one.name, []).append(one.state)
        return states

    # A driver's side.

    async def mirror(self, mm: int) -> None:
        self.device = await self.bus.mirror(mm)

    async def region(self, mm: int, address: int, pages: int) -> None:
        length = pages * mmubus.PAGE_SIZE
        self.device = await OnDemandRegion.register(self.bus, mm, address, length, Access.LOCAL_WRITE)

    async def read(self, address: int, length: int) -> str:
        assert self.device is not None
        return (await self.device.read(address, length)).hex()

    async def write(self, address: int, data: str) -> None:
        assert self.device is not None
        await self.device.write(address, bytes.fromhex(data))

    async def state(self) -> dict[str, Any]:
        """held: pages; fences: each with what it says was lost."""
        device = self.device
        held = len(device.held) if isinstance(device, mmubus.Mirror) else len(device.pages) if device else 0
        return {"session": str(self.bus.session.state), "held": held, "fences": self.fences}


def answer(number: int, **outcome: object) -> None:
    print(json.dumps({"id": number, **outcome}), flush=True)


async def obey(number: int, order: Callable[..., Awaitable[object]], arguments: dict[str, Any]) -> None:
    try:
        answer(number, result=await order(**arguments))
    except mmubus.MmuBusError as error:
        answer(number, error=f"{type(error).__name__}: {error}")


async def main(address: str, name: str) -> None:
    """Until standard input ends."""
    fences: list[dict[str, Any]] = []

    def fenced(error: mmubus.Fenced) -> None:
        fences.append({"message": str(error), "lost": sum(error.lost.values())})

    tasks: set[asyncio.Task[None]] = set()
    async with mmubus.connect(address, name=name, lease_s=LEASE_S, reattach=True, on_fenced=fenced) as bus:
        member = Member(bus, fences)
        while line := await asyncio.to_thread(sys.stdin.readline):
            order = json.loads(line)
            task = asyncio.create_task(obey(order.pop("id"), getattr(member, order.pop("do")), order))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
