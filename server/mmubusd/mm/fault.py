"""Page faults: what an access finds, and what it makes.

A fault that needs no notification is plain code (`fault_page`): a new anonymous page, the zero page, a file page, the
reuse of a page that nobody else has. Only copy-on-write under a notifier is an operation (`copy_on_write`): everyone
lets go of the old page before the new one becomes visible, so the old one is never written behind anyone's back.

        CPU                                   device
        write fault on a shared page
        yield InvalidateRange(page)  ──────►  drops its translation, acks
        copy the bytes, set the new PTE
                                              faults again: gets the new page
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm import (
    filemap,
    folio,
    huge_memory,
    hugetlb_fault,
    limits,
    migrate,
    migrate_device,
    numa_balancing,
    writeback,
    xip,
)
from mmubusd.mm.addr import MMAP_MIN_ADDR, PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.anon import new_anon_frame, prepare_anon_vma
from mmubusd.mm.errno import MmError
from mmubusd.mm.file import File
from mmubusd.mm.frame import ANON, CACHE, EXCLUSIVE, EXTERNAL, HWPOISON, KSM, LRU, ORDER_MASK, SWAPCACHE
from mmubusd.mm.free_frames import OutOfFrames
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import (
    ACCESSED,
    LEAF_MASK,
    LEAF_SHIFT,
    NEW_PTE,
    NUMA_HINT,
    PFN_SHIFT,
    PRESENT,
    PUD_SHIFT,
    UFFD_WP,
    WRITE,
    WRITTEN_PTE,
    ZERO_PTE,
    Leaf,
)
from mmubusd.mm.swapin import do_swap_page
from mmubusd.mm.swapops import (
    DEVICE_EXCLUSIVE,
    DEVICE_PRIVATE,
    ENTRY_ALONE,
    HWPOISON_ENTRY,
    MIGRATION,
    SWAP,
    kind,
    restored,
)
from mmubusd.mm.vma import (
    VM_ACCESS_FLAGS,
    VM_EXEC,
    VM_GROWSDOWN,
    VM_HUGETLB,
    VM_READ,
    VM_SHARED,
    VM_UFFD_ASYNC,
    VM_UFFD_MINOR,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
    VM_WRITE,
    Vma,
)
from mmubusd.mm.vmscan import make_room
from mmubusd.mm.zap import evict_exports
from mmubusd.mm.zonelist import bound, room

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

RIGHTS = {"read": VM_READ | VM_WRITE | VM_EXEC, "write": VM_WRITE, "execute": VM_READ | VM_WRITE | VM_EXEC}
"""What a VMA must allow, one of these, for a page to be brought. Kernel: access_error(), arch/x86/mm/fault.c."""

STACK_GUARD_GAP = 256 << PAGE_SHIFT


def access_nowait(mm: Mm, vpn: int, access: str) -> bool:
    """One access, as far as it goes without telling anyone.

    Returns: whether it is done; if not, continue_fault() is due.
    Raises: MmError EFAULT (SIGSEGV), ENXIO (SIGBUS), ENOMEM.
    """
    address = vpn << PAGE_SHIFT
    vma = mm.vmas.find(address)
    if vma is None:
        vma = expand_stack(mm, address)
    if not vma.flags & RIGHTS[access]:
        raise MmError("EFAULT", f"{access} at {address:#x}: the mapping is {vma.prot_string()}")
    done = fault_page(mm, vma, vpn, access == "write")
    if access == "execute" and not vma.flags & VM_EXEC:
        raise MmError("EFAULT", f"execute at {address:#x}: the mapping is {vma.prot_string()}")
    return done


def access_page(mm: Mm, vpn: int, access: str) -> Operation[None]:
    """One access to the end. Requires: the range lock of its page is held."""
    while not access_nowait(mm, vpn, access):
        yield from continue_fault(mm, vpn)


def expand_stack(mm: Mm, address: int) -> Vma:
    """Nothing is mapped at the address: let a stack above grow down to it. Kernel: expand_stack(), expand_downwards().

    Raises: MmError EFAULT.
    """
    vma = mm.vmas.find_from(address)
    if vma is None or not vma.flags & VM_GROWSDOWN:
        raise MmError("EFAULT", f"nothing is mapped at {address:#x}")
    start = address & -PAGE_SIZE
    if start < MMAP_MIN_ADDR:
        raise MmError("EFAULT", f"the stack may not grow to {address:#x}: it is below {MMAP_MIN_ADDR:#x}")
    before, _ = mm.vmas.neighbours(vma.start, vma.end)
    other = before is not None and not before.flags & VM_GROWSDOWN and before.flags & VM_ACCESS_FLAGS
    if before is not None and other and start - before.end < STACK_GUARD_GAP:
        raise MmError("EFAULT", f"the stack may not grow to {address:#x}: another mapping is too near")
    prepare_anon_vma(vma)  # also of one that may not be written to
    grow = (vma.start - start) >> PAGE_SHIFT
    _account_growth(mm, vma, grow)
    if (mm.stack_limit is not None and vma.end - start > mm.stack_limit) or grow > vma.pgoff:
        raise MmError("EFAULT", f"the stack may not grow to {address:#x}: it is limited to {mm.stack_limit} bytes")
    mm.vmas.set_range(vma, start, vma.end, vma.pgoff - grow)
    return vma


def _account_growth(mm: Mm, vma: Vma, pages: int) -> None:
    """Whether the limits allow a stack to grow. Kernel: acct_stack_growth(). Raises: MmError EFAULT."""
    try:
        limits.check_expand(mm, vma.flags, pages << PAGE_SHIFT)
        limits.check_locked(mm, vma.flags, pages << PAGE_SHIFT)
        limits.check_commit(mm.memory, pages)
    except MmError as error:
        raise MmError("EFAULT", f"the stack at {vma.start:#x} may not grow: {error.message}") from error


def fault_page(mm: Mm, vma: Vma, vpn: int, write: bool) -> bool:
    """Make the page accessible; the VMA allows the access. Kernel: handle_mm_fault().

    Returns: whether it is done; if not, continue_fault() is due.
    Raises: MmError ENXIO (SIGBUS), ENOMEM.
    """
    leaf = mm.pgtable.leaves.get(vpn >> LEAF_SHIFT)
    pte = leaf.at[vpn & LEAF_MASK] if leaf is not None else 0
    if pte & PRESENT:
        assert leaf is not None
        if not write:
            if not pte & ACCESSED:
                if pte & NUMA_HINT:
                    return numa_balancing.settle(mm, vpn)
                leaf.at[vpn & LEAF_MASK] = pte | ACCESSED
            return True
        if pte & NUMA_HINT:
            return numa_balancing.settle(mm, vpn) and fault_page(mm, vma, vpn, write)
        if leaf.huge:
            if not pte & WRITE:
                return (hugetlb_fault.write_protected if vma.flags & VM_HUGETLB else huge_memory.reuse)(mm, vma, leaf)
            huge_memory.touch_pmd(leaf)
            return True
        if pte & WRITE:
            leaf.at[vpn & LEAF_MASK] = pte | WRITTEN_PTE
            return True
    if mm.unstable:
        raise MmError("ENXIO", f"address space {mm.id} was killed, and parts of it are gone")
    mm.short_of = None
    try:
        if leaf is None:
            mm.pgtable.check_room()
            mm.pgtable.puds.add(vpn >> PUD_SHIFT)
        if pte & PRESENT:
            return _write_protected(mm, vma, vpn, pte)
        if pte:
            return _not_present(mm, vma, vpn, pte, write)
        if vma.file is None:
            if vma.flags & VM_UFFD_MISSING:
                _ask_userfaultfd(vma, vpn, write)
            if leaf is not None or not huge_memory.suitable(mm, vma, vpn) or not huge_memory.fault(mm, vma, vpn, write):
                _anonymous(mm, vma, vpn, write, leaf)
            return True
        return _file(mm, vma, vpn, write)
    except OutOfFrames as error:
        mm.short_of = error
        return False


def _not_present(mm: Mm, vma: Vma, vpn: int, entry: int, write: bool) -> bool:
    """The page is elsewhere. Kernel: do_swap_page()."""
    if kind(entry) == HWPOISON_ENTRY:
        raise MmError("ENXIO", f"page {vpn << PAGE_SHIFT:#x} is lost: its frame {entry >> PFN_SHIFT} has failed")
    if kind(entry) != SWAP:
        return False
    if write and not entry & ENTRY_ALONE:
        _check_room(mm, vpn, 2)
    pte = do_swap_page(mm, vma, vpn, entry, write)
    return not write or pte & WRITE != 0 or _write_protected(mm, vma, vpn, pte)


def _check_room(mm: Mm, vpn: int, own: int, file: File | None = None) -> None:
    """Before a fault that takes more than one frame: what it took first could be reclaimed for want of the others.

    Args: own: of private memory; file: one of the cache of this file. A page table that is missing is counted, too.
    Raises: OutOfFrames.
    """
    frames, cached = mm.memory.frames, int(file is not None)
    if frames.free_nr < own + cached:
        raise OutOfFrames("ENOMEM", f"{own + cached} frames wanted, {frames.free_nr} free", None, own + cached)
    if mm.memcg is not None:
        own += vpn >> LEAF_SHIFT not in mm.pgtable.leaves
        mm.memcg.check(own + (cached if file is not None and file.memcg is mm.memcg else 0))
    if file is not None and file.memcg is not None and file.memcg is not mm.memcg:
        file.memcg.check(1)


def _ask_userfaultfd(vma: Vma, vpn: int, write: bool) -> None:
    """Whether somebody else is to supply the page, or the page table's entry. Kernel: handle_userfault()."""
    index = vma.pgoff + vpn - (vma.start >> PAGE_SHIFT)
    cached = vma.file is not None and (vma.file.cache.get(index) != 0 or index in vma.file.swapped)
    if vma.flags & (VM_UFFD_MINOR if cached else VM_UFFD_MISSING):
        vma.mm.pgtable.leaf(vpn)
        if write and not vma.shared:
            prepare_anon_vma(vma)  # the kernel asks when it has made everything but the page
        raise MmError("ENXIO", f"page {vpn << PAGE_SHIFT:#x} is to be supplied by a userfaultfd")


