"""The lag probe sees everybody whom a blocked loop keeps waiting."""

from __future__ import annotations

import time

from mmubus.bench.lag import LagProbe


async def test_one_long_block_is_many_long_waits() -> None:
    async with LagProbe() as probe:
        time.sleep(0.1)  # noqa: ASYNC251 - that is the point
    assert probe.quantile_ms(1.0) > 90
    # Whoever came in any of these milliseconds waited for what was left of them; a busy machine only adds others.
    assert sum(late_s > 0.020 for late_s in probe._late_s) >= 70
