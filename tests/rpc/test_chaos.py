"""Chaos is drawn by the session's seed, and goes on from one stream to the next."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from mmubusd.notify import RequestError
from mmubusd.notify.notice import SessionId
from mmubusd.rpc.chaos import Chaos, Knobs


async def test_a_session_that_attaches_again_goes_on_with_its_own_draws() -> None:
    draws: dict[SessionId, Random] = {}
    driver: Any = SimpleNamespace()

    def drawn(session: int) -> list[bool]:
        """What one stream of a session draws."""
        who: Any = SimpleNamespace(id=SessionId(session))
        chaos = Chaos(driver, who, Knobs.parse("seed=1 duplicate=0.5"), draws)
        twice = [chaos.twice() for _ in range(32)]
        chaos.close()
        return twice

    first, second = drawn(1), drawn(1)
    assert first != second
    assert drawn(2) == first, "a seed gives the same draws"


@pytest.mark.parametrize("knobs", ["loud=1", "drop=x", "drop=11", "drop"])
def test_a_knob_that_is_not_there_is_refused(knobs: str) -> None:
    with pytest.raises(RequestError, match="is none of"):
        Knobs.parse(knobs)