def _anonymous(mm: Mm, vma: Vma, vpn: int, write: bool, leaf: Leaf | None) -> None:
    """Kernel: do_anonymous_page()."""
    if leaf is None and mm.memcg is not None:
        _check_room(mm, vpn, int(write))
    pte = new_anon_frame(mm, vma, vpn) << PFN_SHIFT | NEW_PTE if write else ZERO_PTE
    (leaf or mm.pgtable.leaf(vpn)).at[vpn & LEAF_MASK] = pte


def _file(mm: Mm, vma: Vma, vpn: int, write: bool) -> bool:
    """Kernel: do_read_fault(), do_cow_fault(), do_shared_fault()."""
    file = vma.file
    assert file is not None
    if vma.flags & VM_HUGETLB:
        return hugetlb_fault.fault(mm, vma, vpn << PAGE_SHIFT, write)
    private_copy = write and not vma.flags & VM_SHARED
    index = vma.pgoff + vpn - (vma.start >> PAGE_SHIFT)
    if private_copy:
        prepare_anon_vma(vma)
        _check_room(mm, vpn, 1, file if not file.cache.get(index) else None)
    if file.kind == "xip":
        return xip.fault(mm, vma, vpn, index, write)
    tried = False
    while True:
        if not write and not vma.flags & (VM_UFFD_WP | VM_UFFD_MINOR) and filemap.map_pages(mm, vma, vpn):
            return True
        if vma.flags & (VM_UFFD_MISSING | VM_UFFD_MINOR):
            _ask_userfaultfd(vma, vpn, write)
        if index >= file.pages:
            raise MmError("ENXIO", f"page {index} of file {file.id} is past its end ({file.size} bytes)")
        if not filemap.get_page(vma, index, tried):
            break
        tried = True
    if _is_failed(file, index):
        return False
    if private_copy:
        pfn = new_anon_frame(mm, vma, vpn)
        mm.memory.frames.copy(file.cache.get(index), pfn)
        mm.pgtable.set(vpn, pfn << PFN_SHIFT | NEW_PTE)
    elif write:
        file.set_dirty(index)
        filemap.map_fault(mm, vma, vpn, index, NEW_PTE)
    else:
        filemap.map_fault(mm, vma, vpn, index, filemap.clean_pte_flags(vma))
    return True


