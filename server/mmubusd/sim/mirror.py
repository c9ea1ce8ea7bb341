"""What a model driver holds: translations, what was written through them, and which registrations they are for."""

from __future__ import annotations

from collections.abc import Iterable

from mmubusd.notify import Notice, Op

Key = tuple[int, int]
"""A registration and a page's address, or a pfn where it exports."""
READ, WRITE = 1, 2


class Mirror:
    """One session's translations.

    Attributes:
        held: what may be used: (pfn, generation, rights). wrote: what was written through shared memory and has not
        been handed over. mms: the address space of each registration that is used, 0: it exports; pages: its interval.
        begun: invalidations whose start was heard, and whose end was not: (registration, round). gone: registrations
        that were unregistered.
    """

    def __init__(self) -> None:
        self.held: dict[Key, tuple[int, int, int]] = {}
        self.wrote: set[Key] = set()
        self.mms: dict[int, int] = {}
        self.pages: dict[int, range] = {}
        self.begun: set[tuple[int, int]] = set()
        self.gone: set[int] = set()
        self._flushed: dict[int, int] = {}  # registration: the seq of its last FLUSH_ALL

    def usable(self) -> list[Key]:
        """What a device may use, in an order of its own."""
        return sorted(key for key in self.held if key[0] in self.mms)

    def grant(self, key: Key, pfn: int, generation: int, rights: int) -> None:
        """Rights to a frame add up: a later grant takes none back."""
        before = self.held.get(key)
        if before is not None and before[:2] == (pfn, generation):
            rights |= before[2]
        self.held[key] = (pfn, generation, rights)

    def drop(self, seq: int, notice: Notice, targets: Iterable[int]) -> tuple[int, ...]:
        """Let go of what a notice covers. Returns: the pages of it that were written."""
        gone = [key for key in self.held if key[0] in targets and covers(notice, key[1])]
        dirty = tuple(key[1] for key in gone if key in self.wrote)
        for key in gone:
            del self.held[key]
        self.wrote.difference_update(gone)
        if notice.op is Op.INVALIDATE_RANGE_START:
            self.begun.update((target, notice.round) for target in targets if seq > self._flushed.get(target, 0))
        elif notice.op is Op.FLUSH_ALL:  # whatever was begun before it is over
            self.begun = {one for one in self.begun if one[0] not in targets}
            self._flushed.update((target, seq) for target in targets)
        return dirty

    def end(self, notice: Notice, targets: Iterable[int]) -> None:
        """An invalidation is over."""
        self.begun.difference_update((target, notice.round) for target in targets)

    def forget(self, registration: int) -> None:
        """The registration is off its list."""
        self.gone.add(registration)
        self.held = {key: entry for key, entry in self.held.items() if key[0] != registration}
        self.wrote = {key for key in self.wrote if key[0] != registration}


def covers(notice: Notice, page: int) -> bool:
    """Whether the notice takes this page (or frame) away."""
    if notice.op in (Op.RELEASE, Op.INVALIDATE_ALL, Op.FLUSH_ALL):
        return True
    if notice.op in (Op.INVALIDATE_PAGE, Op.RMAP_INVALIDATE_PAGE):
        return page in notice.pages
    return notice.op in (Op.INVALIDATE_RANGE, Op.INVALIDATE_RANGE_START) and notice.start <= page < notice.end


def stands_for(notice: Notice, original: Notice) -> bool:
    """Whether a merged notice takes away all that one of its parts does."""
    if notice.op is Op.FLUSH_ALL:
        return True
    if original.op in (Op.INVALIDATE_PAGE, Op.RMAP_INVALIDATE_PAGE):
        return set(original.pages) <= set(notice.pages)
    return notice.start <= original.start and original.end <= notice.end
