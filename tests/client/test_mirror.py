"""The mirror's race, in both orders, and everything else that may overtake an access. The server does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import mmubus
import pytest
from fake_server import Attachment, FakeServer, fake_server
from mmu.v1 import device_pb2 as pb
from mmu.v1 import session_pb2, types_pb2
from mmubus import PAGE_SIZE
from mmubus.device import NO_PFN, RIGHT_READ, RIGHT_WRITE
from patience import until

RANGE = types_pb2.NOTIFIER_OP_INVALIDATE_RANGE
AT = 0x7000_0000


class Memory:
    """The device's side of a machine: grants what it is asked for, and knows what it has granted.

    Attributes:
        before_grant: awaited between putting a grant together and sending it.
        seq: the last notice that was put into the outbox.
    """

    def __init__(self) -> None:
        self.bytes = bytearray(16 * PAGE_SIZE)
        self.generation = 1
        self.seq = 0
        self.holes: set[int] = set()
        self.faults: list[tuple[int, int, bool]] = []
        self.retries = 0
        self.before_grant: Any = None
        self.before_access: Any = None

    async def answer(self, request: pb.AccessRequest) -> pb.AccessResponse:
        kind = request.WhichOneof("request")
        if kind == "fault":
            return await self._fault(request.fault)
        access = request.dma_read if kind == "dma_read" else request.dma_write
        if self.before_access is not None:
            waiting, self.before_access = self.before_access, None
            await waiting()
        if any(generation != self.generation for generation in access.generations):
            stale = pb.AccessError(
                code=9, reason="STALE_TRANSLATION", message="taken by munmap", metadata={"round": "4"}
            )
            return pb.AccessResponse(error=stale)
        at = access.addr - AT
        if isinstance(access, pb.DmaReadRequest):
            return pb.AccessResponse(dma_read=pb.DmaReadResponse(data=bytes(self.bytes[at : at + access.length])))
        self.bytes[at : at + len(access.data)] = access.data
        return pb.AccessResponse(dma_write=pb.DmaWriteResponse())

    async def _fault(self, fault: pb.FaultRequest) -> pb.AccessResponse:
        self.faults.append((fault.start, fault.end, fault.write))
        if self.retries:
            self.retries -= 1
            return pb.AccessResponse(fault=pb.FaultResponse(retry=True))
        addresses = range(fault.start, fault.end, PAGE_SIZE)
        if any(address in self.holes for address in addresses):
            return pb.AccessResponse(error=pb.AccessError(code=9, reason="EFAULT", message="no mapping there"))
        translations = pb.Translations(
            start=fault.start,
            pfns=[100 + (address - AT) // PAGE_SIZE for address in addresses],
            generations=[self.generation] * len(addresses),
            rights=bytes([RIGHT_READ | (RIGHT_WRITE if fault.write else 0)] * len(addresses)),
        )
        grant = pb.FaultResponse(translations=translations, as_of_seq=self.seq)
        if self.before_grant is not None:
            waiting, self.before_grant = self.before_grant, None
            await waiting()
        return pb.AccessResponse(fault=grant)


class Bench:
    """A mirror on a fake server."""

    def __init__(
        self, server: FakeServer, memory: Memory, bus: mmubus.Bus, mirror: mmubus.Mirror, attachment: Attachment
    ):
        self.server, self.memory, self.bus, self.mirror, self.attachment = server, memory, bus, mirror, attachment

    async def take_away(self, start: int = AT, end: int = AT + PAGE_SIZE) -> session_pb2.Acknowledge:
        """Invalidate a range: notice, acknowledgement, and the frames begin another life."""
        self.memory.seq += 1
        self.attachment.notice(self.memory.seq, op=RANGE, mm=5, start=start, end=end)
        acknowledge = await self.attachment.acknowledged()
        self.memory.generation += 1
        return acknowledge


@asynccontextmanager
async def made(**options: Any) -> AsyncIterator[Bench]:
    async with fake_server() as server:
        memory = Memory()
        server.answer = memory.answer
        async with mmubus.connect(server.address) as bus:
            mirror = await bus.mirror(5, **options)
            yield Bench(server, memory, bus, mirror, await server.attached())


async def test_reads_and_writes_fault_what_is_missing_once() -> None:
    async with made() as bench:
        await bench.mirror.write(AT + 10, b"hello")
        assert await bench.mirror.read(AT + 8, 8) == b"\0\0hello\0"
        assert await bench.mirror.read(AT + PAGE_SIZE - 2, 4) == bytes(4)
        assert bench.memory.faults == [
            (AT, AT + PAGE_SIZE, True),
            (AT + PAGE_SIZE, AT + 2 * PAGE_SIZE, False),
        ]
        assert set(bench.mirror.held) == {AT, AT + PAGE_SIZE}
        assert bench.server.registered[0].register.only_held


async def test_writing_what_may_only_be_read_faults_again() -> None:
    async with made() as bench:
        await bench.mirror.read(AT, 1)
        await bench.mirror.write(AT, b"x")
        assert [write for *_, write in bench.memory.faults] == [False, True]


async def test_grant_first_then_notice_the_page_is_dropped_with_its_dirt() -> None:
    async with made() as bench:
        await bench.mirror.write(AT, b"x")
        await bench.mirror.read(AT + PAGE_SIZE, 1)
        acknowledge = await bench.take_away(AT, AT + 2 * PAGE_SIZE)
        assert list(acknowledge.results[0].dirty) == [AT]
        assert bench.mirror.held == {}
        assert bench.mirror.statistics.pages_dropped == 2


async def test_notice_first_then_grant_the_grant_is_void_and_asked_for_again() -> None:
    async with made() as bench:
        bench.memory.before_grant = bench.take_away
        await bench.mirror.fault(AT, AT + PAGE_SIZE)
        assert len(bench.memory.faults) == 2
        assert bench.mirror.held[AT].generation == bench.memory.generation


async def test_a_notice_beside_the_fault_does_not_disturb_it() -> None:
    async with made() as bench:
        bench.memory.before_grant = lambda: bench.take_away(AT + 8 * PAGE_SIZE, AT + 9 * PAGE_SIZE)
        bench.memory.generation = 0  # after the notice: 1, as granted
        await bench.mirror.fault(AT, AT + PAGE_SIZE)
        assert len(bench.memory.faults) == 1


async def test_a_grant_that_knows_of_the_notice_is_good_though_the_notice_came_during_the_fault() -> None:
    async with made() as bench:

        async def later() -> None:
            bench.memory.seq = 0

        await bench.take_away()  # seq 1: before the fault
        bench.memory.before_grant = later
        await bench.mirror.fault(AT, AT + PAGE_SIZE)
        assert len(bench.memory.faults) == 1


async def test_everything_overtakes_every_fault() -> None:
    async with made() as bench:

        async def flush() -> None:
            bench.memory.seq += 1
            bench.attachment.notice(bench.memory.seq, op=types_pb2.NOTIFIER_OP_FLUSH_ALL)
            await bench.attachment.acknowledged()

        bench.memory.before_grant = flush
        await bench.mirror.fault(AT, AT + PAGE_SIZE)
        assert len(bench.memory.faults) == 2


async def test_the_server_s_retry_is_followed() -> None:
    async with made() as bench:
        bench.memory.retries = 3
        await bench.mirror.read(AT, 1)
        assert len(bench.memory.faults) == 4


async def test_retries_are_bounded() -> None:
    async with made() as bench:
        bench.memory.retries = 1_000_000
        with pytest.raises(mmubus.RetriesExhausted):
            await bench.mirror.read(AT, 1)


@pytest.mark.parametrize("write", [False, True])
async def test_a_page_is_given_back_when_no_access_to_it_is_on_its_way(write: bool) -> None:
    async with made() as bench:
        await bench.mirror.fault(AT, AT + PAGE_SIZE, write=True)
        memory, attachment = bench.memory, bench.attachment
        beside: list[session_pb2.Acknowledge] = []

        async def overtake() -> None:
            """While the access is on its way its page is taken, and another one that it does not touch."""
            attachment.notice(memory.seq + 1, op=RANGE, mm=5, start=AT, end=AT + PAGE_SIZE)
            attachment.notice(memory.seq + 2, op=RANGE, mm=5, start=AT + 4 * PAGE_SIZE, end=AT + 5 * PAGE_SIZE)
            beside.append(await attachment.acknowledged())

        memory.before_access = overtake
        if write:
            await bench.mirror.write(AT, b"last")
            assert memory.bytes[:4] == b"last"
        else:
            assert await bench.mirror.read(AT, 4) == bytes(4)
        assert beside[0].through <= memory.seq
        assert list(beside[0].also) == [memory.seq + 2]
        assert (await attachment.acknowledged()).through == memory.seq + 2
        assert bench.mirror.held == {}
        assert bench.mirror.statistics.stale == 0


async def test_an_access_that_nobody_waits_for_any_more_is_still_on_its_way() -> None:
    async with made() as bench:
        await bench.mirror.fault(AT, AT + PAGE_SIZE)
        memory, attachment = bench.memory, bench.attachment
        there, go = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            there.set()
            await go.wait()

        memory.before_access = hold
        reading = asyncio.create_task(bench.mirror.read(AT, 1))
        await there.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        attachment.notice(memory.seq + 1, op=RANGE, mm=5, start=AT, end=AT + PAGE_SIZE)
        attachment.notice(memory.seq + 2, op=RANGE, mm=5, start=AT + 4 * PAGE_SIZE, end=AT + 5 * PAGE_SIZE)
        assert (await attachment.acknowledged()).through <= memory.seq
        go.set()
        assert (await attachment.acknowledged()).through == memory.seq + 2


@pytest.mark.parametrize("write", [False, True])
async def test_an_access_that_is_refused_is_tried_again(write: bool) -> None:
    async with made() as bench:
        await bench.mirror.fault(AT, AT + PAGE_SIZE, write=True)
        bench.memory.generation += 1  # the server has taken everything, and could not say so
        if write:
            await bench.mirror.write(AT, b"late")
            assert bench.memory.bytes[:4] == b"late"
        else:
            assert await bench.mirror.read(AT, 4) == bytes(4)
        assert bench.mirror.statistics.stale == 1
        assert bench.mirror.held[AT].generation == bench.memory.generation


async def test_a_hole_is_efault() -> None:
    async with made() as bench:
        bench.memory.holes.add(AT)
        with pytest.raises(mmubus.MmError, match="no mapping") as caught:
            await bench.mirror.read(AT, 1)
        assert caught.value.errno_name == "EFAULT"


async def test_pages_without_a_translation_are_not_held() -> None:
    async with made() as bench:
        translations = pb.Translations(start=AT, pfns=[7, NO_PFN], generations=[1, 0], rights=bytes([1, 0]))

        async def answer(request: pb.AccessRequest) -> pb.AccessResponse:
            return pb.AccessResponse(fault=pb.FaultResponse(translations=translations))

        bench.server.answer = answer
        await bench.mirror.fault(AT, AT + 2 * PAGE_SIZE)
        assert list(bench.mirror.held) == [AT]


async def test_in_jeopardy_nothing_may_be_used_and_afterwards_it_may() -> None:
    async with made() as bench:
        await bench.mirror.read(AT, 1)
        bench.attachment.drop()
        await until(lambda: not bench.mirror.valid)
        with pytest.raises(mmubus.MirrorVoid):
            await bench.mirror.read(AT, 1)
        await bench.server.attached()
        await until(lambda: bench.mirror.valid)
        assert await bench.mirror.read(AT, 1) == b"\0"


async def test_a_fence_empties_it() -> None:
    async with made() as bench:
        await bench.mirror.read(AT, 1)
        bench.attachment.send(session_pb2.AttachResponse(fenced=session_pb2.Fenced(message="too slow")))
        await until(lambda: not bench.mirror.held)
        with pytest.raises(mmubus.Fenced, match="too slow"):
            await bench.mirror.read(AT, 1)


async def test_a_huge_page_that_is_asked_about_is_as_young_as_its_pages() -> None:
    async with made() as bench:
        await bench.mirror.read(AT + PAGE_SIZE, 1)
        bench.attachment.notice(1, op=types_pb2.NOTIFIER_OP_AGE_PAGE, mm=5, start=AT, end=AT + 512 * PAGE_SIZE)
        acknowledge = await bench.attachment.acknowledged()
        assert [list(result.young) for result in acknowledge.results] == [[AT + PAGE_SIZE]]


async def test_seed_style_answers_age_page() -> None:
    async with made() as bench:
        await bench.mirror.read(AT, 1)
        for seq, young in ((1, [AT]), (2, [])):
            bench.attachment.notice(seq, op=types_pb2.NOTIFIER_OP_AGE_PAGE, mm=5, pages=[AT, AT + PAGE_SIZE])
            acknowledge = await bench.attachment.acknowledged()
            assert [list(result.young) for result in acknowledge.results] == ([young] if young else [])


async def test_mainline_style_registers_start_end_and_aging() -> None:
    async with made(style="mainline") as bench:
        ops = set(bench.server.registered[0].register.ops)
        assert types_pb2.NOTIFIER_OP_INVALIDATE_RANGE_START in ops
        assert RANGE not in ops
        await bench.mirror.write(AT, b"x")
        start = types_pb2.NOTIFIER_OP_INVALIDATE_RANGE_START
        test_young, clear_young = types_pb2.NOTIFIER_OP_TEST_YOUNG, types_pb2.NOTIFIER_OP_CLEAR_YOUNG
        kinds = [test_young, clear_young, test_young, start]
        answers = []
        for seq, op in enumerate(kinds, 1):
            bench.attachment.notice(seq, op=op, mm=5, start=AT, end=AT + 4 * PAGE_SIZE)
            results = (await bench.attachment.acknowledged()).results
            answers.append([(list(result.young), list(result.dirty)) for result in results])
        assert answers == [[([AT], [])], [([AT], [])], [], [([], [AT])]]
        bench.attachment.notice(5, op=types_pb2.NOTIFIER_OP_INVALIDATE_RANGE_END, mm=5, start=AT, end=AT + PAGE_SIZE)
        assert (await bench.attachment.acknowledged()).through == 5


async def test_an_unregistered_mirror_says_so() -> None:
    with pytest.raises(mmubus.MirrorVoid):
        await mmubus.Mirror().read(AT, 1)


async def test_empty_accesses_ask_nothing() -> None:
    async with made() as bench:
        assert await bench.mirror.read(AT, 0) == b""
        await bench.mirror.write(AT, b"")
        assert bench.server.accesses == []


async def test_accesses_side_by_side_are_all_answered() -> None:
    async with made() as bench:
        bench.memory.bytes[:] = bytes(range(256)) * (len(bench.memory.bytes) // 256)
        reads = [bench.mirror.read(AT + at, 300) for at in range(0, 8 * PAGE_SIZE, 512)]
        for at, data in zip(range(0, 8 * PAGE_SIZE, 512), await asyncio.gather(*reads), strict=True):
            assert data == bench.memory.bytes[at : at + 300]


async def test_an_export_overtaken_by_its_frame_s_notice_is_asked_for_again() -> None:
    class Exporter(mmubus.RmapNotifier):
        def __init__(self) -> None:
            self.taken: list[int] = []

        def invalidate_page(self, page: int, must_evict: bool) -> bool:
            self.taken.append(page)
            return True

    exporter = Exporter()
    exports = 0
    async with fake_server() as server, mmubus.connect(server.address) as bus:
        registration = await bus.register_rmap(exporter)
        attachment = await server.attached()

        async def answer(request: pb.AccessRequest) -> pb.AccessResponse:
            nonlocal exports
            exports += 1
            if exports == 1:
                attachment.notice(1, op=types_pb2.NOTIFIER_OP_RMAP_INVALIDATE_PAGE, pages=[7], must_evict=True)
                assert list((await attachment.acknowledged()).results[0].dirty) == [7]
            granted = pb.Translations(start=AT, pfns=[7 if exports == 1 else 8], generations=[1], rights=b"\x01")
            return pb.AccessResponse(export=pb.ExportResponse(translations=granted, as_of_seq=exports - 1))

        server.answer = answer
        translations = await registration.export(5, AT, AT + PAGE_SIZE)
        assert translations.pfns.tolist() == [8]
        assert exporter.taken == [7]
        # Everything void: each page that is still exported is taken away by its own call.
        attachment.notice(2, op=types_pb2.NOTIFIER_OP_FLUSH_ALL)
        (acknowledge,) = await attachment.acknowledged_through(2)
        assert list(acknowledge.results[0].dirty) == [8]
        assert exporter.taken == [7, 8]


async def test_a_server_without_the_pipelined_stream_is_asked_by_unary_calls() -> None:
    async with made() as bench:
        bench.server.only_unary = True
        await bench.mirror.fault(AT, AT + PAGE_SIZE)
        assert list(bench.mirror.held) == [AT]
        assert bench.server.tokens == ["token-1-1"]
        bench.memory.holes.add(AT)
        with pytest.raises(mmubus.MmError, match="no mapping"):
            await bench.mirror.fault(AT, AT + PAGE_SIZE)