def _is_failed(file: File, index: int) -> bool:
    """Whether the frame of a cached page has failed and the page is about to go, after which it is read in again.

    Raises: MmError ENXIO: shared memory has lost it.
    """
    pfn = file.cache.get(index)
    if not file.memory.frames.flags_at[pfn] & HWPOISON:
        return False
    if not file.memory.migrations.contended(pfn, pfn + 1):
        raise MmError("ENXIO", f"page {index} of file {file.id} is lost: its frame {pfn} has failed")
    return True


def _write_protected(mm: Mm, vma: Vma, vpn: int, pte: int) -> bool:
    """A write to a page that is mapped read-only. Kernel: do_wp_page()."""
    frames, pfn = mm.memory.frames, pte >> PFN_SHIFT
    if pte & UFFD_WP:
        if not vma.flags & VM_UFFD_ASYNC:
            raise MmError("ENXIO", f"page {vpn << PAGE_SHIFT:#x} is write-protected (userfaultfd)")
        pte &= ~UFFD_WP
        mm.pgtable.set(vpn, pte)
    if vma.flags & VM_SHARED:
        file = vma.file
        assert file is not None
        index = vma.pgoff + vpn - (vma.start >> PAGE_SHIFT)
        if file.kind == "xip":
            return xip.write_protected(mm, vma, vpn, index, pte)
        file.set_dirty(index)
        mm.pgtable.set(vpn, pte | WRITE | WRITTEN_PTE)
        return True
    if frames.flags_at[pfn] & ANON and (frames.flags_at[pfn] & EXCLUSIVE or _reusable(mm, vma, pfn)):
        mm.pgtable.set(vpn, pte | WRITE | WRITTEN_PTE)
        return True
    prepare_anon_vma(vma)
    if mm.notified or frames.flags_at[pfn] & EXTERNAL:
        return False
    copy_page(mm, vma, vpn, pte)
    return True


