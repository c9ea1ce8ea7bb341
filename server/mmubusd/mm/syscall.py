"""The table of all calls, by the name and the argument order of the mm-trace format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from mmubusd.mm.addr import FileId
from mmubusd.mm.errno import MmError
from mmubusd.mm.memory import Memory
from mmubusd.mm.mm import Mm
from mmubusd.mm.notification import Operation

Call = Callable[..., Operation[int] | Operation[bytes]]


def _fork(mm: Mm) -> Operation[int]:
    return (yield from mm.fork()).id


def _remap_file_pages(mm: Mm, addr: int, size: int, *rest: int) -> Operation[int]:
    """Random traces give three arguments: address, size, page offset."""
    if len(rest) == 1:
        return mm.remap_file_pages(addr, size, 0, rest[0])
    prot, pgoff, flags = rest
    return mm.remap_file_pages(addr, size, prot, pgoff, flags)


RANGES_MAX = 16
"""Of one process_madvise."""

MM_CALLS: dict[str, tuple[Call, tuple[int, ...]]] = {
    "mmap": (Mm.mmap, (6,)),
    "munmap": (Mm.munmap, (2,)),
    "mprotect": (Mm.mprotect, (3,)),
    "mremap": (Mm.mremap, (5,)),
    "madvise": (Mm.madvise, (3,)),
    "brk": (Mm.brk, (1,)),
    "msync": (Mm.msync, (3,)),
    "mlock": (Mm.mlock, (2,)),
    "mlock2": (Mm.mlock, (3,)),
    "munlock": (Mm.munlock, (2,)),
    "mlockall": (Mm.mlockall, (1,)),
    "munlockall": (Mm.munlockall, (0,)),
    "mseal": (Mm.mseal, (3,)),
    "setrlimit": (Mm.setrlimit, (2,)),
    "remap_file_pages": (_remap_file_pages, (3, 5)),
    "move_pages": (Mm.move_pages, (3,)),
    "process_madvise": (Mm.process_madvise, tuple(range(4, 2 + 2 * RANGES_MAX + 1, 2))),
    "migrate_pages": (Mm.migrate_pages, (2,)),
    "mbind": (Mm.mbind, (5,)),
    "set_mempolicy": (Mm.set_mempolicy, (2,)),
    "get_mempolicy": (Mm.get_mempolicy, (2,)),
    "set_mempolicy_home_node": (Mm.set_mempolicy_home_node, (4,)),
    "clear_refs": (Mm.clear_refs, (1,)),
    "uffd_writeprotect": (Mm.uffd_writeprotect, (3, 4)),
    "idle_scan": (Mm.idle_scan, (3,)),
    "numa_scan": (Mm.numa_scan, (3,)),
    "pagemap_scan": (Mm.pagemap_scan, (4,)),
    "uffd_register": (Mm.uffd_register, (4,)),
    "uffd_unregister": (Mm.uffd_unregister, (3,)),
    "uffd_move": (Mm.uffd_move, (5,)),
    "fork": (_fork, (0,)),
    "exit": (Mm.exit, (0,)),
    "read": (lambda mm, addr, length: mm.touch(addr, length, "read"), (2,)),
    "write": (lambda mm, addr, length: mm.touch(addr, length, "write"), (2,)),
    "execute": (lambda mm, addr, length: mm.touch(addr, length, "execute"), (2,)),
}
"""Calls on an address space: the method, and how many arguments it takes."""

FILE_CALLS: dict[str, tuple[Call, tuple[int, ...]]] = {
    "fsync": (lambda memory, file: memory.fsync(FileId(file)), (1,)),
    "ftruncate": (lambda memory, file, size: memory.ftruncate(FileId(file), size), (2,)),
    "uprobe_register": (lambda memory, file, offset: memory.uprobe_register(FileId(file), offset), (2,)),
    "uprobe_unregister": (lambda memory, file, offset: memory.uprobe_unregister(FileId(file), offset), (2,)),
    "ksm_scan": (lambda memory: memory.ksm_scan(), (0,)),
    "khugepaged_scan": (lambda memory, pages: memory.khugepaged_scan(pages), (1,)),
    "wp_shared": (lambda memory, file, offset, length: memory.wp_shared(FileId(file), offset, length), (3,)),
    "clean_record": (lambda memory, file, offset, length: memory.clean_record(FileId(file), offset, length), (3,)),
    "offline_page": (lambda memory, pfn, soft: memory.offline_page(pfn, soft), (2,)),
    "punch": (lambda memory, file, offset, length: memory.punch(FileId(file), offset, length), (3,)),
}
"""Calls on files alone, file ids first, and on the whole machine."""

INTS = {"madvise": (2,), "msync": (2,), "mlock2": (2,), "mlockall": (0,), "process_madvise": (0, 1)}
"""Which arguments are ints: the lower 32 bits of a register."""
OFFSETS = {"ftruncate": (1,), "punch": (1, 2)}
"""Which arguments are offsets into files: signed."""


def _as_declared(op: str, args: Sequence[int]) -> Sequence[int]:
    """The arguments as the call declares them, where that is less than a register holds."""
    ints, offsets = INTS.get(op, ()), OFFSETS.get(op, ())
    if not ints and not offsets:
        return args
    values = list(args)
    for at in ints:
        values[at] &= (1 << 32) - 1
    for at in offsets:
        values[at] -= (values[at] >> 63) << 64
    return values


def call(target: Mm | Memory, op: str, args: Sequence[int]) -> Operation[int] | Operation[bytes]:
    """One call. Files are named by their id (mmap's fd: 0 is none); fork returns the child's id.

    Args: target: an Mm, or for calls on files and the machine also a Memory; op: mmap munmap mprotect mremap
        madvise brk msync mlock munlock remap_file_pages (3 arguments as in random traces, or 5) move_pages clear_refs
        uffd_writeprotect uffd_register uffd_unregister uffd_move numa_scan idle_scan pagemap_scan fork exit read write
        execute fsync ftruncate punch uprobe_register uprobe_unregister ksm_scan khugepaged_scan
        offline_page process_madvise migrate_pages mbind set_mempolicy get_mempolicy set_mempolicy_home_node wp_shared
        clean_record.
    Raises: MmError, also ENOSYS for an unknown op and EINVAL for a wrong number of arguments.
    """
    if op in FILE_CALLS:
        function, counts = FILE_CALLS[op]
        receiver: Mm | Memory = target.memory if isinstance(target, Mm) else target
    elif op in MM_CALLS:
        function, counts = MM_CALLS[op]
        receiver = cast(Mm, target)
        if isinstance(target, Memory):
            raise MmError("EINVAL", f"{op} needs an address space")
    else:
        raise MmError("ENOSYS", f"there is no call {op!r}")
    if len(args) not in counts:
        raise MmError("EINVAL", f"{op} takes {' or '.join(map(str, counts))} arguments, not {len(args)}")
    if args and (min(args) < 0 or max(args) >= 1 << 64):
        raise MmError("EINVAL", f"an argument of {op} does not fit into 64 bits")
    return function(receiver, *_as_declared(op, args))
