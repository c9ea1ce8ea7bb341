"""The clients' side of mmubus: drivers that answer, programs that call. Both use the client library as anyone would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

from mmu.v1 import address_space_pb2 as pb

import mmubus
from mmubus.address_space import AddressSpace
from mmubus.bench.worker import serve
from mmubus.channel import grpc, open_channel
from mmubus.connection import Bus
from mmubus.linux import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PAGE_SIZE, PROT_READ, PROT_WRITE, Op

__all__ = ["program", "responders"]

BASE = 0x10_0000_0000
SLOTS, SLOT_PAGES = 64, 16
BATCH = 128
REGISTER_AT_ONCE = 512


class _Driver(mmubus.Notifier):
    """Lets go of everything at once: its answer is what the bus itself costs."""

    def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
        """Nothing is held."""

    def age_page(self, mm: int, address: int) -> bool:
        """Nothing is held."""
        return False

    def invalidate_page(self, mm: int, address: int) -> None:
        """Nothing is held."""

    def release(self, mm: int) -> None:
        """Nothing is held."""


class _Drivers:
    """The sessions of one driver process."""

    def __init__(self, address: str, mm: int) -> None:
        self._address = address
        self._default = mm
        self._stack = AsyncExitStack()

    async def hold(self, count: int, streams: int, mm: int = 0) -> None:
        """The command: from now on, so many registrations in so many sessions."""
        await self.leave()
        per_session = -(-count // streams) if streams else 0
        for _ in range(streams):
            bus = await self._session()
            for _ in range(per_session):
                await bus.register(_Driver(), mm or self._default)

    async def attach(self, sessions: int, mm: int = 0) -> None:
        """The command: so many more sessions, each with one registration."""
        for _ in range(sessions):
            await (await self._session()).register(_Driver(), mm or self._default)

    async def ranges(self, first: int, count: int, mm: int = 0) -> None:
        """The command: one more session, with registrations of single pages, from page first on."""
        bus = await self._session()
        for begin in range(first, first + count, REGISTER_AT_ONCE):
            pages = range(begin, min(begin + REGISTER_AT_ONCE, first + count))
            starts = [BASE + page * PAGE_SIZE for page in pages]
            await asyncio.gather(
                *[bus.register(_Driver(), mm or self._default, start=at, end=at + PAGE_SIZE) for at in starts]
            )

    async def leave(self) -> None:
        """The command: all sessions leave."""
        await self._stack.aclose()
        self._stack = AsyncExitStack()

    async def _session(self) -> Bus:
        return await self._stack.enter_async_context(mmubus.connect(self._address, name="bench", lease_s=300))


async def responders(address: dict[str, Any]) -> None:
    """The role of a driver process."""
    drivers = _Drivers(address["address"], address["mm"])
    names = ("hold", "attach", "ranges", "leave")
    await serve({name: getattr(drivers, name) for name in names})
    await drivers.leave()


async def program(address: dict[str, Any]) -> None:
    """The role of a process that owns an address space and calls the memory manager."""
    async with mmubus.connect(address["address"], name="bench program") as bus:
        space = bus.mm(address["mm"])

        async def rounds(rounds: int, mm: int = 0) -> list[float]:
            """One munmap of one resident page after another, over the pipelined stream. Returns: µs of each."""
            return await _unmap_one_by_one(bus, bus.mm(mm) if mm else space, rounds)

        async def reads(rounds: int, mm: int = 0) -> list[float]:
            """One dma_read of one page after another, as a driver that holds it. Returns: µs of each."""
            return await _read_one_by_one(bus, bus.mm(mm) if mm else space, rounds)

        async def mix(operations: int, in_flight: int) -> float:
            """mmap, touch and munmap of 1 to 16 pages, nobody registered. Returns: operations a second."""
            return await _mix(bus, await bus.create_mm("mix"), operations, in_flight)

        async def flood(operations: int) -> float:
            """The same calls, encoded beforehand and sent as fast as they are taken. Returns: operations a second."""
            return await _flood(address["address"], await bus.create_mm("flood"), operations)

        await serve({"rounds": rounds, "reads": reads, "mix": mix, "flood": flood})


async def _unmap_one_by_one(bus: Bus, space: AddressSpace, rounds: int) -> list[float]:
    took = []
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
    async with bus.operations(mm=space.id) as operations:
        for _ in range(rounds):
            await operations.run(Op.MMAP, BASE, PAGE_SIZE, PROT_READ | PROT_WRITE, flags, 0, 0)
            await operations.run(Op.WRITE, BASE, PAGE_SIZE)
            begun = time.perf_counter()
            await operations.run(Op.MUNMAP, BASE, PAGE_SIZE)
            took.append((time.perf_counter() - begun) * 1e6)
    return took


async def _read_one_by_one(bus: Bus, space: AddressSpace, rounds: int) -> list[float]:
    took = []
    start = await space.mmap(0, PAGE_SIZE)
    registration = await bus.register(_Driver(), space.id, start=start, end=start + PAGE_SIZE)
    held = await registration.fault(start, start + PAGE_SIZE, True)
    pfns, generations = held.pfns.tolist(), held.generations.tolist()
    for _ in range(rounds):
        begun = time.perf_counter()
        await registration.dma_read(start, PAGE_SIZE, pfns, generations)
        took.append((time.perf_counter() - begun) * 1e6)
    await registration.unregister()
    await space.munmap(start, PAGE_SIZE)
    return took


def _calls(operations: int) -> Iterator[tuple[int, Op, tuple[int, ...]]]:
    """The mix: (thread, op, arguments). Calls of one thread are about one slot, and run in order; slots overlap."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
    for number in range(operations // 3):
        slot, pages = number % SLOTS, 1 + number % SLOT_PAGES
        at, size = BASE + slot * SLOT_PAGES * PAGE_SIZE, pages * PAGE_SIZE
        yield slot, Op.MMAP, (at, size, PROT_READ | PROT_WRITE, flags, 0, 0)
        yield slot, Op.WRITE, (at, size)
        yield slot, Op.MUNMAP, (at, size)


async def _mix(bus: Bus, space: AddressSpace, operations: int, in_flight: int) -> float:
    futures = []
    async with bus.operations(mm=space.id, in_flight_max=in_flight) as stream:
        begun = time.perf_counter()
        for thread, op, args in _calls(operations):
            futures.append(await stream.submit(op, *args, thread=thread))
        await stream.drain()
        took = time.perf_counter() - begun
    for future in futures:
        future.result().value()
    return len(futures) / took


async def _flood(address: str, space: AddressSpace, operations: int) -> float:
    calls = [
        pb.Call(id=number, thread=thread, op=op.value, mm=space.id, args=args)  # type: ignore[arg-type]
        for number, (thread, op, args) in enumerate(_calls(operations))
    ]
    messages = [
        pb.OperateRequest(calls=calls[at : at + BATCH]).SerializeToString() for at in range(0, len(calls), BATCH)
    ]
    async with open_channel(address) as channel:
        stream: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream("/mmu.v1.AddressSpaceService/Operate")()
        await stream.wait_for_connection()

        async def send() -> None:
            for message in messages:
                await stream.write(message)
            await stream.done_writing()

        begun = time.perf_counter()
        sender = asyncio.ensure_future(send())
        answered = 0
        while isinstance(data := await stream.read(), bytes):
            results = pb.OperateResponse.FromString(data).results
            answered += len(results)
            if any(result.HasField("error") for result in results):
                raise AssertionError("a call of the mix failed")
        took = time.perf_counter() - begun
        await sender
    assert answered == len(calls)
    return answered / took
