"""Everything that a registration holds is void: its notifier is told, outside of any notice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable

from mmubus.registration import Registration

__all__ = ["all_told", "tell_void"]

log = logging.getLogger("mmubus")


def tell_void(registration: Registration, why: str) -> Awaitable[None] | None:
    """Tell a notifier that all is void. An answer that must be awaited runs as a task, which is returned."""
    registration.overtake_everything()
    try:
        answer = registration.notifier.invalidated_everything(why)
    except Exception:
        log.exception("%r: invalidated_everything failed; what it still holds is refused by the server", registration)
        return None
    if not isinstance(answer, Awaitable):
        return None
    return asyncio.ensure_future(_log_failure(answer, registration))


async def _log_failure(answer: Awaitable[object], registration: Registration) -> None:
    try:
        await answer
    except Exception:
        log.exception("%r: invalidated_everything failed; what it still holds is refused by the server", registration)


async def all_told(waiting: Iterable[Awaitable[None] | None]) -> None:
    """Wait for those that there are; they raise nothing."""
    for one in waiting:
        if one is not None:
            await one
