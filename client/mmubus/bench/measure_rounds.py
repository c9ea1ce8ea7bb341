"""Rounds: how long one takes, how long many answers take to gather, how many a second can be had."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

from mmubus.bench import floor_grpc, floor_tcp, ours, peer_nats, peer_redis, peer_zeromq
from mmubus.bench.effort import Effort, Sample, in_turn
from mmubus.bench.row import Bound, Row, not_measured, ratio_at_least, ratio_at_most, ratio_below
from mmubus.bench.system import Arena, System
from mmubus.bench.worker import Worker

__all__ = ["rounds"]

FLOORS = (floor_grpc.SYSTEM, floor_tcp.SYSTEM)
PEERS = (peer_nats.SYSTEM, peer_redis.SYSTEM, peer_zeromq.SYSTEM)
GATHERS = (1, 4, 16, 64)
WARM_UP = 30
STREAMS, IN_FLIGHT = 16, 512
PEER_IN_FLIGHT = (IN_FLIGHT, 32)
PEER_FLIGHTS = 1_500
"""Rounds of one run of a peer: they take seconds for what we and the floor do in a tenth."""

BOUNDS: dict[tuple[int, str], Bound] = {
    (1, floor_grpc.SYSTEM.name): ratio_at_most(1.25),
    (1, peer_nats.SYSTEM.name): ratio_below(1),
    (1, peer_redis.SYSTEM.name): ratio_below(1),
    (1, peer_zeromq.SYSTEM.name): ratio_below(1),
    (64, peer_nats.SYSTEM.name): ratio_at_most(0.5),
}
RATE_BOUNDS = {peer_nats.SYSTEM.name: ratio_at_least(5), floor_grpc.SYSTEM.name: ratio_at_least(0.5)}


async def rounds(effort: Effort, peers: bool, say: Callable[[str], None]) -> AsyncIterator[Row]:
    """Everything about rounds. Yields rows as they are ready."""
    others = FLOORS + (PEERS if peers else ())
    absent = {system.name: why for system in others if (why := system.missing())}
    running = [system for system in others if system.name not in absent]
    async with AsyncExitStack() as stack:
        say("rounds: starting the contenders")
        arenas = {system.name: await stack.enter_async_context(Arena(system)) for system in (ours.SYSTEM, *running)}
        for responders in GATHERS:
            async for row in _gather(arenas, absent, responders, effort, say):
                yield row
        say(f"rounds: {STREAMS} sessions, {IN_FLIGHT} in flight")
        for row in await _rates(arenas, absent, effort):
            yield row
        async for row in _program(arenas[ours.SYSTEM.name], arenas[floor_grpc.SYSTEM.name], effort, say):
            yield row
    say("rounds: one client over TCP")
    yield await _over_tcp(effort)


async def _gather(
    arenas: dict[str, Arena], absent: dict[str, str], responders: int, effort: Effort, say: Callable[[str], None]
) -> AsyncIterator[Row]:
    say(f"rounds: gather of {responders}")
    measure = "one client, one round, p50" if responders == 1 else f"gather of {responders} in 4 processes, p50"
    tail: list[float] = []

    def sample(name: str, arena: Arena) -> Sample:
        async def once() -> float:
            took = await arena.gather(effort.rounds)
            if name == ours.SYSTEM.name:
                tail.extend(took)
            return statistics.median(took)

        return once

    for arena in arenas.values():
        await arena.scale(responders)
        await arena.gather(WARM_UP)
    p50 = await in_turn({name: sample(name, arena) for name, arena in arenas.items()}, effort.runs)
    own = p50.pop(ours.SYSTEM.name)
    for name, other in p50.items():
        yield Row(measure, "us", own, other, name, BOUNDS.get((responders, name)))
    for name, why in absent.items():
        yield not_measured(measure, "us", name, why, BOUNDS.get((responders, name)))
    if responders == 1:
        yield Row("one client, one round, p99", "us", statistics.quantiles(tail, n=100)[98])


async def _rates(arenas: dict[str, Arena], absent: dict[str, str], effort: Effort) -> list[Row]:
    measure = f"{STREAMS} sessions, {IN_FLIGHT} rounds in flight"
    floors_and_us = (ours.SYSTEM.name, *(system.name for system in FLOORS))

    def sample(name: str, arena: Arena, in_flight: int) -> Sample:
        async def once() -> float:
            return await arena.pipelined(effort.flights if name in floors_and_us else PEER_FLIGHTS, in_flight)

        return once

    samples = {}
    for name, arena in arenas.items():
        await arena.scale(STREAMS, STREAMS)
        await arena.pipelined(IN_FLIGHT, IN_FLIGHT // 8)
        # What suits a peer best is its own affair: fewer in flight, if it is faster so.
        for in_flight in (IN_FLIGHT,) if name in floors_and_us else PEER_IN_FLIGHT:
            samples[f"{name}/{in_flight}"] = sample(name, arena, in_flight)
    rates = await in_turn(samples, effort.runs)
    best: dict[str, float] = {}
    for key, rate in rates.items():
        name = key.rpartition("/")[0]
        best[name] = max(rate, best.get(name, 0.0))
    own = best.pop(ours.SYSTEM.name)
    rows = [Row(measure, "rounds/s", own, other, name, RATE_BOUNDS.get(name)) for name, other in best.items()]
    return rows + [not_measured(measure, "rounds/s", name, why, RATE_BOUNDS.get(name)) for name, why in absent.items()]


async def _program(arena: Arena, floor: Arena, effort: Effort, say: Callable[[str], None]) -> AsyncIterator[Row]:
    """What a third process sees: a program's munmap goes to the server, from there to the driver, and both ways back; a
    driver's DMA is one call and its answer."""
    say("rounds: as a program sees them")
    await arena.scale(1)
    await floor.scale(1)
    worker = await Worker.start("mmubus.bench.clients:program", address=arena.owner.ready)

    def sample(ask: Callable[[], Awaitable[Sequence[float]]]) -> Sample:
        async def once() -> float:
            return statistics.median(await ask())

        return once

    try:
        p50 = await in_turn(
            {
                "munmap": sample(lambda: worker.ask("rounds", rounds=effort.rounds)),
                "read": sample(lambda: worker.ask("reads", rounds=effort.rounds)),
                "floor": sample(lambda: floor.gather(effort.rounds)),
            },
            effort.runs,
        )
    finally:
        await worker.stop()
    yield Row("a program's munmap, one driver, p50 (four hops)", "us", p50["munmap"])
    yield Row("dma_read of one page, p50", "us", p50["read"], p50["floor"], f"{floor.system.name}, there and back")


async def _over_tcp(effort: Effort) -> Row:
    systems: tuple[System, ...] = (ours.SYSTEM_TCP, floor_grpc.SYSTEM_TCP)
    async with AsyncExitStack() as stack:
        arenas = {system.name: await stack.enter_async_context(Arena(system)) for system in systems}

        def sample(arena: Arena) -> Sample:
            async def once() -> float:
                return statistics.median(await arena.gather(effort.rounds))

            return once

        for arena in arenas.values():
            await arena.scale(1)
            await arena.gather(WARM_UP)
        p50 = await in_turn({name: sample(arena) for name, arena in arenas.items()}, effort.runs)
    own, floor = (p50[system.name] for system in systems)
    return Row("one client over TCP, one round, p50", "us", own, floor, systems[1].name)
