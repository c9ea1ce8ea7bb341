"""An address space from the CPU's side: the calls of a program, with Linux's names, arguments and errnos.

Every call returns when the operation is over: when each notifier concerned has acknowledged or has been fenced off,
and the frames that were taken are free. A call that is cancelled goes on at the server; only its answer is lost.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

from mmu.v1 import address_space_pb2 as pb

from mmubus.authority import Grants, Owned
from mmubus.channel import unary
from mmubus.errors import MmError
from mmubus.file import File
from mmubus.inspection import Mapping, PageRun
from mmubus.linux import MAP_ANONYMOUS, MAP_PRIVATE, MS_SYNC, PROT_READ, PROT_WRITE, Op
from mmubus.within import acting

if TYPE_CHECKING:
    from mmubus.connection import Bus
    from mmubus.operations import Operations

__all__ = ["AddressSpace"]

REGION = struct.Struct("<QQQ")
"""struct page_region of PAGEMAP_SCAN."""
POLICY = struct.Struct("<QQ")
"""What get_mempolicy answers: mode or node, and a mask of nodes."""
TRANSFER_BYTES_MAX = 1 << 20  # bytes of one message; larger loads and stores are split


class AddressSpace(Owned):
    """One address space. Made by `Bus.create_mm`, `Bus.mm` or `fork`.

    Attributes:
        id: the server's number for it; what notifiers get as `mm`.
        name: for people.
    """

    def __init__(self, bus: Bus, mm: int, name: str = "") -> None:
        self._bus = bus
        self._stub = acting(bus.stubs.address_space, bus.session)
        self._grants = Grants(bus, mm=mm)
        self.id = mm
        self.name = name

    def __repr__(self) -> str:
        return f"<AddressSpace {self.id} {self.name!r}>"

    def __index__(self) -> int:
        return self.id

    async def mmap(
        self,
        addr: int,
        length: int,
        prot: int = PROT_READ | PROT_WRITE,
        flags: int = MAP_PRIVATE | MAP_ANONYMOUS,
        file: File | int = 0,
        offset: int = 0,
    ) -> int:
        """mmap(2). Returns: the address. Raises: MmError."""
        request = pb.MmapRequest(
            mm=self.id, addr=addr, length=length, prot=prot, flags=flags, file=int(file), offset=offset
        )
        return (await unary(self._stub.Mmap(request))).addr

    async def munmap(self, addr: int, length: int) -> None:
        """munmap(2). Raises: MmError."""
        await unary(self._stub.Munmap(pb.MunmapRequest(mm=self.id, addr=addr, length=length)))

    async def mprotect(self, addr: int, length: int, prot: int) -> None:
        """mprotect(2). Raises: MmError."""
        await unary(self._stub.Mprotect(pb.MprotectRequest(mm=self.id, addr=addr, length=length, prot=prot)))

    async def mremap(self, addr: int, old_length: int, new_length: int, flags: int = 0, new_addr: int = 0) -> int:
        """mremap(2). Returns: the new address. Raises: MmError."""
        request = pb.MremapRequest(
            mm=self.id, addr=addr, old_length=old_length, new_length=new_length, flags=flags, new_addr=new_addr
        )
        return (await unary(self._stub.Mremap(request))).addr

    async def madvise(self, addr: int, length: int, advice: int) -> None:
        """madvise(2). Raises: MmError."""
        await unary(self._stub.Madvise(pb.MadviseRequest(mm=self.id, addr=addr, length=length, advice=advice)))

    async def offline_page(self, pfn: int, *, soft: bool = False) -> None:
        """Take a frame out of use for good, for administrators: its bytes are lost, or, soft, its page moves first.

        Raises: MmError, EHWPOISON when it has failed before, EBUSY when somebody keeps it.
        """
        await self.call(Op.OFFLINE_PAGE, pfn, int(soft))

    async def process_madvise(self, ranges: Iterable[tuple[int, int]], advice: int, flags: int = 0) -> int:
        """process_madvise(2), of this address space as another process. Args: ranges: (address, length), at most 16.

        Returns: for how many bytes it was done. Raises: MmError.
        """
        return await self.call(Op.PROCESS_MADVISE, advice, flags, *(value for each in ranges for value in each))

    async def migrate_pages(self, old_nodes: int, new_nodes: int) -> int:
        """migrate_pages(2). Args: masks of nodes. Returns: how many pages could not be moved. Raises: MmError."""
        return await self.call(Op.MIGRATE_PAGES, old_nodes, new_nodes)

    async def mbind(self, addr: int, length: int, mode: int, nodes: int, flags: int = 0) -> None:
        """mbind(2). Args: mode: MPOL_* with its flags; nodes: a mask; flags: MPOL_MF_*. Raises: MmError."""
        await self.call(Op.MBIND, addr, length, mode, nodes, flags)

    async def set_mempolicy(self, mode: int, nodes: int = 0) -> None:
        """set_mempolicy(2): what holds where no mapping has a policy. Args: as for mbind. Raises: MmError."""
        await self.call(Op.SET_MEMPOLICY, mode, nodes)

    async def get_mempolicy(self, addr: int = 0, flags: int = 0) -> tuple[int, int]:
        """get_mempolicy(2). Args: flags: MPOL_F_*. Returns: mode or node, and a mask of nodes. Raises: MmError."""
        result = await self._call(Op.GET_MEMPOLICY, addr, flags)
        mode, nodes = POLICY.unpack(result.data)
        return mode, nodes

    async def set_mempolicy_home_node(self, addr: int, length: int, home_node: int, flags: int = 0) -> None:
        """set_mempolicy_home_node(2). Raises: MmError."""
        await self.call(Op.SET_MEMPOLICY_HOME_NODE, addr, length, home_node, flags)

    async def brk(self, addr: int = 0) -> int:
        """brk(2). Returns: the program break after the call; the old one when it could not be moved."""
        return (await unary(self._stub.Brk(pb.BrkRequest(mm=self.id, addr=addr)))).brk

    async def msync(self, addr: int, length: int, flags: int = MS_SYNC) -> None:
        """msync(2). Raises: MmError."""
        await self.call(Op.MSYNC, addr, length, flags)

    async def mlock(self, addr: int, length: int, *, on_fault: bool = False) -> None:
        """mlock(2). Args: on_fault: pages are locked as they come (MLOCK_ONFAULT of mlock2(2)). Raises: MmError."""
        await self.call(Op.MLOCK2, addr, length, int(on_fault))

    async def munlock(self, addr: int, length: int) -> None:
        """munlock(2). Raises: MmError."""
        await self.call(Op.MUNLOCK, addr, length)

    async def mlockall(self, flags: int) -> None:
        """mlockall(2). Args: flags: MCL_CURRENT 1, MCL_FUTURE 2, MCL_ONFAULT 4. Raises: MmError."""
        await self.call(Op.MLOCKALL, flags)

    async def munlockall(self) -> None:
        """munlockall(2). Raises: MmError."""
        await self.call(Op.MUNLOCKALL)

    async def mseal(self, addr: int, length: int, flags: int = 0) -> None:
        """mseal(2): the mappings stay as they are until the address space ends. Raises: MmError."""
        await self.call(Op.MSEAL, addr, length, flags)

    async def setrlimit(self, resource: int, limit: int) -> None:
        """setrlimit(2), the soft limit. Args: resource: RLIMIT_DATA 2, _STACK 3, _MEMLOCK 8, _AS 9; limit: bytes,
        2**64 - 1: none. Raises: MmError.
        """
        await self.call(Op.SETRLIMIT, resource, limit)

    async def remap_file_pages(self, addr: int, size: int, prot: int = 0, pgoff: int = 0, flags: int = 0) -> None:
        """remap_file_pages(2). Raises: MmError."""
        await self.call(Op.REMAP_FILE_PAGES, addr, size, prot, pgoff, flags)

    async def uffd_register(self, addr: int, length: int, mode: int, uffd: int = 1) -> None:
        """UFFDIO_REGISTER with the userfaultfd of this number. Args: mode: as of Op.UFFD_REGISTER. Raises: MmError."""
        await self.call(Op.UFFD_REGISTER, addr, length, mode, uffd)

    async def uffd_unregister(self, addr: int, length: int, uffd: int = 1) -> None:
        """UFFDIO_UNREGISTER. Raises: MmError."""
        await self.call(Op.UFFD_UNREGISTER, addr, length, uffd)

    async def uffd_move(self, dst: int, src: int, length: int, mode: int = 0, uffd: int = 1) -> int:
        """UFFDIO_MOVE. Returns: how many bytes have been moved, perhaps fewer than asked. Raises: MmError."""
        return await self.call(Op.UFFD_MOVE, dst, src, length, mode, uffd)

    async def pagemap_scan(self, addr: int, length: int, flags: int, categories: int) -> list[tuple[int, int, int]]:
        """PAGEMAP_SCAN. Returns: (start, end, categories) of the pages that have all of these. Raises: MmError."""
        result = await self._call(Op.PAGEMAP_SCAN, addr, length, flags, categories)
        return list(REGION.iter_unpack(result.data))

    async def fork(self, name: str = "") -> AddressSpace:
        """fork(2): a copy-on-write copy, with no notifiers. Raises: MmError."""
        child = (await unary(self._stub.Fork(pb.ForkRequest(mm=self.id, name=name)))).child
        return AddressSpace(self._bus, child, name or self.name)

    async def exit(self) -> None:
        """exit: release, unmap everything, free everything. Raises: MmError, ESRCH when it is gone already."""
        await unary(self._stub.Exit(pb.ExitRequest(mm=self.id)))

    async def load(self, addr: int, length: int) -> bytes:
        """Read bytes by virtual address, as the CPU would. Raises: MmError, EFAULT for SIGSEGV."""
        pieces = []
        for at, size in _pieces(addr, length):
            pieces.append((await unary(self._stub.Load(pb.LoadRequest(mm=self.id, addr=at, length=size)))).data)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def store(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes by virtual address, as the CPU would. Raises: MmError, EFAULT for SIGSEGV."""
        view = memoryview(data)
        for at, size in _pieces(addr, len(view)):
            piece = bytes(view[at - addr : at - addr + size])
            await unary(self._stub.Store(pb.StoreRequest(mm=self.id, addr=at, data=piece)))

    async def touch(self, addr: int, length: int, *, write: bool = False, execute: bool = False) -> int:
        """One access a page, without bytes. Raises: MmError, EFAULT for SIGSEGV."""
        return await self.call(Op.EXECUTE if execute else Op.WRITE if write else Op.READ, addr, length)

    async def call(self, op: Op, *args: int, data: bytes = b"") -> int:
        """Any call by its number and Linux's arguments. Returns: its value. Raises: MmError."""
        return (await self._call(op, *args, data=data)).ret

    async def _call(self, op: Op, *args: int, data: bytes = b"") -> pb.CallResult:
        call = pb.Call(id=1, op=cast("pb.Op.ValueType", op.value), mm=self.id, args=args, data=data)
        result = (await unary(self._stub.Call(pb.CallRequest(call=call)))).result
        if result.HasField("error"):
            raise MmError(result.error.errno, result.error.message)
        return result

    async def maps(self) -> list[Mapping]:
        """The mappings, ascending, as /proc/PID/maps shows them."""
        return await self._bus.inspection.maps(self.id)

    async def pagemap(self, start: int = 0, end: int = 0) -> list[PageRun]:
        """The pages that are present, as runs, as /proc/PID/pagemap would show them; end 0: to the end."""
        return await self._bus.inspection.pagemap(self.id, start, end)

    def operations(self, *, in_flight_max: int = 256) -> Operations:
        """A pipelined stream of calls on this address space; see `mmubus.operations`."""
        return self._bus.operations(mm=self.id, in_flight_max=in_flight_max)


def _pieces(addr: int, length: int) -> Iterable[tuple[int, int]]:
    """[addr, addr + length) in pieces that fit a message; one empty piece when length is 0."""
    if length <= TRANSFER_BYTES_MAX:
        return ((addr, length),)
    return _split(addr, length)


def _split(addr: int, length: int) -> Sequence[tuple[int, int]]:
    end = addr + length
    return [(at, min(TRANSFER_BYTES_MAX, end - at)) for at in range(addr, end, TRANSFER_BYTES_MAX)]
