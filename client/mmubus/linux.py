"""Linux's own names and numbers (x86-64), so that programs read as they would on Linux.

Sources: include/uapi/asm-generic/mman-common.h, mman.h, include/uapi/linux/mman.h, mempolicy.h, v6.12; the contract's
enums for the rest.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

__all__ = [
    "MADV_COLD",
    "MADV_COLLAPSE",
    "MADV_DODUMP",
    "MADV_DOFORK",
    "MADV_DONTDUMP",
    "MADV_DONTFORK",
    "MADV_DONTNEED",
    "MADV_DONTNEED_LOCKED",
    "MADV_FREE",
    "MADV_HUGEPAGE",
    "MADV_HWPOISON",
    "MADV_KEEPONFORK",
    "MADV_MERGEABLE",
    "MADV_NOHUGEPAGE",
    "MADV_NORMAL",
    "MADV_PAGEOUT",
    "MADV_POPULATE_READ",
    "MADV_POPULATE_WRITE",
    "MADV_RANDOM",
    "MADV_REMOVE",
    "MADV_SEQUENTIAL",
    "MADV_SOFT_OFFLINE",
    "MADV_UNMERGEABLE",
    "MADV_WILLNEED",
    "MADV_WIPEONFORK",
    "MAP_ANONYMOUS",
    "MAP_FIXED",
    "MAP_FIXED_NOREPLACE",
    "MAP_GROWSDOWN",
    "MAP_HUGETLB",
    "MAP_LOCKED",
    "MAP_NONBLOCK",
    "MAP_NORESERVE",
    "MAP_POPULATE",
    "MAP_PRIVATE",
    "MAP_SHARED",
    "MAP_SHARED_VALIDATE",
    "MAP_STACK",
    "MPOL_BIND",
    "MPOL_DEFAULT",
    "MPOL_F_ADDR",
    "MPOL_F_MEMS_ALLOWED",
    "MPOL_F_NODE",
    "MPOL_F_NUMA_BALANCING",
    "MPOL_F_RELATIVE_NODES",
    "MPOL_F_STATIC_NODES",
    "MPOL_INTERLEAVE",
    "MPOL_LOCAL",
    "MPOL_MF_MOVE",
    "MPOL_MF_MOVE_ALL",
    "MPOL_MF_STRICT",
    "MPOL_PREFERRED",
    "MPOL_PREFERRED_MANY",
    "MPOL_WEIGHTED_INTERLEAVE",
    "MREMAP_DONTUNMAP",
    "MREMAP_FIXED",
    "MREMAP_MAYMOVE",
    "MS_ASYNC",
    "MS_INVALIDATE",
    "MS_SYNC",
    "PAGE_MASK",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "PROT_EXEC",
    "PROT_NONE",
    "PROT_READ",
    "PROT_WRITE",
    "TASK_SIZE",
    "FileKind",
    "HugePages",
    "MadvFlag",
    "MapFlag",
    "MremapFlag",
    "MsFlag",
    "NotifierOp",
    "Op",
    "ProtFlag",
    "Reason",
]

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = ~(PAGE_SIZE - 1)
TASK_SIZE = (1 << 47) - PAGE_SIZE  # the first address that user space may not map


class ProtFlag(IntFlag):
    """Protection of mmap and mprotect."""

    PROT_NONE = 0
    PROT_READ = 1
    PROT_WRITE = 2
    PROT_EXEC = 4


class MapFlag(IntFlag):
    """Flags of mmap."""

    MAP_SHARED = 0x01
    MAP_PRIVATE = 0x02
    MAP_SHARED_VALIDATE = 0x03
    MAP_FIXED = 0x10
    MAP_ANONYMOUS = 0x20
    MAP_GROWSDOWN = 0x100
    MAP_LOCKED = 0x2000
    MAP_NORESERVE = 0x4000
    MAP_POPULATE = 0x8000
    MAP_NONBLOCK = 0x10000
    MAP_STACK = 0x20000
    MAP_HUGETLB = 0x40000
    MAP_FIXED_NOREPLACE = 0x100000


class MremapFlag(IntFlag):
    """Flags of mremap."""

    MREMAP_MAYMOVE = 1
    MREMAP_FIXED = 2
    MREMAP_DONTUNMAP = 4


class MsFlag(IntFlag):
    """Flags of msync."""

    MS_ASYNC = 1
    MS_INVALIDATE = 2
    MS_SYNC = 4


class MadvFlag(IntEnum):
    """Advice of madvise."""

    MADV_NORMAL = 0
    MADV_RANDOM = 1
    MADV_SEQUENTIAL = 2
    MADV_WILLNEED = 3
    MADV_DONTNEED = 4
    MADV_FREE = 8
    MADV_REMOVE = 9
    MADV_DONTFORK = 10
    MADV_DOFORK = 11
    MADV_MERGEABLE = 12
    MADV_UNMERGEABLE = 13
    MADV_HUGEPAGE = 14
    MADV_NOHUGEPAGE = 15
    MADV_DONTDUMP = 16
    MADV_DODUMP = 17
    MADV_WIPEONFORK = 18
    MADV_KEEPONFORK = 19
    MADV_COLD = 20
    MADV_PAGEOUT = 21
    MADV_POPULATE_READ = 22
    MADV_POPULATE_WRITE = 23
    MADV_DONTNEED_LOCKED = 24
    MADV_COLLAPSE = 25
    MADV_HWPOISON = 100
    MADV_SOFT_OFFLINE = 101


# Memory policies: modes, with the flags that go with a mode; flags of mbind(2), and of get_mempolicy(2).
MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE, MPOL_LOCAL, MPOL_PREFERRED_MANY = range(6)
MPOL_WEIGHTED_INTERLEAVE = 6
MPOL_F_NUMA_BALANCING, MPOL_F_RELATIVE_NODES, MPOL_F_STATIC_NODES = 1 << 13, 1 << 14, 1 << 15
MPOL_MF_STRICT, MPOL_MF_MOVE, MPOL_MF_MOVE_ALL = 1, 2, 4
MPOL_F_NODE, MPOL_F_ADDR, MPOL_F_MEMS_ALLOWED = 1, 2, 4


class Op(IntEnum):
    """The calls of the pipelined stream; their arguments are Linux's, in Linux's order (see the contract)."""

    MMAP = 1
    MUNMAP = 2
    MPROTECT = 3
    MREMAP = 4
    MADVISE = 5
    BRK = 6
    MSYNC = 7
    MLOCK = 8
    MUNLOCK = 9
    REMAP_FILE_PAGES = 10
    FORK = 11
    EXIT = 12
    READ = 13
    WRITE = 14
    EXECUTE = 15
    LOAD = 16
    STORE = 17
    FSYNC = 18
    FTRUNCATE = 19
    PUNCH = 20
    MOVE_PAGES = 21
    CLEAR_REFS = 22
    UFFD_WRITEPROTECT = 23
    KSM_SCAN = 24
    UFFD_REGISTER = 25
    UFFD_UNREGISTER = 26
    UFFD_MOVE = 27
    NUMA_SCAN = 28
    PAGEMAP_SCAN = 29
    UPROBE_REGISTER = 30
    UPROBE_UNREGISTER = 31
    IDLE_SCAN = 32
    OFFLINE_PAGE = 33
    PROCESS_MADVISE = 34
    MIGRATE_PAGES = 35
    MBIND = 36
    WP_SHARED = 37
    CLEAN_RECORD = 38
    KHUGEPAGED_SCAN = 50
    SET_MEMPOLICY = 51
    GET_MEMPOLICY = 52
    SET_MEMPOLICY_HOME_NODE = 53
    MLOCK2 = 60
    MLOCKALL = 61
    MUNLOCKALL = 62
    MSEAL = 63
    SETRLIMIT = 64


class Reason(IntEnum):
    """Why a range is invalidated: mainline's enum mmu_notifier_event, from 1."""

    UNSPECIFIED = 0
    UNMAP = 1
    CLEAR = 2
    PROTECTION_VMA = 3
    PROTECTION_PAGE = 4
    SOFT_DIRTY = 5
    RELEASE = 6
    MIGRATE = 7
    EXCLUSIVE = 8


