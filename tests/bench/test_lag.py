"""The lag probe sees everybody whom a blocked loop keeps waiting."""

from __future__ import annotations

import asyncio
import time

from mmubus.bench.lag import LagProbe


async def test_one_long_block_is_many_long_waits() -> None:
    async with LagProbe() as probe:
        time.sleep(0.1)  # noqa: ASYNC251 - that is the point
        await asyncio.sleep(0.02)
    assert 90 < probe.quantile_ms(1.0) < 1000
    # Whoever came at a random moment of these 120 ms waited 40 ms on average, not 0.
    assert probe.quantile_ms(0.5) > 20
