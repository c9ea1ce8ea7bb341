"""Going through seeds: `mmubus sim`.

A seed that breaks a rule is printed with its problems and the end of its recording, and `--seeds N:N+1` replays it. An
assertion of the cores that goes off is a problem like any other: an invariant noticed it first.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from mmubusd.sim.planted import PLANTED, Planted
from mmubusd.sim.simulation import Simulation

__all__ = ["Found", "find_planted", "main", "run_seed"]

CHUNK = 25
TRANSCRIPT_NR = 40


@dataclass(frozen=True, slots=True)
class Found:
    """A seed that broke a rule: what went wrong, and the end of its recording."""

    seed: int
    problems: list[str]
    transcript: list[str]


def run_seed(seed: int) -> Found | None:
    """Run one seed. Returns: None when no rule was broken."""
    simulation = Simulation(seed)
    try:
        problems = simulation.run()
    except Exception as error:  # whatever a core raises here is a problem of its own, and told with its seed
        where = traceback.extract_tb(error.__traceback__)[-1]
        problems = [f"seed {seed}: {type(error).__name__} in {where.name}: {error}"]
    return Found(seed, problems, simulation.transcript(TRANSCRIPT_NR)) if problems else None


def find_planted(bug: Planted, seeds: int) -> Found | None:
    """The first seed that finds a planted bug. Returns: None when none does."""
    with bug.planted():
        return next((found for seed in range(seeds) if (found := run_seed(seed)) is not None), None)


def _chunk(first: int, last: int) -> list[Found]:
    return [found for seed in range(first, last) if (found := run_seed(seed)) is not None]


def search(first: int, last: int, jobs: int) -> Iterator[list[Found]]:
    """Every seed that breaks a rule, a chunk of seeds at a time."""
    starts = range(first, last, CHUNK)
    ends = [min(start + CHUNK, last) for start in starts]
    if jobs == 1:
        yield from map(_chunk, starts, ends)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(_chunk, starts, ends)


def main(arguments: Sequence[str]) -> int:
    """`mmubus sim`. Returns: the exit status, 1 when a rule was broken or a planted bug was not found."""
    parser = argparse.ArgumentParser("mmubus sim", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", default="0:200", metavar="A:B", help="seeds from A to B, without B")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument(
        "--planted", metavar="NAME", help="switch a planted bug on and look for it; all: each one; list: their names"
    )
    given = parser.parse_args(arguments)
    first, _, last = given.seeds.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        parser.error(f"--seeds {given.seeds}: write A:B with A < B")
    if given.planted:
        return _planted(given.planted, int(last), parser)
    began, broken = time.monotonic(), 0
    for chunk in search(int(first), int(last), max(given.jobs, 1)):
        for found in chunk:
            broken += 1
            _show(found)
    print(f"{int(last) - int(first)} seeds, {broken} with violations, {time.monotonic() - began:.1f} s")
    return int(broken > 0)


def _show(found: Found) -> None:
    print("\n".join(found.problems))
    print(f"the end of its recording (mmubus sim --seeds {found.seed}:{found.seed + 1} replays it):")
    print("\n".join(f"    {line}" for line in found.transcript), flush=True)


def _planted(name: str, seeds: int, parser: argparse.ArgumentParser) -> int:
    if name == "list":
        for bug in PLANTED.values():
            print(f"{bug.name:<32} {bug.what}")
        return 0
    if name != "all" and name not in PLANTED:
        parser.error(f"--planted {name}: there is no such bug; --planted list names them")
    bugs = list(PLANTED.values()) if name == "all" else [PLANTED[name]]
    missed = 0
    for bug in bugs:
        found = find_planted(bug, seeds)
        missed += found is None
        told = (
            f"found by seed {found.seed}: {found.problems[0]}" if found is not None else f"NOT FOUND in {seeds} seeds"
        )
        print(f"{bug.name:<32} {told}", flush=True)
    print(f"{len(bugs)} planted bugs, {len(bugs) - missed} found within {seeds} seeds")
    return int(missed > 0)
