"""uprobes: a breakpoint in a file's code, seen by every address space that maps the code, and never by the file.

A page with a breakpoint is a private copy, as after a write, also where the mapping may not be written:

    register    every mapping that has the code: [page] is told where a page of the file is replaced by its copy
    mmap        of the code later on: the copy is there from the start, and nobody has anything to let go of
    unregister  [page] is told; a copy that is equal to the file's page again goes, and the next access maps the file

Kernel: kernel/events/uprobes.c, v6.18; up to v6.15 the copy itself was put in the old page's place (__replace_page).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.fault import continue_fault, fault_page
from mmubusd.mm.frame import ANON, EXCLUSIVE, PINNED, READING
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import DIRTY, PFN_SHIFT, SOFT_DIRTY, WRITE
from mmubusd.mm.vma import VM_SHARED, VM_WRITE, Vma
from mmubusd.mm.zap import Gather, zap_page

if TYPE_CHECKING:
    from mmubusd.mm.file import File
    from mmubusd.mm.mm import Mm

BREAKPOINT = b"\xcc"
"""int3, x86."""

Place = tuple["Mm", int, int]
"""An address space, a page number in it, and the offset of the breakpoint in the page."""


def register(file: File, offset: int) -> Operation[int]:
    """Put a breakpoint at this byte of the file's code. Returns: how many mappings have it now.

    Raises: MmError EINVAL: no byte of the file, or a file without pages of its own; EEXIST.
    """
    if not 0 <= offset < file.size or file.kind not in ("disk", "shm"):
        raise MmError("EINVAL", f"offset {offset} of file {file.id} ({file.kind}, {file.size} bytes)")
    probes = file.memory.uprobes.setdefault(file.id, {})
    if offset in probes:
        raise MmError("EEXIST", f"there is a breakpoint at offset {offset} of file {file.id}")
    probes[offset] = file.memory.read_file(file.id, offset, 1)
    done = 0
    for place in _places(file, offset, writable=False):
        done += yield from place[0].locked(_install(*place), _page(place))
    return done


def unregister(file: File, offset: int) -> Operation[int]:
    """Take it away again. Returns: how many mappings had it. Raises: MmError ENOENT."""
    probes = file.memory.uprobes.get(file.id, {})
    if offset not in probes:
        raise MmError("ENOENT", f"there is no breakpoint at offset {offset} of file {file.id}")
    original = probes.pop(offset)
    done = 0
    for place in _places(file, offset, writable=True):
        done += yield from place[0].locked(_remove(*place, original), _page(place))
    return done


def install(mm: Mm, vma: Vma) -> Operation[None]:
    """The code has just been mapped. Requires: its range lock. Kernel: uprobe_mmap()."""
    if vma.file is not None and not vma.flags & (VM_SHARED | VM_WRITE):
        for offset in sorted(mm.memory.uprobes.get(vma.file.id, {})):
            if vma.pgoff <= offset >> PAGE_SHIFT < vma.pgoff + vma.pages:
                vpn = vma.address_of(offset >> PAGE_SHIFT) >> PAGE_SHIFT
                yield from _install(mm, vpn, offset & PAGE_SIZE - 1)


def _page(place: Place) -> tuple[int, int]:
    return place[1] << PAGE_SHIFT, (place[1] + 1) << PAGE_SHIFT


def _places(file: File, offset: int, *, writable: bool) -> list[Place]:
    """The mappings of the code, the last found first. Kernel: build_map_info(), valid_vma()."""
    unwanted = VM_SHARED if writable else VM_SHARED | VM_WRITE
    index = offset >> PAGE_SHIFT
    vmas = [vma for vma in file.rmap.overlapping(index, index + 1) if not vma.flags & unwanted]
    return [(vma.mm, vma.address_of(index) >> PAGE_SHIFT, offset & PAGE_SIZE - 1) for vma in reversed(vmas)]


def _private_copy(mm: Mm, vpn: int) -> Operation[int]:
    """As a write, whatever the mapping allows (FOLL_FORCE). Returns: the frame, 0 when nothing is mapped any more."""
    while True:
        vma = mm.vmas.find(vpn << PAGE_SHIFT)
        if vma is None or vma.file is None or vma.flags & VM_SHARED:
            return 0
        if fault_page(mm, vma, vpn, True):
            pte = mm.pgtable.get(vpn)
            if not vma.flags & VM_WRITE:
                mm.pgtable.set(vpn, pte & ~WRITE)
            return pte >> PFN_SHIFT
        yield from continue_fault(mm, vpn)


def _install(mm: Mm, vpn: int, at: int) -> Operation[int]:
    mm.memory.finish_reads()
    frames, pte = mm.memory.frames, mm.pgtable.get(vpn)
    pfn = pte >> PFN_SHIFT
    if not frames.flags_at[pfn] & ANON or not frames.flags_at[pfn] & EXCLUSIVE:
        pfn = yield from _private_copy(mm, vpn)
    if pfn:
        frames.write(pfn, at, BREAKPOINT)
        frames.set_dirty(pfn)
    return int(pfn != 0)


def _remove(mm: Mm, vpn: int, at: int, original: bytes) -> Operation[int]:
    """Kernel: uprobe_write(), __uprobe_write()."""
    address, frames = vpn << PAGE_SHIFT, mm.memory.frames
    while True:
        pfn = mm.pgtable.get(vpn) >> PFN_SHIFT
        if not frames.flags_at[pfn] & ANON or frames.read(pfn, at, 1) != BREAKPOINT:
            return 0
        if mm.notified:
            yield InvalidateRange(mm, address, address + PAGE_SIZE, Reason.CLEAR)
        if mm.pgtable.get(vpn) >> PFN_SHIFT == pfn and frames.flags_at[pfn] & EXCLUSIVE:
            break
        if not (yield from _private_copy(mm, vpn)):
            return 0
    frames.write(pfn, at, original)
    mm.pgtable.set(vpn, mm.pgtable.get(vpn) | DIRTY | SOFT_DIRTY)
    vma = mm.vmas.find(address)
    if vma is not None and _equals_the_file(vma, vpn, pfn):
        gather = Gather(mm.memory)
        zap_page(mm, vma, address, gather)
        gather.quarantine()
        yield from gather.finish()
    return 1


def _equals_the_file(vma: Vma, vpn: int, pfn: int) -> bool:
    """Whether the copy can go: nobody holds it, and the file's page is at hand. Kernel: orig_page_is_identical()."""
    frames, file = vma.mm.memory.frames, vma.file
    cached = file.cache.get(vma.linear_index(vpn << PAGE_SHIFT)) if file is not None else 0
    if not cached or frames.flags_at[pfn] & PINNED or pfn in frames.exports or frames.flags_at[cached] & READING:
        return False
    return frames.read(cached) == frames.read(pfn)
