"""Every point at which the machine may stop: the state that a restart makes is one that was, and nothing that was
acknowledged is missing in it.

A seeded workload runs on a disk that remembers every step. Then the disk is put together as each step could have left
it, a killed process and a lost power told apart, with every write half done, and a restart goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from mmubusd.mm.check import check_memory
from mmubusd.notify import Ack, Hello, State
from mmubusd.notify.history import Event
from mmubusd.notify.validators import judge
from mmubusd.state import SEAL, Core, Entry, Keeper, RecordedCore, StateError, compact, open_state
from state.likeness import digest
from state.simdisk import Image, SimDisk, Step, crashes
from state.workload import FRAMES, Workload, make_core, store, unseen

PARAMETERS = {"frames_nr": FRAMES}
STEPS = 120
LONGEST_S = 4.0


@dataclass
class Commit:
    """The state after a group commit: what it is like, but for some frames; what had been recorded by then; the disk's
    steps that had been done when it was acknowledged."""

    like: str
    unseen: frozenset[int]
    events: int
    acknowledged_at: int


@dataclass
class Run:
    """A workload with a server around it, by hand: group commits, segments and checkpoints."""

    seed: int
    disk: SimDisk = field(default_factory=SimDisk)
    commits: dict[int, Commit] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keeper, self.core, new = open_state(self.disk, PARAMETERS, lambda: make_core(self.seed), store)
        assert new
        self.pending: list[Entry] = []
        self._commit()
        self.core.note = self.pending.append
        self.core.history.recording = True
        self.workload = Workload(self.core, self.seed)
        self.compacting = 0

    def _commit(self) -> None:
        if self.pending:
            self.keeper.append(list(self.pending))
            self.pending.clear()
        but = unseen(self.core)
        self.commits[self.keeper.number] = Commit(
            digest(self.core, but), but, len(self.core.history.events), len(self.disk.log)
        )

    def run(self) -> Run:
        random = self.workload.random
        for _ in range(STEPS):
            self.workload.step()
            if random.random() < 0.5:
                self._commit()
            if self.keeper.size > 8_000 and self.core.quiet and not self.compacting:
                self.pending.append((SEAL, self.core.fingerprint(), {}, ()))
                self._commit()
                self.keeper.begin_segment()
                self._commit()
                self.compacting = self.keeper.segment
            elif self.compacting and random.random() < 0.05:
                compact(self.disk, self.compacting, store)
                self.keeper.install(self.compacting)
                self.compacting = 0
        self._commit()
        self.events = self.core.history.events
        return self


def restart(image: Image, seed: int) -> tuple[Keeper, RecordedCore]:
    keeper, core, _ = open_state(SimDisk(image), PARAMETERS, lambda: make_core(seed), store)
    return keeper, core


def go_on(core: RecordedCore, before: list[Event]) -> None:
    """After the restart: some come back and answer, the others are fenced; everything that waited comes to its end."""
    core.history.recording = True
    now = core.seen
    core.restart(now)
    lost = [session for session in core.sessions.values() if session.state is State.LOST]
    for session in lost[::2]:
        core.open_session(
            Hello(session.name, token=session.token, handled_through=session.outbox.acked_through), now, ""
        )
        assert session.resumed
    for _ in range(2000):
        deadline = core.next_deadline()
        if core.quiet or deadline is None:
            break
        for session in lost[::2]:
            if session.state is State.LIVE:
                core.take_batch(session)
                if session.as_of_seq > session.outbox.acked_through:
                    core.acknowledge(session, Ack(session.as_of_seq), now)
                else:
                    core.heartbeat(session, now)
        now = max(now, min(deadline, now + 0.25))
        core.expire(now)
        core.finished.clear()
        core.drain_ready()
    assert core.quiet, f"{list(core.running.values())} never end"
    for session in lost[1::2]:
        assert session.fenced is not None or core.clock(now) <= session.state_since + session.grace_s
    assert not core.counters.freed_before_ack
    check_memory(core.memory)
    assert judge([*before, *core.history.events], over=False, longest_s=LONGEST_S + 10.0) == []


@pytest.mark.parametrize("seed", [1, 2])
def test_a_restart_after_any_crash_is_a_state_that_was(seed: int) -> None:
    sweep(Run(seed).run())


class Hasty(SimDisk):
    """Says that it has synced the journal, and has not."""

    def play(self, step: Step) -> None:
        if not (step.kind == "sync" and step.name.startswith("journal-")):
            super().play(step)


def test_the_sweep_finds_what_is_acknowledged_before_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("state.simdisk.SimDisk", Hasty)
    with pytest.raises(AssertionError, match=r"was acknowledged|is lost"):
        sweep(Run(1).run())


def test_the_sweep_finds_an_input_that_is_not_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordedCore, "acknowledge", Core.acknowledge)
    with pytest.raises((AssertionError, StateError)):
        sweep(Run(1).run())


def sweep(run: Run) -> None:
    """Restart from every disk that the run could have left. Raises: AssertionError, StateError."""
    seed = run.seed
    assert any(step.kind == "rename" for step in run.disk.log[8:]), "a checkpoint was made on the way"
    seen: dict[str, int] = {}
    met, points = set(), 0
    for at, how, image in crashes(run.disk.log):
        points += 1
        acknowledged = max((n for n, commit in run.commits.items() if commit.acknowledged_at <= at), default=0)
        key = repr(sorted((name, hash(data)) for name, data in image.items()))
        if key in seen:  # the same files have been tried: only what must be in them has grown
            assert seen[key] >= acknowledged, f"step {at}, {how}: commit {acknowledged} is lost"
            continue
        keeper, core = restart(image, seed)
        where = f"step {at}, {how}: restarted at commit {keeper.number}"
        assert keeper.number in run.commits, f"{where}, which never was"
        assert keeper.number >= acknowledged, f"{where}, and {acknowledged} was acknowledged"
        seen[key] = keeper.number
        if keeper.number in met and "checkpoint" not in how and at % 5:
            continue  # the journal's end is cut to one that has been looked at
        met.add(keeper.number)
        commit = run.commits[keeper.number]
        assert digest(core, commit.unseen) == commit.like, f"{where}, and the state is another one"
        go_on(core, run.events[: commit.events])
    assert met == set(run.commits), "every commit was a restart's"
    print(f"seed {seed}: {points} points, {len(seen)} different disks, {len(met)} states")
