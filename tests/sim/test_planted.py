"""The simulation finds what it is there to find: each planted bug breaks a rule within a few seeds."""

from collections.abc import Callable
from typing import Any

import pytest
from mmubusd.notify.barred import BarredRanges
from mmubusd.notify.chain import Chain
from mmubusd.notify.outbox import Outbox
from mmubusd.notify.registry import Registry
from mmubusd.notify.rounds import Rounds
from sim.simulation import Simulation

SEEDS = 60
Plant = Callable[[pytest.MonkeyPatch], None]


def nothing(*args: Any, **options: Any) -> None:
    """Instead of what should have been done."""


def never_barred(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BarredRanges, "covers", lambda self, start, end: False)


def dirty_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rounds, "dirty", nothing)


def ends_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rounds, "_put_ends", nothing)


def acked_on_sending(patch: pytest.MonkeyPatch) -> None:
    """Rounds do not wait: whoever is told counts as done."""
    deliver = Rounds.deliver

    def eager(self: Rounds, session: Any, notice: Any, targets: Any) -> None:
        deliver(self, session, notice, targets)
        if notice.origin is not None and not notice.origin.notices_nr:
            self.answer(session, notice, targets, None)
            notice.origin = None

    patch.setattr(Rounds, "deliver", eager)


def never_sent_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Outbox, "send_again", nothing)


def one_is_not_told(patch: pytest.MonkeyPatch) -> None:
    """The oldest on the list is forgotten."""
    members = Chain.plan

    def short(self: Chain, kind: Any, spans: Any) -> Any:
        plan = members(self, kind, spans)
        if len(plan.counts) < 2:
            return plan
        left_out = list(plan.counts)[-1]
        steps = tuple((op, tuple(one for one in told if one.session is not left_out)) for op, told in plan.steps)
        return plan._replace(steps=steps, counts={one: n for one, n in plan.counts.items() if one is not left_out})

    patch.setattr(Chain, "plan", short)


def tables_kept_after_the_ack(patch: pytest.MonkeyPatch) -> None:
    """Stale accesses are not noticed, as what is given back still counts as held."""
    patch.setattr(Registry, "void", nothing)


@pytest.mark.parametrize(
    "plant",
    [
        never_barred,
        dirty_forgotten,
        ends_forgotten,
        acked_on_sending,
        never_sent_again,
        one_is_not_told,
        tables_kept_after_the_ack,
    ],
)
def test_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for seed in range(SEEDS):
        try:
            if Simulation(seed).run():
                return
        except (AssertionError, KeyError, IndexError):
            return  # an invariant of the core noticed it first
    pytest.fail(f"{plant.__name__} was not found in {SEEDS} seeds")
