"""An address space: its state, and every call on it.

Calls are operations (see `notification`): `value = yield from mm.munmap(...)`, or driven by notify.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mmubusd.mm import (
    access,
    adopt,
    exit,
    fork,
    idle,
    limits,
    madvise,
    mbind,
    migrate_device,
    migrate_pages,
    mlock,
    mmap,
    mprotect,
    mremap,
    mseal,
    numa_balancing,
    pagemap_scan,
    remap_file_pages,
    set_mempolicy,
    soft_dirty,
    userfaultfd,
    writeback,
)
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE, FileId, MmId
from mmubusd.mm.device_memory import Select
from mmubusd.mm.errno import MmError
from mmubusd.mm.free_frames import OutOfFrames
from mmubusd.mm.memcontrol import MemCgroup
from mmubusd.mm.notification import LockWait, Operation
from mmubusd.mm.pgtable import PageTable
from mmubusd.mm.range_lock import RangeLock
from mmubusd.mm.vma import VmaTree

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mempolicy import Mempolicy

T = TypeVar("T")

BRK_START = 0x555555756000
"""Where the heap of a program begins that has no address space layout randomisation."""
MMAP_BASE = TASK_SIZE - (128 << 20) & -PAGE_SIZE
"""The kernel's smallest gap for the stack below the end of the address space."""
STACK_LIMIT = 8 << 20


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps. prot: as "rwxp", last letter p(rivate) or s(hared); offset: bytes into the file.

    flags: for `adopt`, what the program has chosen, in the letters of smaps.
    """

    start: int
    end: int
    prot: str
    offset: int
    file: FileId | None
    name: str = ""
    flags: tuple[str, ...] = ()


class Mm:
    """One address space.

    Attributes:
        notified: the rooms above set it: someone may want to hear. While it is false nothing is yielded for this mm.
        alive: false once exit has unmapped everything. unstable: it was killed and parts of it are gone: faults fail.
        soft_dirty_tracked: clear_refs has been used: a page becomes writable only by being written to.
        memcg: who pays for its memory (memcontrol.join); short_of: what kept a fault from being done at once.
        thp: which private memory gets huge pages by itself; thp_disabled: none does, nor can it be asked for
        (PR_SET_THP_DISABLE); both inherited.
        policy: the program's own memory policy; numa_node: where it runs; numa_hinted: there are, or have been, pages
        with a hint (numa_balancing).
        parent: the address space that it was forked from, or None.
        brk_start, brk_end: the heap in bytes; 0 when it has none.
        default_flags: what new mappings have beside what is asked for: VM_LOCKED after mlockall(MCL_FUTURE).
        locked_twice: bytes that the kernel counts as locked in two places (MREMAP_DONTUNMAP).
        address_space_limit, data_limit, locked_limit, stack_limit: RLIMIT_AS, _DATA, _MEMLOCK, _STACK in bytes; None:
        none.
    """

    def __init__(self, memory: Memory, mm_id: MmId, name: str) -> None:
        self.memory = memory
        self.id = mm_id
        self.name = name
        self.notified = False
        self.alive = True
        self.unstable = False
        self.soft_dirty_tracked = False
        self.parent: MmId | None = None
        self.memcg: MemCgroup | None = None
        self.short_of: OutOfFrames | None = None
        self.vmas = VmaTree()
        self.pgtable = PageTable(memory.tables)
        self.lock = RangeLock(memory.granted)
        self.split_blocks: list[int] = []  # 2 MiB blocks that have been split and nobody has been told of yet
        self.thp = memory.thp
        self.thp_disabled = False
        self.numa_node, self.numa_hinted = 0, False
        self.policy: Mempolicy | None = None
        self.mmap_base = MMAP_BASE
        self.brk_start = self.brk_end = BRK_START
        self.address_space_limit: int | None = None
        self.data_limit: int | None = None
        self.locked_limit: int | None = None
        self.default_flags = 0
        self.locked_twice = 0
        self.stack_limit: int | None = STACK_LIMIT

    def __repr__(self) -> str:
        return f"Mm({self.id}, {self.name!r})"

    def locked(self, operation: Operation[T], *ranges: tuple[int, int]) -> Operation[T]:
        """Run an operation under the range lock of these ranges.

        Raises: MmError ESRCH if the address space has ended meanwhile.
        """
        ticket = self.lock.acquire(*ranges)
        try:
            if not ticket.granted:
                yield LockWait(ticket)
            if not self.alive:
                raise MmError("ESRCH", f"address space {self.id} has ended")
            return (yield from operation)
        finally:
            operation.close()
            self.lock.release(ticket)

    # Inspection: plain, atomic.

    def mappings(self) -> list[Mapping]:
        """All mappings, ascending."""
        return [
            Mapping(
                vma.start,
                vma.end,
                vma.prot_string(),
                vma.pgoff << PAGE_SHIFT if vma.file is not None else 0,
                vma.file.id if vma.file is not None and vma.file.linked else None,
                vma.file.name if vma.file is not None else "",
            )
            for vma in self.vmas
        ]

    def present(self, start: int, end: int) -> list[tuple[int, int]]:
        """Resident pages in [start, end) as [first, end) page numbers counted from start, ascending, maximal."""
        first = start >> PAGE_SHIFT
        return [(a - first, b - first) for a, b in self.pgtable.present(first, end >> PAGE_SHIFT)]

    def swapped(self, start: int, end: int) -> list[tuple[int, int]]:
        """Pages in [start, end) that are in swap, as present() gives the resident ones."""
        first = start >> PAGE_SHIFT
        return [(a - first, b - first) for a, b in self.pgtable.swapped(first, end >> PAGE_SHIFT)]

    def huge(self, start: int, end: int) -> list[tuple[int, int]]:
        """What PMDs map of [start, end), likewise."""
        first = start >> PAGE_SHIFT
        return [(a - first, b - first) for a, b in self.pgtable.huge(first, end >> PAGE_SHIFT)]

    def resident_pages(self) -> int:
        """How many pages are present, zero pages included."""
        return self.pgtable.present_nr()

    # A recorded process's start: plain, atomic; nobody may be registered yet.

    def adopt(self, mapping: Mapping, resident: Iterable[tuple[int, int, str]]) -> None:
        """Install a mapping as a snapshot tells it.

        Args: resident: (first page, end page, kind) from the mapping's start; kind "f": page of the file (or of shared
            memory), mapped; "a": anonymous, mapped here alone; "s": anonymous, shared with a process that is not known:
            a sharer is counted that goes with `forget_sharers`. With file None and "s" in prot it is shared memory of
        its own. Raises: MmError EINVAL (unaligned, unknown kind), EEXIST (something is mapped there), EBADF.
        """
        adopt.adopt(self, mapping, resident)

    def adopt_file_page(self, address: int) -> None:
        """A recorded protection fault says that a page was mapped here that the simulation has not: map the file's."""
        adopt.adopt_file_page(self, address)

    def forget_sharers(self, start: int, end: int) -> None:
        """The unknown sharers of the anonymous pages in [start, end) are gone."""
        adopt.forget_sharers(self, start, end)

    # The calls. Arguments are Linux's numbers.

    def mmap(self, addr: int, length: int, prot: int, flags: int, file: int = 0, offset: int = 0) -> Operation[int]:
        """Returns: the address."""
        return mmap.mmap(self, addr, length, prot, flags, file, offset)

    def munmap(self, addr: int, length: int) -> Operation[int]:
        return mmap.munmap(self, addr, length)

    def mprotect(self, addr: int, length: int, prot: int) -> Operation[int]:
        return mprotect.mprotect(self, addr, length, prot)

    def mremap(self, addr: int, old_length: int, new_length: int, flags: int, new_addr: int = 0) -> Operation[int]:
        """Returns: the address."""
        return mremap.mremap(self, addr, old_length, new_length, flags, new_addr)

    def madvise(self, addr: int, length: int, advice: int) -> Operation[int]:
        return madvise.madvise(self, addr, length, advice)

    def msync(self, addr: int, length: int, flags: int) -> Operation[int]:
        return writeback.msync(self, addr, length, flags)

    def mlock(self, addr: int, length: int, flags: int = 0) -> Operation[int]:
        """mlock2(2)."""
        return mlock.mlock(self, addr, length, flags)

    def munlock(self, addr: int, length: int) -> Operation[int]:
        return mlock.munlock(self, addr, length)

    def mlockall(self, flags: int) -> Operation[int]:
        return mlock.mlockall(self, flags)

    def munlockall(self) -> Operation[int]:
        return mlock.munlockall(self)

    def mseal(self, addr: int, length: int, flags: int = 0) -> Operation[int]:
        return mseal.mseal(self, addr, length, flags)

    def setrlimit(self, resource: int, size: int) -> Operation[int]:
        """The soft limit of one of the resources RLIMIT_DATA, _STACK, _MEMLOCK, _AS, in bytes; 2^64 - 1: none."""
        return limits.setrlimit(self, resource, size)

    def remap_file_pages(self, addr: int, size: int, prot: int, pgoff: int, flags: int = 0) -> Operation[int]:
        return remap_file_pages.remap_file_pages(self, addr, size, prot, pgoff, flags)

    def move_pages(self, addr: int, length: int, node: int) -> Operation[int]:
        """Move pages to a NUMA node. Returns: how many could not be moved."""
        return migrate_pages.move_pages(self, addr, length, node)

    def process_madvise(self, advice: int, flags: int, *ranges: int) -> Operation[int]:
        """As another process asks. ranges: address and length, in turn. Returns: how many bytes it was done for."""
        return madvise.process_madvise(self, advice, flags, *ranges)

    def migrate_pages(self, old: int, new: int) -> Operation[int]:
        """Masks of nodes. Returns: how many pages could not be moved."""
        return migrate_pages.migrate_pages(self, old, new)

    def mbind(self, addr: int, length: int, mode: int, mask: int, flags: int) -> Operation[int]:
        """mbind(2). mask: of nodes. Returns: 0."""
        return mbind.mbind(self, addr, length, mode, mask, flags)

    def set_mempolicy_home_node(self, addr: int, length: int, node: int, flags: int) -> Operation[int]:
        """Returns: 0."""
        return mbind.set_mempolicy_home_node(self, addr, length, node, flags)

    def set_mempolicy(self, mode: int, mask: int) -> Operation[int]:
        """The program's own policy. mask: of nodes. Returns: 0."""
        return set_mempolicy.set_mempolicy(self, mode, mask)

    def get_mempolicy(self, addr: int, flags: int) -> Operation[bytes]:
        """Returns: mode or node, and a mask of nodes, as `set_mempolicy.POLICY` has them."""
        return set_mempolicy.get_mempolicy(self, addr, flags)

    def clear_refs(self, kind: int) -> Operation[int]:
        """Kernel: /proc/PID/clear_refs; 4: soft-dirty marks, 1: accessed marks."""
        return soft_dirty.clear_refs(self, kind)

    def uffd_writeprotect(self, addr: int, length: int, protect: int, uffd: int = 0) -> Operation[int]:
        """UFFDIO_WRITEPROTECT; protect: 1 or 0; uffd: 0: also what is registered with none."""
        return soft_dirty.uffd_writeprotect(self, addr, length, protect, uffd)

    def uffd_register(self, addr: int, length: int, mode: int, uffd: int) -> Operation[int]:
        """UFFDIO_REGISTER with the userfaultfd of this number; mode: see `userfaultfd`."""
        return userfaultfd.register(self, addr, length, mode, uffd)

    def uffd_unregister(self, addr: int, length: int, uffd: int) -> Operation[int]:
        """UFFDIO_UNREGISTER."""
        return userfaultfd.unregister(self, addr, length, uffd)

    def uffd_move(self, dst: int, src: int, length: int, mode: int, uffd: int) -> Operation[int]:
        """UFFDIO_MOVE. Returns: how many bytes have been moved."""
        return userfaultfd.move(self, dst, src, length, mode, uffd)

    def pagemap_scan(self, addr: int, length: int, flags: int, mask: int) -> Operation[bytes]:
        """PAGEMAP_SCAN. Returns: struct page_region, one after another."""
        return pagemap_scan.scan(self, addr, length, flags, mask)

    def idle_scan(self, addr: int, length: int, mode: int) -> Operation[int]:
        """Returns: how many pages are in use; mode 1: their marks are cleared."""
        return idle.scan(self, addr, length, mode)

    def numa_scan(self, addr: int, length: int, node: int) -> Operation[int]:
        """The program runs on this node: its pages are to come there as they are used. Returns: how many may."""
        return numa_balancing.scan(self, addr, length, node)

    def migrate_to_device(self, start: int, end: int, owner: int, coherent: bool = False) -> Operation[int]:
        """Returns: how many pages of the range are in the owner's memory afterwards."""
        return migrate_device.migrate_to_device(self, start, end, owner, coherent)

    def migrate_to_system(
        self, start: int, end: int, owner: int, select: Select = Select.DEVICE_PRIVATE
    ) -> Operation[int]:
        """Returns: how many pages of the range are in no device's memory afterwards."""
        return migrate_device.migrate_to_system(self, start, end, owner, select)

    def soft_dirty(self, start: int, end: int) -> list[tuple[int, int]]:
        """Pages written to since clear_refs(4), as present() gives the resident ones."""
        return soft_dirty.soft_dirty(self, start, end)

    def brk(self, addr: int) -> Operation[int]:
        """Returns: the break after the call."""
        return mmap.brk(self, addr)

    def fork(self, name: str = "") -> Operation[Mm]:
        """Returns: the child."""
        return fork.fork(self, name)

    def exit(self) -> Operation[int]:
        """Yields Release before anything is freed; the mm is gone from `Memory.mms` when it returns."""
        return exit.exit(self)

    def touch(self, addr: int, length: int, access_kind: str) -> Operation[int]:
        """One "read", "write" or "execute" a page, to the first that fails: EFAULT (SIGSEGV), ENXIO (SIGBUS)."""
        return access.touch(self, addr, length, access_kind)

    def load(self, addr: int, length: int) -> Operation[bytes]:
        """Raises: MmError as touch."""
        return access.load(self, addr, length)

    def store(self, addr: int, data: bytes) -> Operation[int]:
        """Raises: MmError as touch; the pages before the failing one are written."""
        return access.store(self, addr, data)
