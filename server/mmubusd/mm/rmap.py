"""The reverse map: from a page to the places that map it.

A frame names a mapping (an anon_vma or a file) and an index in it; the mapping lists the VMAs in which that index may
be. The list is the kernel's interval tree in the one respect that can be seen: the order in which it is walked, by
first page offset, equals in order of insertion. A VMA whose bounds change is taken out and put back.

anon_vmas: a private VMA gets one at its first own page. A fork's child is listed in all of its parent's, and gets its
own for the pages that it makes itself, so that a page is looked for only where it can be.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmubusd.mm.vma import Vma


def _first(vma: Vma) -> int:
    return vma.pgoff


class RmapList:
    """VMAs in the order in which the kernel walks them. version grows with every change."""

    __slots__ = ("version", "vmas")

    def __init__(self) -> None:
        self.vmas: list[Vma] = []
        self.version = 0

    def __contains__(self, vma: Vma) -> bool:
        return any(each is vma for each in self._equals(vma))

    def _equals(self, vma: Vma) -> list[Vma]:
        at = bisect_left(self.vmas, vma.pgoff, key=_first)
        return self.vmas[at : bisect_right(self.vmas, vma.pgoff, lo=at, key=_first)]

    def insert(self, vma: Vma) -> None:
        """Kernel: vma_interval_tree_insert()."""
        self.version += 1
        self.vmas.insert(bisect_right(self.vmas, vma.pgoff, key=_first), vma)

    def insert_after(self, vma: Vma, original: Vma) -> None:
        """Kernel: vma_interval_tree_insert_after()."""
        self.version += 1
        self.vmas.insert(self._place(original) + 1, vma)

    def remove(self, vma: Vma) -> None:
        self.version += 1
        del self.vmas[self._place(vma)]

    def _place(self, vma: Vma) -> int:
        at = bisect_left(self.vmas, vma.pgoff, key=_first)
        while self.vmas[at] is not vma:
            at += 1
        return at

    def overlapping(self, first: int, last: int) -> list[Vma]:
        """The VMAs that cover an index of [first, last), as they are now, in walking order."""
        through = bisect_left(self.vmas, last, key=_first)
        return [vma for vma in self.vmas[:through] if vma.pgoff + vma.pages > first]


class AnonVma:
    """Where pages of one family of private VMAs can be. Kernel: struct anon_vma, include/linux/rmap.h, v6.12."""

    __slots__ = ("active_nr", "children_nr", "id", "parent", "rmap")

    def __init__(self, mapping_id: int, parent: AnonVma | None) -> None:
        self.id = mapping_id
        self.rmap = RmapList()
        self.parent = parent
        self.active_nr = 1
        self.children_nr = 0 if parent is not None else 1
        if parent is not None:
            parent.children_nr += 1

    @property
    def root(self) -> AnonVma:
        """The oldest of the family, which lists all of it. Kernel: anon_vma->root."""
        return self if self.parent is None else self.parent.root


def prepare(vma: Vma, before: Vma | None, after: Vma | None) -> AnonVma:
    """Give the VMA an anon_vma: a neighbour's, so that the two can merge later, or a new one.

    Kernel: __anon_vma_prepare(), find_mergeable_anon_vma(), v6.12.
    """
    found = None
    if after is not None and _compatible(vma, after):
        found = _reusable(after)
    if found is None and before is not None and _compatible(before, vma):
        found = _reusable(before)
    if found is not None:
        found.active_nr += 1
    else:
        found = vma.mm.memory.new_anon_vma(None)
    vma.anon_vma = found
    _link(vma, found)
    return found


def _compatible(left: Vma, right: Vma) -> bool:
    """Would the two merge if their rights were equal? Kernel: anon_vma_compatible()."""
    return (
        left.end == right.start
        and left.file is right.file
        and left.policy == right.policy
        and left.flags_but_access == right.flags_but_access
        and left.pgoff + left.pages == right.pgoff
    )


def _reusable(vma: Vma) -> AnonVma | None:
    return vma.anon_vma if len(vma.chain) == 1 else None


def _link(vma: Vma, anon_vma: AnonVma) -> None:
    vma.chain.append(anon_vma)
    anon_vma.rmap.insert(vma)


def clone(target: Vma, source: Vma) -> None:
    """List target wherever source is. Kernel: anon_vma_clone()."""
    for anon_vma in source.chain:
        _link(target, anon_vma)
        if (
            target.anon_vma is None
            and source.anon_vma is not None
            and anon_vma.children_nr < 2
            and anon_vma.active_nr == 0
        ):
            target.anon_vma = anon_vma
    if target.anon_vma is not None:
        target.anon_vma.active_nr += 1


def copy(target: Vma, source: Vma) -> None:
    """target is another part of source, with the same anon_vma: split, merge and move."""
    target.anon_vma = source.anon_vma
    clone(target, source)


def duplicate(target: Vma, source: Vma) -> None:
    """target grows over pages of source. Kernel: dup_anon_vma()."""
    if source.anon_vma is not None and target.anon_vma is None:
        copy(target, source)


def fork(child: Vma, parent: Vma) -> None:
    """Kernel: anon_vma_fork()."""
    if parent.anon_vma is None:
        return
    clone(child, parent)
    if child.anon_vma is None:
        child.anon_vma = child.mm.memory.new_anon_vma(parent.anon_vma)
        _link(child, child.anon_vma)


def unlink(vma: Vma) -> None:
    """Kernel: unlink_anon_vmas()."""
    for anon_vma in vma.chain:
        anon_vma.rmap.remove(vma)
    if vma.anon_vma is not None:
        vma.anon_vma.active_nr -= 1
    for anon_vma in vma.chain:
        if not anon_vma.rmap.vmas:
            if anon_vma.parent is not None:
                anon_vma.parent.children_nr -= 1
            vma.mm.memory.forget_mapping(anon_vma.id)
    vma.chain.clear()
    vma.anon_vma = None


def lists(vma: Vma) -> Iterator[RmapList]:
    """Every list that the VMA is in."""
    if vma.file is not None:
        yield vma.file.rmap
    for anon_vma in vma.chain:
        yield anon_vma.rmap
