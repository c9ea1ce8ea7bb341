"""Chaos for one session, seeded: what a driver must bear, more often than a network would give it.

A server that was started with `--chaos` reads the metadata key "mmubus-chaos" of Attach:

    seed=7 delay_s=0.02 duplicate=0.3 flush=0.05 evict=0.1 nonblock=0.05 drop=0.02

delay_s: each message waits up to so long; duplicate: it is sent twice; flush: FLUSH_ALL follows it; evict: a page that
the session holds is reclaimed; nonblock: a round that may be refused is raised over one; drop: the stream breaks. All
but delay_s are chances for each message with notices, or for each idle tick of 50 ms.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from dataclasses import dataclass, fields
from random import Random

from mmubusd.mm.addr import PAGE_SIZE, MmId
from mmubusd.mm.errno import MmError
from mmubusd.mm.mm import Mm
from mmubusd.mm.notification import Answer, InvalidateRange, Reason
from mmubusd.notify import Operation, Session
from mmubusd.notify.errors import RequestError
from mmubusd.notify.notice import SessionId
from mmubusd.rpc.driver import Driver

__all__ = ["CHAOS_KEY", "Chaos", "Dropped", "Knobs"]

CHAOS_KEY = "mmubus-chaos"
TICK_S = 0.05
MADV_PAGEOUT = 21


class Dropped(Exception):
    """The stream breaks, as a network would break it."""


@dataclass(frozen=True, slots=True)
class Knobs:
    """What is turned, see the module. seed: the same one gives the same draws."""

    seed: int = 0
    delay_s: float = 0.0
    duplicate: float = 0.0
    flush: float = 0.0
    evict: float = 0.0
    nonblock: float = 0.0
    drop: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Knobs:
        """Raises: RequestError EINVAL."""
        known = {field.name for field in fields(cls)}
        given: dict[str, float] = {}
        for part in text.split():
            name, _, value = part.partition("=")
            try:
                given[name] = float(value)
            except ValueError:
                name = ""
            if name not in known or not 0 <= given[name] <= (1 << 32 if name == "seed" else 10):
                raise RequestError("EINVAL", f"{CHAOS_KEY}: {part!r} is none of {' '.join(sorted(known))}")
        return cls(int(given.pop("seed", 0)), **given)


class Chaos:
    """Turns the knobs of one stream.

    Args: draws: the generators of all sessions: one that attaches again goes on with its own. Were it to begin again,
        the stream of a seed that drops its first message would drop it for ever.
    """

    def __init__(self, driver: Driver, session: Session, knobs: Knobs, draws: dict[SessionId, Random]) -> None:
        self._driver = driver
        self._session = session
        self._knobs = knobs
        self._random = draws.setdefault(session.id, Random(knobs.seed))
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def close(self) -> None:
        """The stream has ended."""
        self._timer.cancel()

    async def before(self) -> None:
        """A message is about to be sent. Raises: Dropped."""
        if self._knobs.delay_s:
            await asyncio.sleep(self._random.uniform(0.0, self._knobs.delay_s))
        if self._random.random() < self._knobs.drop:
            raise Dropped

    def twice(self) -> bool:
        """Whether the message is sent again."""
        return self._random.random() < self._knobs.duplicate

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        if self._random.random() < self._knobs.flush:
            self._driver.bus.flush(self._session, self._driver.now())
        if self._random.random() < self._knobs.evict:
            self._on_a_page(lambda mm, at: mm.madvise(at, PAGE_SIZE, MADV_PAGEOUT), "chaos: evict")
        if self._random.random() < self._knobs.nonblock:
            self._on_a_page(_nonblock, "chaos: may be refused")
        self._driver.pump()

    def _on_a_page(self, make: object, label: str) -> None:
        """Raise something on a page that the session may hold."""
        held = [one for one in self._session.registrations.values() if one.mm and one.held_pages]
        if not held:
            return
        registration = self._random.choice(held)
        mm = self._driver.memory.mms.get(MmId(registration.mm))
        if mm is None:
            return
        mappings = [one for one in mm.mappings() if one.end - one.start <= 1 << 24]
        if mappings:
            mapping = self._random.choice(mappings)
            at = mapping.start + self._random.randrange((mapping.end - mapping.start) // PAGE_SIZE) * PAGE_SIZE
            self._driver.submit(self._driver.bus.start, make(mm, at), then=_ended, label=label)  # type: ignore[operator]


def _nonblock(mm: Mm, at: int) -> Generator[InvalidateRange, Answer, None]:
    yield InvalidateRange(mm, at, at + PAGE_SIZE, Reason.CLEAR, blockable=False)


def _ended(operation: Operation[object]) -> None:
    """Nobody waits for it. What Linux would refuse (a locked page, say) is refused here, too."""
    if operation.error is not None and not isinstance(operation.error, MmError):
        raise operation.error
