"""Every contender answers, in processes of its own; peers only where they are installed."""

from __future__ import annotations

import asyncio

import pytest
from mmubus.bench import floor_grpc, floor_tcp, ours, peer_nats, peer_redis, peer_zeromq
from mmubus.bench.effort import in_turn
from mmubus.bench.rounds import Rounds
from mmubus.bench.system import Arena, System, counts

SYSTEMS = [
    ours.SYSTEM,
    ours.SYSTEM_TCP,
    floor_grpc.SYSTEM,
    floor_tcp.SYSTEM,
    peer_nats.SYSTEM,
    peer_redis.SYSTEM,
    peer_zeromq.SYSTEM,
]


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
async def test_gathers_and_pipelines(system: System) -> None:
    if why := system.missing():
        pytest.skip(why)
    async with Arena(system) as arena:
        for responders in (1, 6):
            await arena.scale(responders)
            took = await arena.gather(5)
            assert len(took) == 5
            assert min(took) > 0
        await arena.scale(4, 4)
        assert await arena.pipelined(50, 8) > 0


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "apt-get install nats-server" in peer_nats.SYSTEM.missing()
    assert "apt-get install redis-server" in peer_redis.SYSTEM.missing()
    assert floor_grpc.SYSTEM.missing() == ""


def test_spread_is_even() -> None:
    assert counts(6, 4) == [2, 2, 1, 1]
    assert counts(64, 4) == [16] * 4


async def test_a_round_ends_with_its_last_answer() -> None:
    sent: list[int] = []

    async def send(number: int) -> None:
        sent.append(number)

    rounds = Rounds(send)
    await rounds.expect(responders=2, streams=1)
    one = asyncio.ensure_future(rounds.one())
    other = asyncio.ensure_future(rounds.one())
    await asyncio.sleep(0)
    assert sent == [1, 2]
    rounds.answered(2)
    rounds.answered(1)
    rounds.answered(2)
    await other
    assert not one.done()
    rounds.answered(1)
    await one


async def test_contenders_take_turns() -> None:
    order: list[str] = []

    def sample(name: str) -> object:
        async def once() -> float:
            order.append(name)
            return float(len(order))

        return once

    medians = await in_turn({"a": sample("a"), "b": sample("b")}, 3)  # type: ignore[dict-item]
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert medians == {"a": 4.0, "b": 3.0}
