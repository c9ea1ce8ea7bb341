"""The model client's half of the acknowledgement window: what is handled, and what of it may not have arrived."""

from __future__ import annotations

from collections.abc import Iterable

from mmubusd.notify import Ack, Notice, Result

Handled = tuple[int, Notice, tuple[int, ...]]
"""A seq, its notice, and whom it concerned."""


class Answers:
    """One session's.

    Attributes: handled: in the order in which it happened; results: what was answered beside "done"; running: notices
            whose handlers have called back; last_seq: the last one that was handled.
    """

    def __init__(self) -> None:
        self.handled: list[Handled] = []
        self.results: dict[int, Result] = {}
        self.running: set[int] = set()
        self._done: set[int] = set()
        self._through = 0
        self._again = False

    @property
    def last_seq(self) -> int:
        return self.handled[-1][0] if self.handled else 0

    def has_done(self, seq: int) -> bool:
        """Whether it was handled before; then the same answer is given again."""
        return seq <= self._through or seq in self._done

    def done(self, seq: int, notice: Notice, targets: tuple[int, ...], result: Result | None) -> None:
        """Its handlers have finished. A refused notice took nothing away."""
        if result is None or not result.refused:
            self.handled.append((seq, notice, targets))
        if seq > self._through:
            self._done.add(seq)
        if result is not None:
            self.results[seq] = result

    def overtaken(self, registration: int, as_of_seq: int) -> list[Notice]:
        """What was handled after a grant was made, and concerns its registration."""
        return [notice for seq, notice, targets in self.handled if seq > as_of_seq and registration in targets]

    def resume(self) -> None:
        """The stream is a new one: nobody knows what arrived of what was said on the old one."""
        self._again = True

    def ack(self, results: Iterable[Result]) -> Ack:
        """Everything that is done: cumulative as far as there is no gap."""
        while self._through + 1 in self._done:
            self._through += 1
            self._done.remove(self._through)
        said = {result.seq: result for result in results}
        if self._again:
            self._again = False
            said = self.results | said
        return Ack(self._through, sorted(self._done), list(said.values()))
