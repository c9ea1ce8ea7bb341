"""Beginning in the middle: an address space as a recording's snapshot shows it.

What the snapshot cannot tell is who else has a page. For pages said to be shared an unknown sharer is counted: one more
mapping that has no PTE here, so that a write copies; `forget_sharers` ends it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import filemap
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE
from mmubusd.mm.anon import new_anon_frame
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import ANON, CACHE, EXCLUSIVE
from mmubusd.mm.pgtable import NEW_PTE, PFN_SHIFT, PRESENT, WRITE, ZERO_PTE
from mmubusd.mm.vma import (
    VM_ACCOUNT,
    VM_DONTCOPY,
    VM_DONTEXPAND,
    VM_EXEC,
    VM_GROWSDOWN,
    VM_HUGEPAGE,
    VM_LOCKED,
    VM_MERGEABLE,
    VM_NOHUGEPAGE,
    VM_RAND_READ,
    VM_READ,
    VM_SEQ_READ,
    VM_SHARED,
    VM_WIPEONFORK,
    VM_WRITE,
    Vma,
)

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mapping, Mm

RIGHTS = {"r": VM_READ, "w": VM_WRITE, "x": VM_EXEC, "s": VM_SHARED, "p": 0, "-": 0}

FLAGS = {
    "dc": VM_DONTCOPY,
    "hg": VM_HUGEPAGE,
    "lo": VM_LOCKED,
    "mg": VM_MERGEABLE,
    "nh": VM_NOHUGEPAGE,
    "rr": VM_RAND_READ,
    "sr": VM_SEQ_READ,
    "wf": VM_WIPEONFORK,
}
"""What smaps calls them. Others are not adopted: they follow from the rest, or nothing depends on them."""


def adopt(mm: Mm, mapping: Mapping, resident: Iterable[tuple[int, int, str]]) -> None:
    """Install one mapping with its resident pages."""
    start, end = mapping.start, mapping.end
    if (
        start % PAGE_SIZE
        or end % PAGE_SIZE
        or mapping.offset % PAGE_SIZE
        or not 0 <= start < end <= TASK_SIZE + PAGE_SIZE
    ):
        raise MmError("EINVAL", f"[{start:#x}, {end:#x}) at offset {mapping.offset:#x} is not a page-aligned range")
    if len(mapping.prot) != 4 or any(letter not in RIGHTS for letter in mapping.prot):
        raise MmError("EINVAL", f"protection {mapping.prot!r}")
    if mm.vmas.intersects(start, end):
        raise MmError("EEXIST", f"something is mapped in [{start:#x}, {end:#x})")
    flags = sum(RIGHTS[letter] for letter in mapping.prot)
    if flags & (VM_WRITE | VM_SHARED) == VM_WRITE:
        flags |= VM_ACCOUNT
    if mapping.name == "[stack]":
        flags |= VM_GROWSDOWN
    if mapping.name.startswith(("[vdso", "[vvar")):
        flags |= VM_DONTEXPAND  # the kernel's own pages
    flags |= sum(FLAGS[letters] for letters in set(mapping.flags) & FLAGS.keys())
    file, pgoff = None, start >> PAGE_SHIFT
    if mapping.file is not None:
        file, pgoff = mm.memory.file(mapping.file), mapping.offset >> PAGE_SHIFT
    elif flags & VM_SHARED:
        file, pgoff = mm.memory.new_shared_memory(end - start, memcg=mm.memcg), 0
    vma = Vma(mm, start, end, flags, pgoff, file)
    mm.vmas.insert(vma)
    base = start >> PAGE_SHIFT
    for first, last, kind in resident:
        if not 0 <= first <= last <= vma.pages or kind not in ("f", "a", "s"):
            raise MmError("EINVAL", f"resident pages {first} to {last} of kind {kind!r}")
        for vpn in range(base + first, base + last):
            _adopt_page(mm, vma, vpn, kind)


def _adopt_page(mm: Mm, vma: Vma, vpn: int, kind: str) -> None:
    frames = mm.memory.frames
    if kind == "f" or vma.flags & VM_SHARED:
        _map_file_page(mm, vma, vpn)
        return
    pfn = new_anon_frame(mm, vma, vpn)
    pte = NEW_PTE if vma.flags & VM_WRITE else NEW_PTE & ~WRITE
    if kind == "s":
        frames.flags_at[pfn] &= ~EXCLUSIVE
        frames.refcount_at[pfn] += 1
        frames.mapcount_at[pfn] += 1
        frames.unknown_sharers.add(pfn)
        pte &= ~WRITE
    mm.pgtable.set(vpn, pfn << PFN_SHIFT | pte)


def _map_file_page(mm: Mm, vma: Vma, vpn: int) -> None:
    """Map the file's page as a read would; memory that has no file was never written: the zero page."""
    file = vma.file
    if file is None:
        mm.pgtable.set(vpn, ZERO_PTE)
        return
    index = vma.pgoff + vpn - (vma.start >> PAGE_SHIFT)
    if index >= file.pages:
        file.size = (index + 1) << PAGE_SHIFT
    if file.kind == "xip":
        if not file.cache.get(index):
            file.cache.set(index, mm.memory.frames.alloc(CACHE, file.id, index, memcg=file.memcg))
    elif not file.cache.get(index):
        file.add(index)
        file.read_in(index)
    filemap.map_folio_pages(mm, vma, index, index + 1, filemap.clean_pte_flags(vma))


def adopt_file_page(mm: Mm, address: int) -> None:
    """Map the file's page at the address, if nothing is mapped there. Raises: MmError EFAULT."""
    vma = mm.vmas.find(address)
    if vma is None:
        raise MmError("EFAULT", f"nothing is mapped at {address:#x}")
    if not mm.pgtable.get(address >> PAGE_SHIFT):
        _map_file_page(mm, vma, address >> PAGE_SHIFT)


def forget_sharers(mm: Mm, start: int, end: int) -> None:
    """The unknown sharers of the pages in [start, end) are gone: each page loses the mapping that stood for them."""
    frames = mm.memory.frames
    for _, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        for pte in ptes[ptes & np.uint64(PRESENT) != 0].tolist():
            pfn = pte >> PFN_SHIFT
            if pfn in frames.unknown_sharers and frames.flags_at[pfn] & ANON:
                frames.forget_sharer(pfn)
