"""Do clients that are stopped slow down rounds that do not concern them? p99 with 10 of 100 stopped, against without.

    python tests/robust/measure_isolation.py [PAIRS]

Both are measured in one run, in short blocks in the order well, stopped, stopped, well, so that whatever else the
machine does falls on both alike. A block that is disturbed is disturbed in its tail, so the p99 is that of all samples
of a kind together, and the interval says how much it would move had other blocks been disturbed (a bootstrap over
pairs of blocks). The processes ask for more of the processor than others get, where that is allowed.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure_processes import misbehave
from processes import Cpu, clients, server

PAIRS, BLOCK_S = 60, 0.5
GROUPS, GROUP = 9, 10
FROZEN = 10
RATIO_MAX = 1.10
RESAMPLED_NR = 2000
NICER = -10
Samples = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Isolation:
    """Seconds that unrelated rounds took. Both lists have one array a block, in pairs."""

    well: list[Samples]
    stopped: list[Samples]

    def ratio(self, pairs: Sequence[int] | NDArray[np.int64] = ()) -> float:
        """The p99 of all, with some stopped against without. Args: pairs: of these alone; empty: of all."""
        chosen = pairs if len(pairs) else range(len(self.well))
        well, stopped = (np.concatenate([blocks[at] for at in chosen]) for blocks in (self.well, self.stopped))
        return float(np.quantile(stopped, 0.99) / np.quantile(well, 0.99))

    def interval(self) -> tuple[float, float]:
        """Within which the ratio lies, 95 of 100 times."""
        random = np.random.default_rng(1)
        count = len(self.well)
        ratios = [self.ratio(random.integers(0, count, count)) for _ in range(RESAMPLED_NR)]
        low, high = np.quantile(ratios, (0.025, 0.975))
        return float(low), float(high)

    def median_ratio(self) -> float:
        """The median, over pairs of blocks, of the ratio of their medians."""
        pairs = zip(self.stopped, self.well, strict=True)
        return float(np.median([np.median(stopped) / np.median(well) for stopped, well in pairs]))


async def block(cpu: Cpu, unrelated: Sequence[int], seconds: float) -> Samples:
    """Rounds one after another for so long."""
    until = time.perf_counter() + seconds
    taken: list[float] = []
    while time.perf_counter() < until:
        for mm in unrelated:
            taken.append(await cpu.unmap(mm))
    return np.array(taken)


async def frozen_block(
    cpu: Cpu, victims: subprocess.Popen[str], frozen: Sequence[int], unrelated: Sequence[int], seconds: float
) -> Samples:
    """The same while the victims are stopped and a round waits for each of them."""
    misbehave("stopped", victims)
    waiting = [asyncio.create_task(cpu.unmap(mm)) for mm in frozen]
    await cpu.unmap(unrelated[0])  # the requests above are with the server
    samples = await block(cpu, unrelated, seconds)
    assert not any(task.done() for task in waiting), "they waited all the time"
    misbehave("continued", victims)
    await asyncio.gather(*waiting)
    return samples


async def measure(pairs: int = PAIRS, block_s: float = BLOCK_S) -> Isolation:
    """90 clients in 9 groups have rounds; 10 others are well, or stopped."""
    found = Isolation([], [])
    with (
        tempfile.TemporaryDirectory() as directory,
        server(f"unix:{directory}/s", "--ack-budget-max-s", "3600", "--lease-s", "300") as process,
    ):
        address = f"unix:{directory}/s"
        cpu = Cpu(address)
        frozen = [await cpu.space(4 * pairs) for _ in range(FROZEN)]
        unrelated = [await cpu.space(1 << 15) for _ in range(GROUPS)]
        everyone = [mm for mm in unrelated for _ in range(GROUP)]
        with (
            clients(address, "good", frozen, budget_s=600.0) as victims,
            clients(address, "good", everyone, budget_s=600.0) as others,
        ):
            with suppress(PermissionError):
                for one in (0, process.pid, others.pid):
                    os.setpriority(os.PRIO_PROCESS, one, NICER)
            await block(cpu, unrelated, block_s)  # warm
            for pair in range(pairs):
                for stopped in (pair % 2 == 1, pair % 2 == 0):
                    if stopped:
                        found.stopped.append(await frozen_block(cpu, victims, frozen, unrelated, block_s))
                    else:
                        found.well.append(await block(cpu, unrelated, block_s))
        await cpu.close()
    return found


def main() -> int:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS
    found = asyncio.run(measure(pairs))
    well, stopped = np.concatenate(found.well), np.concatenate(found.stopped)
    low, high = found.interval()
    print(
        f"{len(well)} rounds with 100 clients well:    p50 {np.median(well) * 1e3:.2f} ms, "
        f"p99 {np.quantile(well, 0.99) * 1e3:.2f} ms"
    )
    print(
        f"{len(stopped)} rounds with 10 of 100 stopped: p50 {np.median(stopped) * 1e3:.2f} ms, "
        f"p99 {np.quantile(stopped, 0.99) * 1e3:.2f} ms"
    )
    print(f"p99 {found.ratio():.3f} (95 of 100: {low:.3f} to {high:.3f}), median {found.median_ratio():.3f}")
    return int(found.ratio() >= RATIO_MAX)


if __name__ == "__main__":
    sys.exit(main())
