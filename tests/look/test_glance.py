"""Looking again and again at a real server."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import mmubus
import pytest
from mmubus.look import Glance, Watch
from mmubusd.rpc import EmbeddedServer


async def test_a_glance_that_is_fresh_is_given_again_and_many_share_one() -> None:
    async with EmbeddedServer(frames_nr=64) as server, mmubus.connect(server.address) as bus:
        watch = Watch(bus, fresh_s=30.0)
        first, *others = await asyncio.gather(*(watch.look() for _ in range(5)))
        assert first is not None
        assert all(other is first for other in others)
        assert watch.rate("rounds") is None


async def test_two_glances_give_rates() -> None:
    async with EmbeddedServer(frames_nr=64) as server, mmubus.connect(server.address) as bus:
        watch = Watch(bus, fresh_s=0.0)
        before = await watch.look()
        mm = await bus.create_mm("program")
        await mm.touch(await mm.mmap(0, 4096), 4096, write=True)
        after = await watch.look()
        assert before is not None
        assert after is not None
        rate = watch.rate("operations")
        assert rate is not None
        assert rate * (after.at - before.at) == pytest.approx(
            after.statistics.operations - before.statistics.operations
        )  # type: ignore[union-attr]
        assert rate > 0


async def test_a_server_that_is_away_and_back() -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(EmbeddedServer(frames_nr=64))
        address = server.address
        async with mmubus.connect(address) as bus:
            watch = Watch(bus, fresh_s=0.0)
            glance = await watch.look()
            await stack.aclose()
            assert await watch.look() is glance
            assert isinstance(watch.failed, mmubus.ConnectionLost)


@pytest.mark.parametrize("turns", range(5))
async def test_who_is_cancelled_as_the_answer_comes_is_cancelled(monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    """A timer whose look was cancelled and looked on was waited for without end when `mmubus top` was left."""
    answer: asyncio.Future[Glance] = asyncio.get_running_loop().create_future()

    async def answered(bus: object) -> Glance:
        return await answer

    monkeypatch.setattr("mmubus.look.glance._glance", answered)
    looking = asyncio.create_task(Watch(None, fresh_s=0.0).look())  # type: ignore[arg-type]
    for _ in range(5):
        await asyncio.sleep(0)
    answer.set_result(Glance(0.0, None, (), (), (), ()))
    for _ in range(turns):
        await asyncio.sleep(0)
    if looking.cancel():
        with pytest.raises(asyncio.CancelledError):
            await looking


async def test_who_is_late_comes_by_name() -> None:
    from mmu.v1 import inspection_pb2 as pb

    rounds = [
        pb.Round(round=1, open=True, waiting_for=["a", "b"]),
        pb.Round(round=2, open=True, waiting_for=["b", "c"]),
    ]
    assert Glance(0.0, None, (), rounds, (), ()).late == ["a", "b", "c"]