class NotifierOp(IntEnum):
    """The ops that a notifier may implement."""

    UNSPECIFIED = 0
    RELEASE = 1
    AGE_PAGE = 2
    INVALIDATE_PAGE = 3
    INVALIDATE_RANGE = 4
    INVALIDATE_ALL = 5
    INVALIDATE_RANGE_START = 6
    INVALIDATE_RANGE_END = 7
    CLEAR_FLUSH_YOUNG = 8
    CLEAR_YOUNG = 9
    TEST_YOUNG = 10
    RMAP_INVALIDATE_PAGE = 11
    FLUSH_ALL = 12


class FileKind(IntEnum):
    """How a file behaves: on a disk (readahead, writeback), tmpfs, executed in place, or in huge pages of the pool."""

    DISK = 1
    SHM = 2
    XIP = 3
    HUGETLB = 4


class HugePages(IntEnum):
    """Which private memory gets huge pages: none at all, where MADV_HUGEPAGE asks for them, all that has room."""

    NEVER = 1
    MADVISE = 2
    ALWAYS = 3


PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = ProtFlag(0), ProtFlag.PROT_READ, ProtFlag.PROT_WRITE, ProtFlag.PROT_EXEC

MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE = MapFlag.MAP_SHARED, MapFlag.MAP_PRIVATE, MapFlag.MAP_SHARED_VALIDATE
MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_ANONYMOUS = MapFlag.MAP_FIXED, MapFlag.MAP_FIXED_NOREPLACE, MapFlag.MAP_ANONYMOUS
MAP_GROWSDOWN, MAP_LOCKED, MAP_NORESERVE = MapFlag.MAP_GROWSDOWN, MapFlag.MAP_LOCKED, MapFlag.MAP_NORESERVE
MAP_POPULATE, MAP_NONBLOCK, MAP_STACK = MapFlag.MAP_POPULATE, MapFlag.MAP_NONBLOCK, MapFlag.MAP_STACK
MAP_HUGETLB = MapFlag.MAP_HUGETLB

