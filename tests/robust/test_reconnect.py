"""100 clients come back within 2 s after the server was restarted, by themselves, and nothing is inherited.

`python tests/robust/test_reconnect.py` prints the figure.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import tempfile
import time
from pathlib import Path

import mmubus
import pytest
from mmubusd.rpc import EmbeddedServer

PAGE = 4096
BASE = 0x7000_0000_0000


async def come_back(clients_nr: int) -> tuple[float, int]:
    """Restart a server under so many clients.

    Returns: seconds until all of them are registered with the new one, and how many pages their mirrors still held.
    """
    with tempfile.TemporaryDirectory() as directory:
        address = f"unix:{directory}/s"
        options = {"listen": (address,), "frames_nr": 1 << 14, "drain_s": 0.0}
        async with contextlib.AsyncExitStack() as stack:
            first = EmbeddedServer(**options)
            await first.__aenter__()
            buses = [
                await stack.enter_async_context(mmubus.connect(address, name=f"client {n}", reattach=True))
                for n in range(clients_nr)
            ]
            mm = await buses[0].create_mm("program")
            await mm.mmap(BASE, 64 * PAGE, flags=mmubus.MAP_PRIVATE | mmubus.MAP_ANONYMOUS | mmubus.MAP_FIXED)
            mirrors = [await bus.mirror(mm) for bus in buses]
            for mirror in mirrors:
                await mirror.fault(BASE, BASE + PAGE)
            epochs = {bus.session.epoch for bus in buses}
            await first.__aexit__(None, None, None)
            second = EmbeddedServer(**options)
            await stack.enter_async_context(second)
            began = time.perf_counter()
            memory = second.server.memory
            again = memory.create_mm("program")  # the same number: registering again finds it
            assert again.id == mm.id

            def all_back() -> bool:
                return all(
                    bus.session.state == "live" and bus.session.epoch not in epochs and bus.session.registrations
                    for bus in buses
                )

            while not all_back():  # noqa: ASYNC110 - each comes when it comes
                await asyncio.sleep(0.01)
            taken = time.perf_counter() - began
            held = sum(len(mirror.held) for mirror in mirrors)
            assert second.server.bus.counters.freed_before_ack == 0
        return taken, held


@pytest.mark.slow
async def test_they_all_come_back() -> None:
    _, held = await come_back(30)  # how long it takes is for the command to measure
    assert held == 0


def test_they_do_not_all_come_at_once() -> None:
    """The pauses are drawn: no two clients keep step."""
    from mmubus.session import _backoff_s

    random.seed(1)
    pauses = [_backoff_s(2) for _ in range(100)]
    assert len({round(pause, 3) for pause in pauses}) > 30


if __name__ == "__main__":
    import logging
    import warnings

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    seconds, still_held = asyncio.run(come_back(100))
    print(f"100 clients came back within {seconds:.2f} s; they held {still_held} pages of the old epoch")
    sys.exit(seconds > 2.0 or still_held > 0)
