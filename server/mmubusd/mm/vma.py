"""Virtual memory areas, and the tree that keeps them in order.

Flags have the kernel's values (include/linux/mm.h, v6.12). The tree only keeps order and the reverse map in step with
it; when VMAs split and merge is `vma_merge`'s business.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mmubusd.mm import rmap
from mmubusd.mm.addr import PAGE_SHIFT

if TYPE_CHECKING:
    from mmubusd.mm.file import File
    from mmubusd.mm.hugetlb_pool import Reservation
    from mmubusd.mm.mempolicy import Mempolicy
    from mmubusd.mm.mm import Mm
    from mmubusd.mm.rmap import AnonVma

VM_READ = 0x1
VM_WRITE = 0x2
VM_EXEC = 0x4
VM_SHARED = 0x8
VM_GROWSDOWN = 0x100
VM_LOCKED = 0x2000
VM_SEQ_READ = 0x8000
VM_RAND_READ = 0x10000
VM_DONTCOPY = 0x20000
VM_DONTEXPAND = 0x40000
VM_LOCKONFAULT = 0x80000
VM_LOCKED_MASK = VM_LOCKED | VM_LOCKONFAULT
VM_ACCOUNT = 0x100000
VM_NORESERVE = 0x200000
VM_HUGETLB = 0x400000
VM_SYNC = 0x800000
VM_WIPEONFORK = 0x2000000
VM_DONTDUMP = 0x4000000
VM_HUGEPAGE = 0x20000000
VM_NOHUGEPAGE = 0x40000000
VM_MERGEABLE = 0x80000000
VM_UFFD_MISSING = 0x200
VM_UFFD_WP = 0x1000
VM_UFFD_MINOR = 1 << 38
VM_SEALED = 1 << 42
VM_UFFD_ASYNC = 1 << 47  # ours: the kernel has it with the userfaultfd
UFFD_SHIFT, UFFD_NUMBER_MAX = 48, 0xFFFF
"""Which userfaultfd a VMA is registered with is part of its flags: two VMAs merge only if it is the same."""
UFFD_FLAGS = VM_UFFD_MISSING | VM_UFFD_WP | VM_UFFD_MINOR | VM_UFFD_ASYNC | UFFD_NUMBER_MAX << UFFD_SHIFT
VM_ACCESS_FLAGS = VM_READ | VM_WRITE | VM_EXEC


class Vma:
    """One mapping: [start, end) bytes, with its page offset into the file or into the order of private memory.

    reservation: what a private mapping of hugetlb has of the pool. policy: its memory policy, see mempolicy.
    """

    __slots__ = ("anon_vma", "chain", "end", "file", "flags", "mm", "pgoff", "policy", "reservation", "start")

    def __init__(self, mm: Mm, start: int, end: int, flags: int, pgoff: int, file: File | None) -> None:
        self.mm = mm
        self.start = start
        self.end = end
        self.flags = flags
        self.pgoff = pgoff
        self.file = file
        self.anon_vma: AnonVma | None = None
        self.chain: list[AnonVma] = []
        self.reservation: Reservation | None = None
        self.policy: Mempolicy | None = None

    def __repr__(self) -> str:
        return f"Vma({self.start:#x}-{self.end:#x} {self.prot_string()} pgoff={self.pgoff:#x})"

    @property
    def pages(self) -> int:
        return (self.end - self.start) >> PAGE_SHIFT

    @property
    def shared(self) -> bool:
        return self.flags & VM_SHARED != 0

    @property
    def flags_but_access(self) -> int:
        return self.flags & ~VM_ACCESS_FLAGS

    def linear_index(self, address: int) -> int:
        """The page offset of an address. Kernel: linear_page_index()."""
        return self.pgoff + ((address - self.start) >> PAGE_SHIFT)

    def address_of(self, index: int) -> int:
        return self.start + ((index - self.pgoff) << PAGE_SHIFT)

    def overlap(self, first: int, last: int) -> tuple[int, int]:
        """The addresses of the indexes [first, last) as far as the VMA covers them; empty when end <= start."""
        start = max(self.start, self.address_of(first))
        return start, min(self.end, self.address_of(last))

    def prot_string(self) -> str:
        """As in /proc/PID/maps."""
        flags = self.flags
        rights = "".join(c if flags & bit else "-" for c, bit in (("r", VM_READ), ("w", VM_WRITE), ("x", VM_EXEC)))
        return rights + ("s" if flags & VM_SHARED else "p")


class VmaTree:
    """The VMAs of one address space, by address, none overlapping."""

    __slots__ = ("_starts", "_vmas")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._vmas: list[Vma] = []

    def __iter__(self) -> Iterator[Vma]:
        return iter(self._vmas)

    def __len__(self) -> int:
        return len(self._vmas)

    def find(self, address: int) -> Vma | None:
        """The VMA that contains the address. Kernel: vma_lookup()."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0:
            vma = self._vmas[at]
            if address < vma.end:
                return vma
        return None

    def find_from(self, address: int) -> Vma | None:
        """The first VMA that ends after the address. Kernel: find_vma()."""
        at = bisect_right(self._starts, address) - 1
        if at < 0 or self._vmas[at].end <= address:
            at += 1
        return self._vmas[at] if at < len(self._vmas) else None

    def overlapping(self, start: int, end: int) -> list[Vma]:
        """The VMAs that touch [start, end), ascending."""
        at = bisect_right(self._starts, start) - 1
        if at < 0 or self._vmas[at].end <= start:
            at += 1
        return self._vmas[at : max(at, bisect_left(self._starts, end))]

    def intersects(self, start: int, end: int) -> bool:
        vma = self.find_from(start)
        return vma is not None and vma.start < end

    def neighbours(self, start: int, end: int) -> tuple[Vma | None, Vma | None]:
        """The last VMA that ends at or before start, and the first that begins at or after end."""
        at = bisect_left(self._starts, start)
        before = self._vmas[at - 1] if at else None
        at = bisect_left(self._starts, end)
        after = self._vmas[at] if at < len(self._vmas) else None
        return before, after

    def insert(self, vma: Vma, original: Vma | None = None) -> None:
        """Put a VMA into the address order and its file's list; its anon_vmas are linked by `rmap`.

        Args: original: the parent's VMA of which it is the forked copy.
        """
        at = bisect_left(self._starts, vma.start)
        self._starts.insert(at, vma.start)
        self._vmas.insert(at, vma)
        if vma.file is not None:
            vma.file.map(vma, original)

    def remove(self, vma: Vma) -> None:
        """Take a VMA out of every order."""
        self._drop(vma)
        if vma.file is not None:
            vma.file.unmap(vma)
        rmap.unlink(vma)

    def remove_all(self, vmas: list[Vma]) -> None:
        """remove() on consecutive VMAs."""
        if vmas:
            at = bisect_left(self._starts, vmas[0].start)
            del self._starts[at : at + len(vmas)]
            del self._vmas[at : at + len(vmas)]
        for vma in vmas:
            if vma.file is not None:
                vma.file.unmap(vma)
            rmap.unlink(vma)

    def _drop(self, vma: Vma) -> None:
        at = bisect_left(self._starts, vma.start)
        assert self._vmas[at] is vma, "the tree holds this VMA"
        del self._starts[at]
        del self._vmas[at]

    def set_range(self, vma: Vma, start: int, end: int, pgoff: int) -> None:
        """Change the bounds, within the room between the neighbours. Kernel: vma_prepare(), vma_complete()."""
        for each in rmap.lists(vma):
            each.remove(vma)
        if start != vma.start:
            self._starts[bisect_left(self._starts, vma.start)] = start
        vma.start, vma.end, vma.pgoff = start, end, pgoff
        for each in rmap.lists(vma):
            each.insert(vma)
