"""The outbox of one session: what waits to be sent, and the window of what is sent and not yet acknowledged.

    put ──► waiting ──take (gets its seq)──► window ──ack──► answered
                │                              ▲ │
              merged when too many             └─┘ sent again after a resume, under the same seq

A seq is given when a notice is taken to be sent, so that merging what waits leaves no gap. The window is a TCP window
with selective acks: it moves up to the first notice that is not done; what is done behind that one stays until then.
An INVALIDATE_RANGE_END needs no answer; it leaves the window with the notices around it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

from mmubusd.mm.addr import TASK_SIZE
from mmubusd.notify.errors import PeerError
from mmubusd.notify.log import Log
from mmubusd.notify.merging import Merged, Pending, merge
from mmubusd.notify.notice import Ack, Batch, Notice, Op, Result, Seq, Share, Targets

END = Op.INVALIDATE_RANGE_END


Acked = list[tuple[Notice, Targets, Result | None]]
"""Notices that are done, whom they concerned, and what was answered."""


class Answered(NamedTuple):
    """Consecutive notices that one acknowledgement says are done and nothing else.

    Attributes: log: which they are of, up to the position `through`; None: each of them counts for itself.
    """

    notices: list[Notice]
    targets: list[Targets]
    log: Log | None = None
    through: int = 0


class Outbox:
    """Notices of one session, in order.

    Args: limits of `Limits`: window_max, batch_max, waiting_max, ranges_max; busy_s: seconds that BUSY adds;
        busy_max_s: the most that a notice may take with BUSY.
    Attributes:
        last_seq: the seq of the last notice that was taken.
        acked_through, told_through: all up to this one are done; were said to be done.
        heard: the highest seq that was ever acknowledged.
        acked_nr: how many were answered; flushes_nr, wholes_nr: made of too much that waited, of everything or of a
            whole mm; busy: for notices whose handlers asked for time, until when; failed: what handlers said.
    """

    __slots__ = (
        "_batch_max", "_busy_max_s", "_busy_s", "_done", "_log", "_log_targets", "_merge_above", "_put_nr",
        "_ranges_max", "_sent", "_shares", "_told", "_waiting", "_waiting_max", "_waiting_targets", "_window",
        "_window_max", "_window_targets", "acked_nr", "acked_through", "busy", "failed", "flushes_nr", "heard",
        "last_seq", "merged_nr", "told_through", "wholes_nr",
    )  # fmt: skip

    def __init__(
        self, *, window_max: int, batch_max: int, waiting_max: int, ranges_max: int, busy_s: float, busy_max_s: float
    ) -> None:
        self._busy_s = busy_s
        self._busy_max_s = busy_max_s
        self._window_max = window_max
        self._batch_max = batch_max
        self._waiting_max = self._merge_above = waiting_max
        self._ranges_max = ranges_max
        self._waiting: list[Notice] = []
        self._waiting_targets: list[Targets] = []
        self._window: list[Notice] = []
        self._window_targets: list[Targets] = []
        self._log: Log | None = None
        self._log_targets: Targets = ()
        self._shares: deque[tuple[int, Log]] = deque()  # logs that it has read, with the seq of their first notice
        self._sent = 0  # of the window, on this stream
        self.heard = 0
        self._done: set[int] = set()
        self._told: dict[int, Result] = {}
        self.busy: dict[int, float] = {}
        self.failed: dict[int, str] = {}
        self.last_seq = 0
        self.acked_through = 0
        self.told_through = 0
        self._put_nr = 0
        self.acked_nr = 0
        self.merged_nr = 0
        self.flushes_nr = self.wholes_nr = 0

    @property
    def waiting_nr(self) -> int:
        """Notices that are not done, sent or not."""
        self._read_log()
        return len(self._waiting) + len(self._window) - len(self._done)

    @property
    def put_nr(self) -> int:
        """Notices that were ever put."""
        self._read_log()
        return self._put_nr

    @property
    def idle(self) -> bool:
        """Nothing waits to be sent."""
        return not self._waiting and (self._log is None or not self._log.notices) and self._sent == len(self._window)

    @property
    def unread_nr(self) -> int:
        """Notices that wait to be sent."""
        self._read_log()
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Nothing more is sent until something is answered."""
        return len(self._window) >= self._window_max

    # Sending.

    def put(self, notice: Notice, targets: Targets) -> bool:
        """Queue a notice. Returns: whether too many wait and `merge_waiting` should be called."""
        self._read_log()
        self._waiting.append(notice)
        self._waiting_targets.append(targets)
        self._put_nr += 1
        return len(self._waiting) > self._merge_above

    def follow(self, log: Log, targets: Targets) -> int:
        """What is written to the log is queued too, for these targets. Returns: how much may be."""
        self._read_log()
        self._log, self._log_targets = log, targets
        return max(self._merge_above - len(self._waiting), 0)

    def _read_log(self) -> None:
        log = self._log
        if log is not None:
            self._log = None
            log.open = False
            if log.notices:
                if not log.parted:
                    self._shares.append((self.last_seq + len(self._waiting) + 1, log))
                self._waiting += log.notices
                self._waiting_targets += [self._log_targets] * len(log.notices)
                self._put_nr += len(log.notices)

    def _part(self) -> None:
        """What it has in common with others is counted for itself from here on."""
        self._read_log()
        for _, log in self._shares:
            log.part()
        self._shares.clear()

    def pass_over(self) -> None:
        """A notice counts as put, and is answered unasked."""
        self._put_nr += 1

    def merge_waiting(self) -> Merged:
        """Make few of what waits. Returns: what waits now, and what counts as answered unasked."""
        self._part()
        before = list(zip(self._waiting, self._waiting_targets, strict=True))
        merged = merge(before, self._ranges_max)
        waiting = merged.waiting
        self._waiting = [notice for notice, _ in waiting]
        self._waiting_targets = [targets for _, targets in waiting]
        self._merge_above = max(self._waiting_max, 2 * len(waiting))  # what cannot be merged is not looked at each time
        self.merged_nr += len(before) - len(waiting)
        self.flushes_nr += max(0, _count(waiting, _is_flush) - _count(before, _is_flush))
        self.wholes_nr += max(0, _count(waiting, _is_whole) - _count(before, _is_whole))
        return merged

    def take(self, late_seq: int = 0) -> Batch | None:
        """Take what is to be sent now; what was sent on an earlier stream first.

        Args: late_seq: this notice has used half of its budget: it is sent again, and named.

        Returns: None when there is nothing to say, or the window is full.
        """
        self._read_log()
        if self.targets_of(late_seq) and late_seq - self.acked_through <= self._sent:
            at = late_seq - self.acked_through - 1
            return Batch(Seq(late_seq), [self._window[at]], [self._window_targets[at]], late_seq)
        first = self.acked_through + self._sent + 1
        again = len(self._window) - self._sent
        if again:
            stop = self._sent + min(again, self._batch_max)
            notices, targets = self._window[self._sent : stop], self._window_targets[self._sent : stop]
            self._sent = stop
            return Batch(Seq(first), notices, targets, late_seq)
        count = min(len(self._waiting), self._batch_max, self._window_max - len(self._window))
        if count <= 0:
            return Batch(Seq(first), [], [], late_seq) if late_seq else None
        if count == len(self._waiting):
            notices, targets = self._waiting, self._waiting_targets
            self._waiting, self._waiting_targets = [], []
            self._merge_above = self._waiting_max
        else:
            notices, targets = self._waiting[:count], self._waiting_targets[:count]
            del self._waiting[:count], self._waiting_targets[:count]
        self._window.extend(notices)
        self._window_targets.extend(targets)
        self._sent += count
        self.last_seq += count
        return Batch(Seq(first), notices, targets, late_seq, self._shares_of(first, count))

    def _shares_of(self, first: int, count: int) -> list[Share]:
        """What so many notices from a seq on have in common with other outboxes."""
        found = []
        for seq, log in self._shares:
            low, high = max(seq, first), min(seq + len(log.notices), first + count)
            if low < high and not log.parted:
                found.append(Share(low - first, high - first, log, high - low == len(log.notices)))
        return found

    def send_again(self) -> None:
        """The stream is a new one: what is not acknowledged is sent again, in order, before anything else."""
        self._sent = 0

    # Acknowledging.

    def acknowledge(self, ack: Ack, clock: float) -> Acked:
        """Returns: the notices that are done now and were not before, in order, with their results.

        Old and repeated acks give nothing. A notice is not done when its handler failed, or refused what it may not
        refuse. Raises: PeerError; nothing has changed then.
        """
        self._check(ack)
        if not (ack.results or ack.also) and (done := self.acknowledge_through(ack.through)) is not None:
            return [one for part in done for one in zip(part.notices, part.targets, repeat(None))]
        self._part()
        self.told_through = max(self.told_through, ack.through)
        for result in ack.results:
            if result.seq <= self.acked_through or result.seq in self._done:
                continue
            notice = self._window[result.seq - self.acked_through - 1]
            if result.busy:
                self.busy[result.seq] = min(clock + self._busy_s, notice.opened_at + self._busy_max_s)
            elif result.failed:
                self.failed[result.seq] = result.failed
            elif (result.refused or result.refused_pages) and not notice.refusable:
                self.failed[result.seq] = "refused what may not be refused"
            else:
                self._told[result.seq] = result
                self.failed.pop(result.seq, None)
        return self._selectively(ack)

    def acknowledge_through(self, through: int) -> list[Answered] | None:
        """The common case of `acknowledge`: everything up to one seq, and no result that was told before waits for it.

        Returns: the notices that are done now, in order; None when it is not the common case.
        """
        if self._done or self._told or self.failed or through > self.last_seq:
            return None
        self.told_through = max(self.told_through, through)
        first = self.acked_through + 1
        count = through - self.acked_through
        if count <= 0:
            return []
        window, targets = self._window, self._window_targets
        if count == len(window):
            self._window, self._window_targets = [], []
        else:
            self._window, self._window_targets = window[count:], targets[count:]
            window, targets = window[:count], targets[:count]
        self.acked_through = through
        self.heard = max(self.heard, through)
        self.acked_nr += count
        self._sent = max(self._sent - count, 0)
        if self.busy:
            self.busy = {seq: until for seq, until in self.busy.items() if seq > through}
        return self._by_log(first, window, targets)

    def _by_log(self, first: int, notices: list[Notice], targets: list[Targets]) -> list[Answered]:
        """Notices from a seq on, divided by the logs that they are of."""
        shares = self._shares
        at, stop = 0, len(notices)
        found: list[Answered] = []
        while shares and shares[0][0] < first + stop:
            seq, log = shares[0]
            whole = seq + len(log.notices) - first
            begin, end = max(seq - first, at), min(whole, stop)
            if end == whole:
                shares.popleft()
            if not log.parted:
                if at < begin:
                    found.append(Answered(notices[at:begin], targets[at:begin]))
                found.append(Answered(notices[begin:end], targets[begin:end], log, first + end - seq))
                at = end
            if end == stop:
                break
        if at < stop:
            found.append(Answered(notices[at:], targets[at:]))
        return found

    def _check(self, ack: Ack) -> None:
        """Raises: PeerError when the ack names what was never sent, or contradicts itself."""
        sent = self.last_seq
        highest = max(ack.through, max(ack.also, default=0), max((result.seq for result in ack.results), default=0))
        if highest > sent:
            raise PeerError(f"notice {highest} is acknowledged, but only {sent} were sent", seq=highest, last_seq=sent)
        for result in ack.results:
            if result.busy and (self.acked_through < result.seq <= ack.through or result.seq in ack.also):
                raise PeerError(f"notice {result.seq} is said to be busy and done in one message", seq=result.seq)

    def _selectively(self, ack: Ack) -> Acked:
        first = self.acked_through + 1
        seqs = set(range(first, ack.through + 1))
        for seq in seqs & self.failed.keys():
            if seq in {result.seq for result in ack.results}:  # said with it, not before
                seqs.discard(seq)
            else:
                del self.failed[seq]
        for seq in ack.also:
            if seq >= first:
                seqs.add(seq)
                self.failed.pop(seq, None)
        seqs -= self._done
        self.heard = max(self.heard, ack.through, *ack.also, 0)
        acked: Acked = []
        for seq in sorted(seqs):
            acked.append((self._window[seq - first], self._window_targets[seq - first], self._told.pop(seq, None)))
            self._done.add(seq)
            self.busy.pop(seq, None)
        self.acked_nr += len(acked)
        self._move_up()
        return acked

    def _move_up(self) -> None:
        """Move the window to the first notice that is not done."""
        count = 0
        for notice in self._window:
            seq = self.acked_through + 1 + count
            if seq > self.heard:  # withdrawn, and perhaps not received: a resumed stream has no gap
                break
            if seq in self._done:
                self._done.remove(seq)
            elif notice.op is not END:
                break
            count += 1
        del self._window[:count], self._window_targets[:count]
        self.acked_through += count
        self._sent = max(self._sent - count, 0)

    # Looking, and taking back.

    def targets_of(self, seq: int) -> Targets:
        """Whom a notice that is sent and not done concerns; nobody when it is not."""
        if self.acked_through < seq <= self.last_seq and seq not in self._done:
            return self._window_targets[seq - self.acked_through - 1]
        return ()

    def sent(self, seq: int) -> Notice:
        """Requires: `targets_of(seq)` is not empty."""
        return self._window[seq - self.acked_through - 1]

    def unanswered(self) -> Iterator[tuple[int, Notice, Targets]]:
        """What somebody waits for, oldest first, as (seq, or 0 when it is not sent; notice; targets)."""
        self._read_log()
        for seq, (notice, targets) in enumerate(
            zip(self._window, self._window_targets, strict=True), self.acked_through + 1
        ):
            if notice.op is not END and seq not in self._done:
                yield seq, notice, targets
        for notice, targets in zip(self._waiting, self._waiting_targets, strict=True):
            if notice.op is not END:
                yield 0, notice, targets

    def withdraw(self, registration: int) -> list[tuple[Notice, Targets]]:
        """Nothing more goes to this registration. Returns: what concerns nobody else, and so counts as answered."""
        self._part()
        answered = []
        keep: list[Notice] = []
        keep_targets: list[Targets] = []
        for notice, targets in zip(self._waiting, self._waiting_targets, strict=True):
            left = without(targets, registration)
            if left:
                keep.append(notice)
                keep_targets.append(left)
            else:
                answered.append((notice, targets))
        self._waiting, self._waiting_targets = keep, keep_targets
        for at, targets in enumerate(self._window_targets):
            if registration in targets:
                left = without(targets, registration)
                self._window_targets[at] = left
                seq = self.acked_through + 1 + at
                if not left and seq not in self._done:
                    self._done.add(seq)
                    self.busy.pop(seq, None)
                    self.failed.pop(seq, None)
                    answered.append((self._window[at], targets))
        return answered

    def clear(self) -> Sequence[tuple[Notice, Targets]]:
        """Everything is void. Returns: what was not answered."""
        self._part()
        unanswered = [(notice, targets) for _, notice, targets in self.unanswered()]
        self._waiting, self._waiting_targets = [], []
        self._window.clear()
        self._window_targets.clear()
        self._done.clear()
        self._told.clear()
        self.busy.clear()
        self.failed.clear()
        self.acked_through = self.last_seq
        self._sent = 0
        return unanswered


def _count(pending: Pending, which: Callable[[Notice], bool]) -> int:
    return sum(which(notice) for notice, _ in pending)


def _is_flush(notice: Notice) -> bool:
    return notice.op is Op.FLUSH_ALL


def _is_whole(notice: Notice) -> bool:
    return notice.merged is not None and notice.start == 0 and notice.end == TASK_SIZE


def without(targets: Targets, registration: int) -> Targets:
    """The same targets without one."""
    return tuple(target for target in targets if target != registration) if registration in targets else targets
