"""The server's khugepaged: a pass every so often, as if somebody called for it."""

from __future__ import annotations

import asyncio

from mmubusd.mm.errno import MmError
from mmubusd.notify import Draining
from mmubusd.rpc.driver import Driver
from mmubusd.rpc.errors import Alarm

__all__ = ["Khugepaged"]


class Khugepaged:
    """Runs passes as the driver's settings say, until it is closed or the server drains."""

    def __init__(self, driver: Driver, alarm: Alarm) -> None:
        self._driver, self._alarm = driver, alarm
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        bus, settings = self._driver.bus, self._driver.settings
        pages = settings.khugepaged_pages_to_scan
        try:
            while True:
                await asyncio.sleep(settings.khugepaged_scan_sleep_s)
                try:
                    await self._driver.run(bus.call, 0, "khugepaged_scan", (pages,), label="khugepaged")
                except MmError:
                    continue  # somebody else's pass is under way
        except Draining:
            return
        except Exception as error:  # nobody is above it
            self._alarm.ring(error)

    async def close(self) -> None:
        """No more passes; one that is under way goes on."""
        self._task.cancel()
        await asyncio.wait((self._task,))
