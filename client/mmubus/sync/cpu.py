"""The CPU's side without asyncio: address spaces and files."""

from __future__ import annotations

from collections.abc import Iterable

from mmubus import address_space as aio_address_space
from mmubus import file as aio_file
from mmubus.authority import Grant, Role
from mmubus.inspection import Mapping, PageRun
from mmubus.linux import MAP_ANONYMOUS, MAP_PRIVATE, MS_SYNC, PROT_READ, PROT_WRITE, Op
from mmubus.sync.portal import Run

__all__ = ["AddressSpace", "File"]


class AddressSpace:
    """An address space from the CPU's side; see `mmubus.AddressSpace`."""

    def __init__(self, run: Run, raw: aio_address_space.AddressSpace) -> None:
        self._run = run
        self.aio = raw
        self.id = raw.id
        self.name = raw.name

    def __repr__(self) -> str:
        return repr(self.aio)

    def __index__(self) -> int:
        return self.id

    def mmap(
        self,
        addr: int,
        length: int,
        prot: int = PROT_READ | PROT_WRITE,
        flags: int = MAP_PRIVATE | MAP_ANONYMOUS,
        file: File | int = 0,
        offset: int = 0,
    ) -> int:
        """mmap(2)."""
        return self._run(self.aio.mmap(addr, length, prot, flags, file.__index__(), offset))

    def munmap(self, addr: int, length: int) -> None:
        """munmap(2)."""
        self._run(self.aio.munmap(addr, length))

    def mprotect(self, addr: int, length: int, prot: int) -> None:
        """mprotect(2)."""
        self._run(self.aio.mprotect(addr, length, prot))

    def mremap(self, addr: int, old_length: int, new_length: int, flags: int = 0, new_addr: int = 0) -> int:
        """mremap(2)."""
        return self._run(self.aio.mremap(addr, old_length, new_length, flags, new_addr))

    def madvise(self, addr: int, length: int, advice: int) -> None:
        """madvise(2)."""
        self._run(self.aio.madvise(addr, length, advice))

    def offline_page(self, pfn: int, *, soft: bool = False) -> None:
        """Take a frame out of use for good, for administrators."""
        self._run(self.aio.offline_page(pfn, soft=soft))

    def process_madvise(self, ranges: Iterable[tuple[int, int]], advice: int, flags: int = 0) -> int:
        """process_madvise(2), of this address space as another process."""
        return self._run(self.aio.process_madvise(ranges, advice, flags))

    def migrate_pages(self, old_nodes: int, new_nodes: int) -> int:
        """migrate_pages(2)."""
        return self._run(self.aio.migrate_pages(old_nodes, new_nodes))

    def mbind(self, addr: int, length: int, mode: int, nodes: int, flags: int = 0) -> None:
        """mbind(2)."""
        self._run(self.aio.mbind(addr, length, mode, nodes, flags))

    def set_mempolicy(self, mode: int, nodes: int = 0) -> None:
        """set_mempolicy(2)."""
        self._run(self.aio.set_mempolicy(mode, nodes))

    def get_mempolicy(self, addr: int = 0, flags: int = 0) -> tuple[int, int]:
        """get_mempolicy(2)."""
        return self._run(self.aio.get_mempolicy(addr, flags))

    def set_mempolicy_home_node(self, addr: int, length: int, home_node: int, flags: int = 0) -> None:
        """set_mempolicy_home_node(2)."""
        self._run(self.aio.set_mempolicy_home_node(addr, length, home_node, flags))

    def brk(self, addr: int = 0) -> int:
        """brk(2)."""
        return self._run(self.aio.brk(addr))

    def msync(self, addr: int, length: int, flags: int = MS_SYNC) -> None:
        """msync(2)."""
        self._run(self.aio.msync(addr, length, flags))

    def mlock(self, addr: int, length: int, *, on_fault: bool = False) -> None:
        """mlock(2). Args: on_fault: pages are locked as they come."""
        self._run(self.aio.mlock(addr, length, on_fault=on_fault))

    def munlock(self, addr: int, length: int) -> None:
        """munlock(2)."""
        self._run(self.aio.munlock(addr, length))

    def mlockall(self, flags: int) -> None:
        """mlockall(2)."""
        self._run(self.aio.mlockall(flags))

    def munlockall(self) -> None:
        """munlockall(2)."""
        self._run(self.aio.munlockall())

    def mseal(self, addr: int, length: int, flags: int = 0) -> None:
        """mseal(2)."""
        self._run(self.aio.mseal(addr, length, flags))

    def setrlimit(self, resource: int, limit: int) -> None:
        """setrlimit(2), the soft limit."""
        self._run(self.aio.setrlimit(resource, limit))

    def fork(self, name: str = "") -> AddressSpace:
        """fork(2)."""
        return AddressSpace(self._run, self._run(self.aio.fork(name)))

    def exit(self) -> None:
        """exit."""
        self._run(self.aio.exit())

    def load(self, addr: int, length: int) -> bytes:
        """Read bytes by virtual address, as the CPU would."""
        return self._run(self.aio.load(addr, length))

    def store(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes by virtual address, as the CPU would."""
        self._run(self.aio.store(addr, data))

    def touch(self, addr: int, length: int, *, write: bool = False, execute: bool = False) -> int:
        """One access a page, without bytes."""
        return self._run(self.aio.touch(addr, length, write=write, execute=execute))

    def call(self, op: Op, *args: int, data: bytes = b"") -> int:
        """Any call by its number and Linux's arguments."""
        return self._run(self.aio.call(op, *args, data=data))

    def maps(self) -> list[Mapping]:
        """The mappings, as /proc/PID/maps."""
        return self._run(self.aio.maps())

    def pagemap(self, start: int = 0, end: int = 0) -> list[PageRun]:
        """The pages that are present."""
        return self._run(self.aio.pagemap(start, end))

    def grant(self, principal: str, *roles: Role) -> None:
        """Give somebody roles on it."""
        self._run(self.aio.grant(principal, *roles))

    def revoke(self, principal: str, *roles: Role) -> tuple[Role, ...]:
        """Take roles away, none named: all. Returns: what remains by the server's file of roles."""
        return self._run(self.aio.revoke(principal, *roles))

    def grants(self) -> list[Grant]:
        """Who has which roles on it."""
        return self._run(self.aio.grants())


class File:
    """A file; see `mmubus.File`."""

    def __init__(self, run: Run, raw: aio_file.File) -> None:
        self._run = run
        self.aio = raw
        self.id = raw.id
        self.name = raw.name
        self.created = raw.created

    def __index__(self) -> int:
        return self.id

    def pread(self, length: int, offset: int) -> bytes:
        """pread(2)."""
        return self._run(self.aio.pread(length, offset))

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> int:
        """pwrite(2)."""
        return self._run(self.aio.pwrite(data, offset))

    def truncate(self, size: int) -> None:
        """ftruncate(2)."""
        self._run(self.aio.truncate(size))

    def fsync(self) -> None:
        """fsync(2)."""
        self._run(self.aio.fsync())

    def punch_hole(self, offset: int, length: int) -> None:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE."""
        self._run(self.aio.punch_hole(offset, length))

    def wp_shared(self, offset: int, length: int) -> int:
        """Protect pages against writing through shared mappings."""
        return self._run(self.aio.wp_shared(offset, length))

    def clean_record(self, offset: int, length: int) -> int:
        """Collect what has been written to through shared mappings."""
        return self._run(self.aio.clean_record(offset, length))

    def unlink(self) -> None:
        """unlink(2)."""
        self._run(self.aio.unlink())

    def grant(self, principal: str, *roles: Role) -> None:
        """Give somebody roles on it."""
        self._run(self.aio.grant(principal, *roles))

    def revoke(self, principal: str, *roles: Role) -> tuple[Role, ...]:
        """Take roles away, none named: all. Returns: what remains by the server's file of roles."""
        return self._run(self.aio.revoke(principal, *roles))

    def grants(self) -> list[Grant]:
        """Who has which roles on it."""
        return self._run(self.aio.grants())