def _reusable(mm: Mm, vma: Vma, pfn: int) -> bool:
    """Whether nobody but this PTE has the page; then it is ours alone again. Kernel: wp_can_reuse_anon_folio()."""
    frames = mm.memory.frames
    if frames.flags_at[pfn] & ORDER_MASK:
        return _reusable_large(mm, pfn)
    if frames.flags_at[pfn] & KSM or frames.refcount_at[pfn] + frames.extra_references(pfn) > 3:
        return False
    if not frames.flags_at[pfn] & LRU:
        mm.memory.lru.drain()
    if frames.refcount_at[pfn] + frames.extra_references(pfn) > 1 + (frames.flags_at[pfn] & SWAPCACHE != 0):
        return False
    if not mm.memory.swap.forget(pfn):
        return False
    assert vma.anon_vma is not None, "a VMA with own pages has an anon_vma"
    frames.mapping_at[pfn] = vma.anon_vma.id
    frames.flags_at[pfn] |= EXCLUSIVE
    return True


def _reusable_large(mm: Mm, pfn: int) -> bool:
    """As _reusable, for a page of a large folio: this address space must have all that is mapped of it, and more than
    this page, whose copy lets the rest go otherwise. Kernel: __wp_can_reuse_large_anon_folio().
    """
    frames = mm.memory.frames
    if folio.mapcount(frames, pfn) <= 1 or folio.is_held(frames, pfn) or folio.mapped_shared(mm, pfn):
        return False
    frames.flags_at[pfn] |= EXCLUSIVE
    return True


def copy_page(mm: Mm, vma: Vma, vpn: int, pte: int) -> int:
    """Put a private copy in the place of what the PTE maps; the old frame, which has lost this mapping.

    Kernel: wp_page_copy().
    """
    frames, old = mm.memory.frames, pte >> PFN_SHIFT
    new = new_anon_frame(mm, vma, vpn)
    if old:
        frames.copy(old, new)
    mm.pgtable.set(vpn, new << PFN_SHIFT | (NEW_PTE if vma.flags & VM_WRITE else NEW_PTE & ~WRITE))
    if old:
        frames.mapcount_at[old] -= 1
        frames.put(old)
    return old