MREMAP_MAYMOVE, MREMAP_FIXED = MremapFlag.MREMAP_MAYMOVE, MremapFlag.MREMAP_FIXED
MREMAP_DONTUNMAP = MremapFlag.MREMAP_DONTUNMAP

MS_ASYNC, MS_INVALIDATE, MS_SYNC = MsFlag.MS_ASYNC, MsFlag.MS_INVALIDATE, MsFlag.MS_SYNC

MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL = MadvFlag.MADV_NORMAL, MadvFlag.MADV_RANDOM, MadvFlag.MADV_SEQUENTIAL
MADV_WILLNEED, MADV_DONTNEED, MADV_FREE = MadvFlag.MADV_WILLNEED, MadvFlag.MADV_DONTNEED, MadvFlag.MADV_FREE
MADV_REMOVE, MADV_DONTFORK, MADV_DOFORK = MadvFlag.MADV_REMOVE, MadvFlag.MADV_DONTFORK, MadvFlag.MADV_DOFORK
MADV_MERGEABLE, MADV_UNMERGEABLE = MadvFlag.MADV_MERGEABLE, MadvFlag.MADV_UNMERGEABLE
MADV_HUGEPAGE, MADV_NOHUGEPAGE = MadvFlag.MADV_HUGEPAGE, MadvFlag.MADV_NOHUGEPAGE
MADV_DONTDUMP, MADV_DODUMP = MadvFlag.MADV_DONTDUMP, MadvFlag.MADV_DODUMP
MADV_WIPEONFORK, MADV_KEEPONFORK = MadvFlag.MADV_WIPEONFORK, MadvFlag.MADV_KEEPONFORK
MADV_COLD, MADV_PAGEOUT = MadvFlag.MADV_COLD, MadvFlag.MADV_PAGEOUT
MADV_POPULATE_READ, MADV_POPULATE_WRITE = MadvFlag.MADV_POPULATE_READ, MadvFlag.MADV_POPULATE_WRITE
MADV_DONTNEED_LOCKED, MADV_COLLAPSE = MadvFlag.MADV_DONTNEED_LOCKED, MadvFlag.MADV_COLLAPSE
MADV_HWPOISON, MADV_SOFT_OFFLINE = MadvFlag.MADV_HWPOISON, MadvFlag.MADV_SOFT_OFFLINE
