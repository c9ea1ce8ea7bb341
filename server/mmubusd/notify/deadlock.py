"""Deadlocks: the wait-for graph over operations and notices, and the cycles in it.

    operation ──its round──────────────► notice: every one of the round that is not answered
    operation ──its range lock─────────► operation: whoever holds what it wants, or stands before it
    operation ──a barred range─────────► operation: those whose rounds bar it
    notice    ──its handler waits for──► operation: those that were begun within it
    notice    ──the driver's order─────► notice: earlier ones of the session that overlap it
    notice    ──the window is full─────► notice: the first one that is not done

A handler waits for what it has begun (the client says within which notice a request was made), and a client runs
overlapping notices of one registration one after another; without a request from inside a handler there is no cycle.
So nothing is looked at until there is one, and a cycle that is found is a real one, not a suspicion.

Linux has no word for this: there the process hangs, and lockdep says afterwards why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from mmubusd.notify.notice import Notice, Targets
from mmubusd.notify.operation import Operation
from mmubusd.notify.session import Session

if TYPE_CHECKING:
    from mmubusd.mm.range_lock import Ticket
    from mmubusd.notify.round import Round

SEARCHED_MAX = 10_000
"""Nodes that one search looks at; a larger graph is not searched to its end."""


class Asked(NamedTuple):
    """A notice that a session has not answered. seq 0: it is not sent yet."""

    session: Session
    seq: int
    notice: Notice
    targets: Targets


Node = Operation[object] | Asked
Cycle = list[Node]


class WaitGraph:
    """Who waits for whom, seen from the operations that have not ended.

    Args: running: by id; tickets: which operation waits with which range-lock ticket.
    """

    def __init__(self, running: dict[int, Operation[object]], tickets: dict[Ticket, Operation[object]]) -> None:
        self._running = running
        self._tickets = tickets

    def cycle(self, begin: Operation[object]) -> Cycle | None:
        """A cycle that the operation is part of, beginning with it; None when there is none."""
        path: list[Node] = [begin]
        branches = [iter(self._after(begin))]
        seen = {_key(begin)}
        while branches:
            node = next(branches[-1], None)
            if node is None:
                branches.pop()
                path.pop()
            elif node is begin:
                return path
            elif _key(node) not in seen and len(seen) < SEARCHED_MAX:
                seen.add(_key(node))
                path.append(node)
                branches.append(iter(self._after(node)))
        return None

    def _after(self, node: Node) -> Iterable[Node]:
        """What a node waits for."""
        if isinstance(node, Asked):
            return self._after_notice(node)
        match node.waits_for:
            case "round":
                return list(self._asked(node))
            case "lock":
                return self._holders(node)
            case "range":
                return self._barrers(node)
        return ()

    def _asked(self, operation: Operation[object]) -> Iterator[Asked]:
        round_ = operation.round
        assert round_ is not None
        for session in round_.waiting:
            for seq, notice, targets in session.outbox.unanswered():
                if _of_round(notice, round_):
                    yield Asked(session, seq, notice, targets)

    def _holders(self, operation: Operation[object]) -> list[Node]:
        ticket = next((ticket for ticket, waiting in self._tickets.items() if waiting is operation), None)
        if ticket is None:
            return []
        owners = [earlier.owner for earlier in ticket.earlier if not earlier.released]
        return [owner for owner in owners if isinstance(owner, Operation) and not owner.over]

    def _barrers(self, operation: Operation[object]) -> list[Node]:
        start, end = operation.parked_on
        found: list[Node] = []
        for other in self._running.values():
            rounds = [*other.bars, other.round] if other.round is not None else other.bars
            if any(
                one.chain is not None
                and one.chain.barred is operation.barred
                and any(low < end and start < high for low, high in one.spans)
                for one in rounds
            ):
                found.append(other)
        return found

    def _after_notice(self, asked: Asked) -> list[Node]:
        session, seq, notice, targets = asked
        after: list[Node] = []
        if seq:
            after += [operation for operation in self._running.values() if operation.within == (session, seq)]
        elif session.outbox.full and (first := next(session.outbox.unanswered(), None)) is not None:
            after.append(Asked(session, *first))
        for earlier_seq, earlier, earlier_targets in session.outbox.unanswered():
            if earlier is notice:
                break
            if not set(targets).isdisjoint(earlier_targets) and _overlap(notice, earlier):
                after.append(Asked(session, earlier_seq, earlier, earlier_targets))
        return after


def _key(node: Node) -> tuple[int, int]:
    return (node.session.id, id(node.notice)) if isinstance(node, Asked) else (0, node.id)


def _of_round(notice: Notice, round_: Round) -> bool:
    if notice.merged is not None:
        return any(original.origin is round_ for original, _ in notice.merged)
    return notice.origin is round_


def _overlap(one: Notice, other: Notice) -> bool:
    """Whether a client runs the second handler only after the first."""
    low, high = one.extent()
    start, end = other.extent()
    return low < end and start < high


def tell(cycle: Cycle) -> list[str]:
    """The cycle for people, one line an edge: who waits for whom."""
    lines = []
    for node, after in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        if isinstance(node, Asked):
            where = f"{_name(node)} of {node.session.name}"
            if isinstance(after, Asked):
                lines.append(f"{where} waits for its turn behind {_name(after)}, which covers the same pages")
            else:
                lines.append(f"{where} is not answered: its handler waits for {after.name()}, which it has called")
        elif isinstance(after, Asked):
            lines.append(f"{node.name()} waits for {after.session.name} to answer {_name(after)}")
        elif node.waits_for == "lock":
            lines.append(f"{node.name()} waits for {after.name()}, which works on the same range")
        else:
            lines.append(f"{node.name()} waits for {after.name()}, which is invalidating the range")
    return lines


def _name(asked: Asked) -> str:
    what = f"notice {asked.seq}" if asked.seq else "a notice that is not sent yet"
    return f"{what} ({asked.notice.op.name.lower()}, round {asked.notice.round})"


def sessions_of(cycle: Cycle) -> list[Session]:
    """Everyone in it, each once."""
    found = {node.session: None for node in cycle if node.session is not None}
    return [session for session in found if session is not None]


def weakest(cycle: Cycle) -> Operation[object]:
    """The operation to break it at: the newest of those that a handler waits for, first one that has changed nothing.

    Requires: a cycle has an operation that was begun within a notice.
    """
    begun = [node for node in cycle if isinstance(node, Operation) and node.within is not None]
    assert begun, "a cycle without a request from inside a handler"
    return max(begun, key=lambda operation: (operation.waits_for != "round", operation.id))
