"""How tests wait: for a condition, and never for a time. The limit is for machines that have other work to do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from inspect import isawaitable

LIMIT_S = 60.0
"""What takes no time may take so long; nothing but a mistake takes longer."""
BUDGET_S = 25.0
"""An ack budget that must not be what ends anything: a notifier which answers is never fenced for a busy machine."""
LOOK_S = 0.002


async def until(condition: Callable[[], Awaitable[object] | object], limit_s: float = LIMIT_S) -> None:
    """Let the loop run until a condition holds, asked again and again. Raises: TimeoutError."""
    async with asyncio.timeout(limit_s):
        while not (await held if isawaitable(held := condition()) else held):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)  # what is waited for has no event to wait for
