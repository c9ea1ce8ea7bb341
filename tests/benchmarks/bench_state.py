"""What it costs to keep the state: the same work with --state and without, in blocks that alternate.

    python tests/benchmarks/bench_state.py [--blocks N] [--seconds S] [--directory DIR]

Two servers in this process, one of them with a directory of state; for each a client's calls that change pages, 1 and
256 in flight, and rounds with one driver. Prints one JSON object: medians of the blocks' rates, their ratio, and how
many inputs a sync was for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mmubus
import uvloop
from mmubus import PAGE_SIZE
from mmubus.linux import Op
from mmubusd.rpc import EmbeddedServer

ARENA = 512
MADV_DONTNEED = 4


@dataclass
class Side:
    """One of the two servers, a program on it and a driver that mirrors it."""

    server: EmbeddedServer
    bus: mmubus.Bus
    mm: mmubus.AddressSpace
    at: int
    mirror: mmubus.Mirror
    rates: dict[str, list[float]] = field(default_factory=dict)


@asynccontextmanager
async def side(state: Path | None) -> AsyncIterator[Side]:
    options = {} if state is None else {"state": state}
    async with EmbeddedServer(frames_nr=1 << 16, **options) as server, mmubus.connect(server.address) as bus:
        mm = await bus.create_mm("bench")
        at = await mm.mmap(0, 2 * ARENA * PAGE_SIZE)
        yield Side(server, bus, mm, at, await bus.mirror(mm))


async def calls(one: Side, seconds: float, in_flight: int) -> int:
    """Stores to pages of which no driver holds anything. Returns: how many were answered."""
    done = 0
    end = time.monotonic() + seconds
    async with one.mm.operations(in_flight_max=in_flight) as operations:
        while time.monotonic() < end:
            asked = [
                await operations.submit(
                    Op.STORE, one.at + (ARENA + n % ARENA) * PAGE_SIZE, data=b"x" * 64, mm=one.mm.id, thread=n
                )
                for n in range(in_flight)
            ]
            await asyncio.gather(*asked)
            done += len(asked)
    return done


async def rounds(one: Side, seconds: float) -> int:
    """A page is mirrored and taken away again. Returns: how often."""
    done = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await one.mirror.fault(one.at, one.at + PAGE_SIZE, write=True)
        await one.mm.madvise(one.at, PAGE_SIZE, MADV_DONTNEED)
        done += 1
    return done


def sync_ms(directory: Path, count: int = 50) -> float:
    """Milliseconds that the disk takes to keep a small write, in the median: no answer can come sooner."""
    took = []
    with (directory / "sync").open("wb", buffering=0) as file:
        for _ in range(count):
            began = time.monotonic()
            file.write(b"x" * 200)
            os.fdatasync(file.fileno())
            took.append(time.monotonic() - began)
    return round(statistics.median(took) * 1e3, 2)


async def measure(blocks: int, seconds: float, directory: str | None) -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=directory) as where:
        async with side(None) as without, side(Path(where) / "state") as kept:
            work = {
                "calls, 1 in flight": lambda one: calls(one, seconds, 1),
                "calls, 256 in flight": lambda one: calls(one, seconds, 256),
                "rounds, 1 in flight": lambda one: rounds(one, seconds),
            }
            for _ in range(blocks):
                for name, do in work.items():
                    for one in (without, kept):
                        began = time.monotonic()
                        done = await do(one)
                        one.rates.setdefault(name, []).append(done / (time.monotonic() - began))
            commits = kept.server.server.machine.commits
            assert commits is not None
            found: dict[str, object] = {
                name: {
                    "without, 1/s": round(statistics.median(without.rates[name])),
                    "kept, 1/s": round(statistics.median(kept.rates[name])),
                    "ratio": round(
                        statistics.median(
                            k / w for k, w in zip(kept.rates[name], without.rates[name], strict=True)
                        ), 3,
                    ),
                }
                for name in work
            }  # fmt: skip
            found["one sync, ms"] = sync_ms(Path(where))
            return found | {
                "syncs": commits.commits_nr,
                "inputs a sync": round(commits.inputs_nr / commits.commits_nr, 1),
            }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--directory", help="where the state is kept; default: where temporary files are")
    given = parser.parse_args()
    print(json.dumps(uvloop.run(measure(given.blocks, given.seconds, given.directory)), indent=2))
