"""mmap, munmap, brk, and where a mapping goes that names no address. Kernel: mm/mmap.c, mm/vma.c, v6.12 to v6.18."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm import hugetlb, limits, uprobe
from mmubusd.mm.addr import (
    MAX_LFS_FILESIZE,
    MMAP_MIN_ADDR,
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_SIZE,
    PTRS_PER_TABLE,
    TASK_SIZE,
    FileId,
    page_align,
)
from mmubusd.mm.errno import MmError
from mmubusd.mm.file import File
from mmubusd.mm.huge_memory import announce_splits
from mmubusd.mm.hugetlb import huge_align
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.populate import populate
from mmubusd.mm.vma import (
    VM_ACCESS_FLAGS,
    VM_ACCOUNT,
    VM_DONTEXPAND,
    VM_GROWSDOWN,
    VM_HUGETLB,
    VM_LOCKED,
    VM_LOCKED_MASK,
    VM_NOHUGEPAGE,
    VM_NORESERVE,
    VM_READ,
    VM_SHARED,
    VM_SYNC,
    VM_WRITE,
    Vma,
)
from mmubusd.mm.vma_merge import isolate, merge_new
from mmubusd.mm.zap import Gather, announce, destroy_orphans, unmap_region, zap_ahead

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_TYPE = 0x1, 0x2, 0x3, 0xF
MAP_FIXED, MAP_ANONYMOUS, MAP_32BIT, MAP_GROWSDOWN = 0x10, 0x20, 0x40, 0x100
MAP_LOCKED, MAP_NORESERVE, MAP_POPULATE, MAP_NONBLOCK = 0x2000, 0x4000, 0x8000, 0x10000
MAP_STACK, MAP_HUGETLB, MAP_SYNC, MAP_FIXED_NOREPLACE = 0x20000, 0x40000, 0x80000, 0x100000
FLAGS = ((MAP_GROWSDOWN, VM_GROWSDOWN), (MAP_LOCKED, VM_LOCKED), (MAP_SYNC, VM_SYNC), (MAP_STACK, VM_NOHUGEPAGE))
MAP_HUGE_SHIFT, MAP_HUGE_MASK, HUGE_2MB, HUGE_1GB = 26, 0x3F, 21, 30
LEGACY_MAP_MASK = 0x3 | 0x10 | 0x20 | 0x40 | 0x80 | 0x100 | 0x1800 | 0xE000 | 0x30000 | 0x40000 | 0x1F << MAP_HUGE_SHIFT
"""What MAP_SHARED_VALIDATE lets pass."""

STACK_GUARD_GAP = 256 << PAGE_SHIFT
BOTTOM_UP_BASE = TASK_SIZE // 3 & PAGE_MASK
LOW_32BIT = (0x40000000, 0x80000000)


def mmap(mm: Mm, addr: int, length: int, prot: int, flags: int, fd: int, offset: int) -> Operation[int]:
    """mmap(2). Kernel: do_mmap(), mmap_region(). Returns: the address."""
    if offset % PAGE_SIZE:
        raise MmError("EINVAL", f"offset {offset:#x} is not page-aligned")
    file = None if flags & MAP_ANONYMOUS else mm.memory.file(FileId(fd))
    if file is not None and file.kind == "hugetlb":
        return (yield from _mmap_hugetlb(mm, addr, length, prot, flags, file, offset >> PAGE_SHIFT))
    if not flags & MAP_HUGETLB:
        return (yield from map_file(mm, addr, length, prot, flags, file, offset >> PAGE_SHIFT))
    if file is not None:
        raise MmError("EINVAL", f"MAP_HUGETLB of file {file.id}, which is not of hugetlbfs")
    order = flags >> MAP_HUGE_SHIFT & MAP_HUGE_MASK
    if order not in (0, HUGE_2MB):
        errno = "ENOMEM" if order == HUGE_1GB else "EINVAL"
        raise MmError(errno, f"huge pages of 2^{order} bytes: there are only those of 2 MiB")
    file = mm.memory.new_shared_memory(huge_align(length) % (1 << 64), "hugetlb", mm.memcg)
    return (yield from _mmap_hugetlb(mm, addr, length, prot, flags, file, offset >> PAGE_SHIFT))


def _mmap_hugetlb(mm: Mm, addr: int, length: int, prot: int, flags: int, file: File, pgoff: int) -> Operation[int]:
    """mmap() of a file of hugetlbfs."""
    return map_used_file(mm, addr, huge_align(length) % (1 << 64), prot, flags, file, pgoff)


def map_used_file(mm: Mm, addr: int, length: int, prot: int, flags: int, file: File, pgoff: int) -> Operation[int]:
    """map_file() of one that may be mapped nowhere else. What has lost its last mapping goes at the end of the call."""
    failed = None
    with file_in_use(file):
        try:
            addr = yield from map_file(mm, addr, length, prot, flags, file, pgoff)
        except MmError as error:
            failed = error
    yield from destroy_orphans(mm.memory)
    if failed is not None:
        raise failed
    return addr


def map_file(mm: Mm, addr: int, length: int, prot: int, flags: int, file: File | None, pgoff: int) -> Operation[int]:
    """mmap() of a file that is known already. Kernel: do_mmap(), __get_unmapped_area()."""
    if length == 0:
        raise MmError("EINVAL", "length 0")
    if flags & MAP_FIXED_NOREPLACE:
        flags |= MAP_FIXED
    if not flags & MAP_FIXED:
        addr = addr & PAGE_MASK and max(addr & PAGE_MASK, MMAP_MIN_ADDR)
    length = page_align(length)
    limits.check_map_count(mm)
    if length > TASK_SIZE:
        raise MmError("ENOMEM", f"length {length:#x} is larger than an address space")
    if flags & MAP_FIXED:
        if file is not None and file.kind == "hugetlb" and addr % PMD_SIZE:
            raise MmError("EINVAL", f"address {addr:#x} is not aligned to huge pages")
        if addr > TASK_SIZE - length:
            raise MmError("ENOMEM", f"[{addr:#x}, +{length:#x}) is outside the address space")
        if addr % PAGE_SIZE:
            raise MmError("EINVAL", f"address {addr:#x} is not page-aligned")
        if addr < MMAP_MIN_ADDR:
            raise MmError("EPERM", f"address {addr:#x} is below {MMAP_MIN_ADDR:#x}")
        yield from mm.locked(_map(mm, addr, length, prot, flags, file, pgoff), (addr, addr + length))
        return addr
    while True:
        chosen = get_unmapped_area(mm, addr, length, flags, file, pgoff)
        if (yield from mm.locked(_map(mm, chosen, length, prot, flags, file, pgoff), (chosen, chosen + length))):
            return chosen


def _asked_flags(mm: Mm, prot: int, flags: int) -> int:
    """Kernel: calc_vm_prot_bits(), calc_vm_flag_bits(), mm->def_flags."""
    vm_flags = prot & VM_ACCESS_FLAGS | mm.default_flags
    for flag, vm_flag in FLAGS:
        if flags & flag:
            vm_flags |= vm_flag
    return vm_flags


def _checked_flags(vm_flags: int, length: int, flags: int, file: File | None, pgoff: int) -> int:
    """What is mapped with these flags, if that can be."""
    kind = flags & MAP_TYPE
    if file is not None:
        room = MAX_LFS_FILESIZE - length
        if room < 0 or pgoff > room >> PAGE_SHIFT:
            raise MmError("EOVERFLOW", f"offset {pgoff << PAGE_SHIFT:#x} + length {length:#x} is too large")
    if kind not in (MAP_SHARED, MAP_PRIVATE) and not (kind == MAP_SHARED_VALIDATE and file is not None):
        raise MmError("EINVAL", f"map type {kind} is not known here")
    synchronous = MAP_SYNC if file is not None and file.kind in ("disk", "xip") else 0
    if kind == MAP_SHARED_VALIDATE and flags & ~(LEGACY_MAP_MASK | synchronous):
        raise MmError("EOPNOTSUPP", f"flags {flags:#x} are not all supported")
    if kind != MAP_PRIVATE:
        vm_flags |= VM_SHARED
    if vm_flags & VM_GROWSDOWN and (file is not None or vm_flags & VM_SHARED):
        raise MmError("EINVAL", "only private anonymous memory grows down")
    return vm_flags | (VM_NORESERVE if flags & MAP_NORESERVE else 0)


def _map(mm: Mm, addr: int, length: int, prot: int, flags: int, file: File | None, pgoff: int) -> Operation[bool]:
    """Map at the address under its range lock; false if it must be free and has been taken meanwhile."""
    end = addr + length
    if not flags & MAP_FIXED and mm.vmas.intersects(addr, end):
        return False
    if flags & MAP_FIXED_NOREPLACE and mm.vmas.intersects(addr, end):
        raise MmError("EEXIST", f"something is mapped in [{addr:#x}, {end:#x})")
    if flags & MAP_LOCKED:
        limits.check_may_lock(mm)
    vm_flags = _asked_flags(mm, prot, flags)
    limits.check_locked(mm, vm_flags, length)
    vm_flags = _checked_flags(vm_flags, length, flags, file, pgoff)
    populated = vm_flags & VM_LOCKED or flags & (MAP_POPULATE | MAP_NONBLOCK) == MAP_POPULATE
    if file is not None and file.kind == "hugetlb":
        vm_flags = vm_flags & ~VM_LOCKED_MASK | VM_HUGETLB | VM_DONTEXPAND
    if limits.are_set(mm):
        yield from _check_limits(mm, addr, end, vm_flags)
    if vm_flags & (VM_HUGETLB | VM_NORESERVE | VM_SHARED | VM_WRITE) == VM_WRITE:
        vm_flags |= VM_ACCOUNT
    if file is not None and vm_flags & VM_HUGETLB:
        yield from _insert_hugetlb(Vma(mm, addr, end, vm_flags, pgoff, file))
    else:
        if mm.vmas.intersects(addr, end):
            yield from _unmap(mm, addr, end)
        if vm_flags & VM_SYNC and file is not None and file.kind == "disk":
            raise MmError("EOPNOTSUPP", "MAP_SYNC needs a file that is mapped as it lies on the medium")
        _insert(mm, addr, end, vm_flags, pgoff, file)
    if file is not None and file.id in mm.memory.uprobes and (vma := mm.vmas.find(addr)) is not None:
        yield from uprobe.install(mm, vma)
    if populated:
        yield from populate(mm, addr, end)
    return True


def _check_limits(mm: Mm, addr: int, end: int, vm_flags: int) -> Operation[None]:
    """Whether there may be so much more; what is to be replaced is cut out first. Kernel: __mmap_setup()."""
    replaced = yield from _isolated(mm, addr, end)
    limits.check_expand(mm, vm_flags, end - addr - sum(vma.end - vma.start for vma in replaced))
    if vm_flags & (VM_HUGETLB | VM_NORESERVE | VM_SHARED | VM_WRITE) == VM_WRITE:
        accounted = sum(vma.pages for vma in replaced if vma.flags & VM_ACCOUNT)
        limits.check_commit(mm.memory, (end - addr >> PAGE_SHIFT) - accounted)


def _insert(mm: Mm, addr: int, end: int, vm_flags: int, pgoff: int, file: File | None) -> None:
    """Map what is free, merged with the neighbours if they fit."""
    if file is None:
        if vm_flags & VM_SHARED:
            file, pgoff = mm.memory.new_shared_memory(end - addr, memcg=mm.memcg), 0
        else:
            pgoff = addr >> PAGE_SHIFT
    if merge_new(mm, addr, end, vm_flags, pgoff, file) is None:
        mm.vmas.insert(Vma(mm, addr, end, vm_flags, pgoff, file))


def _insert_hugetlb(vma: Vma) -> Operation[None]:
    """Unmap what is there, reserve, and map. When that fails a gap is left, and told of once more.

    Kernel: hugetlbfs_file_mmap(). Raises: MmError EINVAL, ENOMEM.
    """
    mm, start, end, file = vma.mm, vma.start, vma.end, vma.file
    assert file is not None, "hugetlb memory is a file's"
    replaced = [each.file for each in mm.vmas.overlapping(start, end) if each.file is not None]
    with file_in_use(*replaced):
        if mm.vmas.intersects(start, end):
            yield from _unmap(mm, start, end)
        try:
            if vma.pgoff % PTRS_PER_TABLE:
                raise MmError("EINVAL", f"offset {vma.pgoff << PAGE_SHIFT:#x} is not aligned to huge pages")
            hugetlb.reserve(vma)
        except MmError:
            if mm.notified:
                yield InvalidateRange(mm, start, end, Reason.UNMAP)
            raise
    if vma.flags & VM_WRITE:
        file.size = max(file.size, vma.pgoff + vma.pages << PAGE_SHIFT)
    mm.vmas.insert(vma)


class file_in_use:
    """Keeps files without a name alive while none of their mappings exists."""

    def __init__(self, *files: File) -> None:
        self._files = files

    def __enter__(self) -> None:
        for file in self._files:
            file.users_nr += 1

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.release_user()


def munmap(mm: Mm, start: int, length: int) -> Operation[int]:
    """munmap(2)."""
    if start % PAGE_SIZE:
        raise MmError("EINVAL", f"address {start:#x} is not page-aligned")
    if start > TASK_SIZE or length > TASK_SIZE - start:
        raise MmError("EINVAL", f"[{start:#x}, +{length:#x}) is outside the address space")
    if length == 0:
        raise MmError("EINVAL", "length 0")
    end = start + page_align(length)
    yield from mm.locked(unmap(mm, start, end), (start, end))
    return 0


def unmap(mm: Mm, start: int, end: int) -> Operation[None]:
    """munmap() under the range lock; nothing happens where nothing is mapped. Kernel: do_vmi_munmap()."""
    if mm.vmas.intersects(start, end):
        yield from _unmap(mm, start, end)


def _unmap(mm: Mm, start: int, end: int) -> Operation[None]:
    gather = Gather(mm.memory)
    vmas = yield from _isolated(mm, start, end)
    yield from zap_ahead(mm, start, end, gather)
    if gather:
        try:
            vmas = yield from _isolated(mm, start, end)  # a neighbour may have merged with one meanwhile
        except MmError:
            yield from announce(mm, start, end, Reason.CLEAR, gather)
            raise
    unmap_region(mm, vmas, start, end, gather)
    yield from announce(mm, start, end, Reason.UNMAP, gather)


def _isolated(mm: Mm, start: int, end: int) -> Operation[list[Vma]]:
    """isolate(), and telling of what it has cut. Raises: MmError ENOMEM."""
    while True:
        try:
            vmas = isolate(mm, start, end)
        except MmError:
            yield from announce_splits(mm)
            raise
        if not mm.split_blocks:
            return vmas
        yield from announce_splits(mm)


def get_unmapped_area(mm: Mm, hint: int, length: int, flags: int, file: File | None = None, pgoff: int = 0) -> int:
    """A free range for a mapping of the file, or of private memory, or with MAP_SHARED of shared memory.

    Kernel: __get_unmapped_area(). Raises: MmError ENOMEM.
    """
    kind = file.kind if file is not None else "shm" if flags & MAP_SHARED else "private"
    if kind == "hugetlb":
        return _hugetlb_area(mm, hint, length, flags)
    if kind in ("disk", "xip") or (kind == "private" and not hint and length % PMD_SIZE == 0):
        found = _thp_area(mm, hint, length, flags, pgoff << PAGE_SHIFT if file is not None else 0)
    else:
        found = 0
    found = found or _area(mm, hint, length, flags)
    if not found:
        raise MmError("ENOMEM", f"no free range of {length:#x} bytes")
    return found


def _hugetlb_area(mm: Mm, hint: int, length: int, flags: int) -> int:
    """At a multiple of a huge page; a free range must be larger by as much as that may cost."""
    found = _area(mm, huge_align(hint), length, flags) if hint else 0
    if found % PMD_SIZE or not found:
        found = _area(mm, 0, length + PMD_SIZE - PAGE_SIZE, flags)
    if not found:
        raise MmError("ENOMEM", f"no free range of {length:#x} bytes in huge pages")
    return huge_align(found)


def _thp_area(mm: Mm, hint: int, length: int, flags: int, offset: int) -> int:
    """Where blocks of the file can be mapped by huge pages, if any fits in; 0: nowhere.

    Kernel: __thp_get_unmapped_area(), mm/huge_memory.c.
    """
    if offset + length - huge_align(offset) < PMD_SIZE:
        return 0
    found = _area(mm, hint, length + PMD_SIZE, flags)
    if not found or found == hint:
        return found
    return found + ((offset - found) % PMD_SIZE or PMD_SIZE)


def _area(mm: Mm, hint: int, length: int, flags: int) -> int:
    """At the hint, or the highest below mmap_base; 0: nowhere. Kernel: arch_get_unmapped_area_topdown()."""
    if flags & MAP_32BIT:
        low, end = LOW_32BIT
        if hint and hint <= end - length and _is_free(mm, hint, length):
            return hint
        return _lowest(mm, low, end, length)
    if hint and hint <= TASK_SIZE - length and _is_free(mm, hint, length):
        return hint
    return _highest(mm, MMAP_MIN_ADDR, mm.mmap_base, length) or _lowest(mm, BOTTOM_UP_BASE, TASK_SIZE, length)


def _start_gap(vma: Vma) -> int:
    """Where the room that the VMA claims begins. Kernel: vm_start_gap()."""
    return vma.start - STACK_GUARD_GAP if vma.flags & VM_GROWSDOWN else vma.start


def _is_free(mm: Mm, start: int, length: int) -> bool:
    after = mm.vmas.find_from(start)
    return after is None or start + length <= _start_gap(after)


def _highest(mm: Mm, low: int, high: int, length: int) -> int:
    top = high
    for vma in reversed(mm.vmas.overlapping(low, 1 << 47)):
        if vma.end < top and top - max(vma.end, low) >= length:
            return top - length
        top = min(top, _start_gap(vma))
    return top - length if top - low >= length else 0


def _lowest(mm: Mm, low: int, high: int, length: int) -> int:
    at = low
    for vma in mm.vmas.overlapping(low, high):
        if _start_gap(vma) - at >= length:
            return at
        at = max(at, vma.end)
    return at if high - at >= length else 0


def brk(mm: Mm, addr: int) -> Operation[int]:
    """brk(2): move the program break. Returns: where it is afterwards; it has not moved if that was not possible."""
    old, new = page_align(mm.brk_end), page_align(addr)
    if addr < mm.brk_start or not mm.brk_start or new > TASK_SIZE:
        return mm.brk_end
    before = mm.brk_end
    try:
        limits.check_data(mm, addr - mm.brk_start)
        if new != old:
            yield from mm.locked(_move_brk(mm, old, new, addr), (min(old, new), max(old, new)))
        else:
            mm.brk_end = addr
    except MmError as error:
        if error.errno == "ESRCH":
            raise
        mm.brk_end = before
    return mm.brk_end


def _move_brk(mm: Mm, old: int, new: int, addr: int) -> Operation[None]:
    """Kernel: sys_brk(), do_brk_flags()."""
    if new <= old:
        vma = mm.vmas.find_from(new)
        if vma is not None and vma.start < old:
            mm.brk_end = addr
            yield from _unmap(mm, new, old)
        return
    limits.check_locked(mm, mm.default_flags, new - old)
    after = mm.vmas.find_from(old)
    if after is not None and new + PAGE_SIZE > _start_gap(after):
        return
    flags = VM_READ | VM_WRITE | VM_ACCOUNT | mm.default_flags
    limits.check_expand(mm, flags, new - old)
    limits.check_commit(mm.memory, (new - old) >> PAGE_SHIFT)
    if len(mm.vmas) > mm.memory.max_map_count:
        return
    before, _ = mm.vmas.neighbours(old, new)
    if before is None or before.end != old or merge_new(mm, old, new, flags, old >> PAGE_SHIFT, None) is None:
        mm.vmas.insert(Vma(mm, old, new, flags, old >> PAGE_SHIFT, None))
    mm.brk_end = addr
    if flags & VM_LOCKED:
        yield from populate(mm, old, new)
