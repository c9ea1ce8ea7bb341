"""Over the wire, with the client library: deadlocks, findings, explanations, recordings."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import mmubus
import pytest
from mmu.v1 import device_pb2
from mmubus.cli import main
from mmubusd.rpc import EmbeddedServer
from patience import BUDGET_S, LIMIT_S, until

PAGE, BASE = 4096, 0x7000_0000_0000
FIXED = mmubus.MAP_PRIVATE | mmubus.MAP_ANONYMOUS | mmubus.MAP_FIXED


class CallsBack(mmubus.Notifier):
    """Its handler unmaps something, and remembers how that went."""

    def __init__(self, mm: mmubus.AddressSpace, at: int) -> None:
        self.mm, self.at = mm, at
        self.errors: list[mmubus.MmError] = []

    async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
        """Called for what it unmaps itself, too; that one is not called back for."""
        if start == self.at:
            return
        try:
            await self.mm.munmap(self.at, PAGE)
        except mmubus.MmError as error:
            self.errors.append(error)

    def invalidate_page(self, mm: int, address: int) -> None:
        """Nothing is held."""

    def age_page(self, mm: int, address: int) -> bool:
        """Never used."""
        return False

    def release(self, mm: int) -> None:
        """Nothing is held."""


async def program(bus: mmubus.Bus, pages: int = 16) -> mmubus.AddressSpace:
    mm = await bus.create_mm("program")
    await mm.mmap(BASE, pages * PAGE, flags=FIXED)
    await mm.store(BASE, b"\1" * pages * PAGE)
    return mm


async def finding(bus: mmubus.Bus) -> None:
    """Wait until the server has told this client something."""
    await until(lambda: bus.session.findings)


async def test_a_handler_that_unmaps_its_own_range_gets_edeadlk() -> None:
    async with (
        EmbeddedServer(frames_nr=1 << 12, ack_budget_s=BUDGET_S) as server,
        mmubus.connect(server.address, name="cpu") as cpu,
        mmubus.connect(server.address, name="nic") as bus,
    ):
        mm = await program(cpu)
        notifier = CallsBack(bus.mm(mm.id), BASE + PAGE)
        await bus.register(notifier, mm)
        await mm.munmap(BASE, 4 * PAGE)
        assert [error.errno_name for error in notifier.errors] == ["EDEADLK"]
        assert "its handler waits for munmap" in str(notifier.errors[0])
        assert bus.session.fenced is None
        await finding(bus)
        assert bus.session.findings[0].kind == "deadlock"
        assert len(bus.session.findings[0].lines) >= 2


async def test_two_clients_in_a_cycle_are_both_told() -> None:
    """a's handler unmaps what b holds, b's handler unmaps what a holds."""
    async with (
        EmbeddedServer(frames_nr=1 << 12, ack_budget_s=BUDGET_S) as server,
        mmubus.connect(server.address, name="cpu") as cpu,
        mmubus.connect(server.address, name="a") as a,
        mmubus.connect(server.address, name="b") as b,
    ):
        mm = await program(cpu)
        one, two = CallsBack(a.mm(mm.id), BASE + 8 * PAGE), CallsBack(b.mm(mm.id), BASE + PAGE)
        await a.register(one, mm, start=BASE, end=BASE + 4 * PAGE)
        await b.register(two, mm, start=BASE + 8 * PAGE, end=BASE + 12 * PAGE)
        one.at, two.at = BASE + 9 * PAGE, BASE + 1 * PAGE
        await mm.munmap(BASE, 4 * PAGE)
        assert [error.errno_name for error in (*one.errors, *two.errors)] == ["EDEADLK"]
        for bus in (a, b):
            await finding(bus)
            assert bus.session.fenced is None


async def test_what_people_ask(capsys: pytest.CaptureFixture[str]) -> None:
    async with (
        EmbeddedServer(frames_nr=1 << 12, ack_budget_s=BUDGET_S) as server,
        mmubus.connect(server.address, name="nic") as bus,
    ):
        mm = await program(bus)
        mirror = await bus.mirror(mm, name="rings")
        await mirror.fault(BASE, BASE + 4 * PAGE, write=True)
        registration = mirror.registration
        assert registration is not None
        held = mirror.held[BASE]

        (holder,) = await bus.inspection.holders(mm.id, BASE, BASE + 2 * PAGE)
        assert (holder.session_name, holder.pages, holder.registration.held_pages) == ("nic", 2, 4)

        dry = await bus.inspection.dry_run(mm.id, BASE, BASE + 4 * PAGE)
        assert ([cost.name for cost in dry.costs], dry.pages) == (["nic"], 4)
        assert not (await bus.inspection.dry_run(mm.id, BASE + 8 * PAGE, BASE + 9 * PAGE)).costs

        await mm.munmap(BASE, PAGE)
        (ended,) = (await bus.inspection.rounds(ended=1))[:1]
        explained = await bus.inspection.explain(ended.round)
        assert [(one.name, one.state) for one in explained.answers] == [("nic", "answered")]
        assert explained.answers[0].blame == 1.0
        assert "munmap" in explained.story[0]
        with pytest.raises(mmubus.CallFailed, match="is not open"):
            await bus.inspection.explain(10_000)

        request = device_pb2.DmaReadRequest(
            registration=registration.id, addr=BASE, length=8, pfns=[held[0]], generations=[held[1]]
        )
        with pytest.raises(mmubus.StaleTranslation, match="munmap"):
            await bus.access.ask(device_pb2.AccessRequest(dma_read=request))
        found = await bus.inspection.violations()
        assert [one.kind for one in found.violations] == ["stale-access"]
        assert found.violations[0].story[0].startswith("given out at ")
        await finding(bus)

        def ask(*arguments: str) -> str:
            assert main([*arguments, "--server", server.address]) == 0
            return capsys.readouterr().out

        assert "rings" in await asyncio.to_thread(ask, "holders", str(mm.id))
        assert "nic: answered" in await asyncio.to_thread(ask, "explain", str(ended.round))
        assert "stale-access, refused" in await asyncio.to_thread(ask, "violations", "--check", "64")
        assert "pages present: 3;" in await asyncio.to_thread(ask, "dry-run", str(mm.id), f"{BASE:x}+0x4000")
        assert json.loads(await asyncio.to_thread(ask, "violations", "--json"))["counts"]


async def test_a_slow_registration_is_demoted_and_comes_back() -> None:
    may_go = asyncio.Event()

    class Slow(mmubus.Mirror):
        async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> object:  # type: ignore[override]
            await may_go.wait()
            return super().invalidate_range(mm, start, end, lock)

    async with (
        EmbeddedServer(frames_nr=1 << 12, ack_budget_s=BUDGET_S) as server,
        mmubus.connect(server.address, name="nic") as bus,
    ):
        mm = await program(bus)
        mirror = Slow()
        await bus.register(mirror, mm, ack_budget_s=0.2, demotable=True)
        await mirror.fault(BASE, BASE + PAGE)
        await asyncio.wait_for(mm.munmap(BASE, PAGE), LIMIT_S)
        assert bus.session.fenced is None
        assert server.server.bus.counters.demoted == 1
        with pytest.raises(mmubus.CallFailed, match="demoted"):
            await mirror.fault(BASE + PAGE, BASE + 2 * PAGE)
        may_go.set()


async def test_a_recorded_run_is_judged_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "run.jsonl"
    async with (
        EmbeddedServer(frames_nr=1 << 12, ack_budget_s=BUDGET_S, record=record) as server,
        mmubus.connect(server.address, name="nic") as bus,
    ):
        mm = await program(bus)
        mirror = await bus.mirror(mm)
        for page in range(8):
            await mirror.write(BASE + page * PAGE, b"device")
        await mm.munmap(BASE, 8 * PAGE)
        await mm.exit()
    assert main(["judge", str(record)]) == 0
    assert "0 violations" in capsys.readouterr().out
    lines = record.read_text().splitlines()
    assert main(["export-trace", str(record)]) == 0
    drawn = json.loads(record.with_suffix(".trace.json").read_text())["traceEvents"]
    assert any(event["ph"] == "X" and event["name"].startswith("round") for event in drawn)
    unacked = [line for line in lines if '"acked"' not in line]
    record.write_text("\n".join(unacked))
    assert main(["judge", str(record)]) == 1, "frames were freed, and nobody had let go of them"
    record.write_text("{}\n")
    assert main(["judge", str(record)]) == 2