def continue_fault(mm: Mm, vpn: int) -> Operation[None]:
    """A fault could not be done at once: do what it must wait for.

    Requires: the page's range lock is held. The access is to be tried again afterwards, whatever has become of the
    page. Raises: MmError ENOMEM.
    """
    memory, pte, leaf = mm.memory, mm.pgtable.get(vpn), mm.pgtable.leaves.get(vpn >> LEAF_SHIFT)
    address = vpn << PAGE_SHIFT
    vma = mm.vmas.find(address)
    short_of, mm.short_of = mm.short_of, None
    if short_of is not None and (short_of.memcg is not None or short_of.wanted > 1):
        yield from make_room(memory, short_of.wanted, short_of.memcg)
    elif kind(pte) == MIGRATION:
        yield from migrate.wait(mm, pte)
    elif vma is not None and vma.flags & VM_HUGETLB:
        yield from hugetlb_fault.copy_on_write(mm, vma, address)
    elif not (room(vma, address) if vma is not None else memory.frames.free_nr):
        yield from make_room(memory, nodes=bound(vma, address) if vma is not None else None)
    elif kind(pte) == DEVICE_PRIVATE:
        yield from migrate_device.migrate_to_ram(mm, vpn)
    elif kind(pte) == DEVICE_EXCLUSIVE:
        yield from restore_exclusive(mm, vpn)
    elif pte & (PRESENT | NUMA_HINT) == PRESENT | NUMA_HINT:
        yield from numa_balancing.move(mm, vpn)
    elif vma is not None and vma.file is not None and not pte and _is_failed(vma.file, vma.linear_index(address)):
        yield from writeback.wait_for_failed(vma.file, vma.linear_index(address))
    elif vma is not None and vma.shared and vma.file is not None:
        yield from make_room(memory, 1, vma.file.memcg)
        yield from xip.fill_hole(vma.file, vma.linear_index(address))
    elif vma is not None and leaf is not None and leaf.huge:
        yield from huge_memory.copy_on_write(mm, vma, vpn)
    elif pte & PRESENT and memory.room(mm.memcg) < 1:
        yield from make_room(memory, 1, mm.memcg)
    elif pte & PRESENT:
        yield from copy_on_write(mm, vpn)


def copy_on_write(mm: Mm, vpn: int) -> Operation[None]:
    """Copy a page that others have too: they let go of the old page, then the new one becomes visible.

    Requires, afterwards: as continue_fault.
    """
    address = vpn << PAGE_SHIFT
    frames = mm.memory.frames
    pte = mm.pgtable.get(vpn)
    old = pte >> PFN_SHIFT
    frames.get(old)
    try:
        if mm.notified:
            yield InvalidateRange(mm, address, address + PAGE_SIZE, Reason.CLEAR)
        vma = mm.vmas.find(address)
        free = vma is not None and room(vma, address) > 0 and mm.memory.room(mm.memcg) > 0
        if vma is None or not free or mm.pgtable.get(vpn) | ACCESSED != pte | ACCESSED:
            return
        copy_page(mm, vma, vpn, pte)
        if frames.flags_at[old] & EXTERNAL and frames.mapcount_at[old] == 0 and not frames.flags_at[old] & CACHE:
            yield from evict_exports(mm.memory, [old])
    finally:
        frames.put(old)


def restore_exclusive(mm: Mm, vpn: int) -> Operation[None]:
    """A device has the page for itself: it gives that up, then the PTE is there again.

    Kernel: remove_device_exclusive_entry().
    """
    address, entry = vpn << PAGE_SHIFT, mm.pgtable.get(vpn)
    if mm.notified:
        yield InvalidateRange(mm, address, address + PAGE_SIZE, Reason.EXCLUSIVE)
    if mm.pgtable.get(vpn) == entry:
        mm.pgtable.set(vpn, restored(entry))
