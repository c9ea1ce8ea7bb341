"""Playing a recording: what random and program recordings have in common.

A player goes through the operations in order and keeps four things in step: the calls on the server's pipelined stream,
the drivers that read what was touched, the model of what must be in each page, and the books.

    operation -> (drivers have read what it changes) -> call -> result -> contents, touched pages -> books

Faults of a program are pipelined; a call waits until everything before it has been answered, since what it does to the
contents depends on the mappings that are there.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mmubus.connection import Bus
from mmubus.linux import (
    MADV_POPULATE_WRITE,
    MAP_POPULATE,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    PAGE_SIZE,
    PROT_WRITE,
    HugePages,
    Op,
)
from mmubus.operations import Operations, Result
from mmubus.trace.compare import Books
from mmubus.trace.contents import HUGE_SIZE, Contents, Files, Region
from mmubus.trace.crew import Crew
from mmubus.trace.format import Notified, Operation, Trace

__all__ = ["CALLS", "Player", "Space", "notified", "page_end"]

IN_FLIGHT_MAX = 128
INT_MASK, REGISTER_MASK = (1 << 32) - 1, (1 << 64) - 1
CALLS: dict[str, Op] = {
    "mmap": Op.MMAP,
    "munmap": Op.MUNMAP,
    "mprotect": Op.MPROTECT,
    "mremap": Op.MREMAP,
    "madvise": Op.MADVISE,
    "brk": Op.BRK,
    "msync": Op.MSYNC,
    "mlock": Op.MLOCK,
    "mlock2": Op.MLOCK2,
    "munlock": Op.MUNLOCK,
    "mlockall": Op.MLOCKALL,
    "munlockall": Op.MUNLOCKALL,
    "mseal": Op.MSEAL,
    "setrlimit": Op.SETRLIMIT,
    "process_madvise": Op.PROCESS_MADVISE,
    "remap_file_pages": Op.REMAP_FILE_PAGES,
    "read": Op.READ,
    "write": Op.WRITE,
    "execute": Op.EXECUTE,
    "uffd_register": Op.UFFD_REGISTER,
    "uffd_unregister": Op.UFFD_UNREGISTER,
    "uffd_writeprotect": Op.UFFD_WRITEPROTECT,
    "uffd_move": Op.UFFD_MOVE,
    "mbind": Op.MBIND,
    "set_mempolicy": Op.SET_MEMPOLICY,
    "get_mempolicy": Op.GET_MEMPOLICY,
    "set_mempolicy_home_node": Op.SET_MEMPOLICY_HOME_NODE,
    "migrate_pages": Op.MIGRATE_PAGES,
    "fork": Op.FORK,
    "fsync": Op.FSYNC,
    "ftruncate": Op.FTRUNCATE,
    "punch": Op.PUNCH,
}
POLICY_CALLS = frozenset({"mbind", "set_mempolicy", "get_mempolicy", "set_mempolicy_home_node", "migrate_pages"})
CHANGE_NO_BYTES = POLICY_CALLS | frozenset(
    {"fork", "fsync", "msync", "mlock", "mlock2", "munlock", "mlockall", "munlockall", "mseal", "setrlimit"}
)
# Calls that take an address range: [args[0], args[0] + args[1]) is what they change.
RANGED = frozenset({"munmap", "mprotect", "madvise", "msync", "mlock", "munlock", "remap_file_pages"})


@dataclass(slots=True)
class Space:
    """An address space of the recording.

    Attributes:
        mm: the server's number for it.
        contents: what it shows.
        brk: the program break in bytes, 0 when not known.
        attached: the recorded process had its notifier: what the kernel did to it was seen.
    """

    mm: int
    pid: int
    contents: Contents
    brk: int = 0
    attached: bool = True
    written: dict[int, int] = field(default_factory=dict)  # page -> the operation that wrote it last


@dataclass(slots=True)
class Player(ABC):
    """Plays one recording.

    Args:
        bus, operations: the connection and its pipelined stream.
        crew: the driver processes; empty: state and notifications only.
        books: where differences are counted.
    """

    trace: Trace
    bus: Bus
    operations: Operations
    crew: Crew
    books: Books
    files: Files = field(default_factory=Files)
    _in_flight: deque[tuple[asyncio.Future[Result], Callable[[Result], None]]] = field(default_factory=deque)

    @property
    def huge_pages(self) -> HugePages:
        """What the recorded processes had, whatever the server is set to."""
        return HugePages.MADVISE if self.trace.header.thp else HugePages.NEVER

    @abstractmethod
    async def prepare(self) -> None:
        """Make what exists before the first operation."""

    @abstractmethod
    async def step(self, operation: Operation) -> None:
        """Play one operation."""

    @abstractmethod
    async def cleanup(self) -> None:
        """Give back what is left: address spaces and files."""

    def remarks(self) -> list[str]:
        """What else there is to say about this replay, one sentence each."""
        return []

    async def play(self, progress: Callable[[int], None]) -> None:
        """Play everything. Args: progress: called with the number of operations played so far."""
        await self.prepare()
        for played, operation in enumerate(self.trace.operations, 1):
            await self.step(operation)
            progress(played)
        await self.drain()
        await self.crew.settle()
        self.books.finish()

    async def drain(self) -> None:
        """Everything that was submitted has been answered and is entered."""
        while self._in_flight:
            future, then = self._in_flight.popleft()
            then(await future)
        if self.crew.due:
            self.crew.send()
            await self.crew.keep_up()

    async def submit(
        self,
        then: Callable[[Result], None],
        op: Op,
        *args: int,
        space: Space | None,
        data: bytes = b"",
        told: bool = True,
        window: tuple[int, int] = (0, 0),
    ) -> None:
        """Submit a call without waiting. Args: then: called with its result, in order; told: report notifications."""
        if len(self._in_flight) >= IN_FLIGHT_MAX:
            await self.drain()
        mm = space.mm if space is not None else 0
        future = await self.operations.submit(op, *args, mm=mm, data=data, notifications=told, window=window)
        self._in_flight.append((future, then))

    async def call(
        self, op: Op, *args: int, space: Space | None, told: bool = True, window: tuple[int, int] = (0, 0)
    ) -> Result:
        """Submit a call and wait for it and for all before it."""
        results: list[Result] = []
        await self.submit(results.append, op, *args, space=space, told=told, window=window)
        await self.drain()
        return results[0]

    async def before(self, operation: Operation, space: Space) -> None:
        """Wait until the drivers have read what the operation is about to change."""
        await self.drain()
        if self.crew.empty or operation.op in CHANGE_NO_BYTES:
            return
        ranges = changed_by(operation, space)
        if self.trace.header.hugetlb_nr:
            ranges = None  # hugetlb's pages change as a whole
        if ranges is None or any(space.contents.shared(start, end) for start, end in ranges):
            await self.crew.settle()
            return
        for start, end in ranges:
            await self.crew.settle(space.mm, start, end)

    def touched(self, space: Space, start: int, end: int, *, written: bool) -> None:
        """Pages are present and the program has touched them: the drivers shall read them."""
        if self.crew.empty:
            return
        for address in range(start, end, PAGE_SIZE):
            own = written or space.contents.shared(address, address + PAGE_SIZE)
            self.crew.touched(space.mm, address, space.contents.expected(address), own=own)

    def follow(
        self,
        operation: Operation,
        space: Space,
        result: Result,
        *,
        file: int | None,
        offset: int,
        huge: bool = False,
    ) -> None:
        """What a call has done to the contents.

        Args: file, offset: of mmap; file None: anonymous and private. huge: it is of hugetlb.
        """
        contents, args, whole = space.contents, operation.args, not result.errno_name
        if operation.op == "madvise":
            contents.advise(args[0], page_end(args[0] + args[1]), args[2] & INT_MASK, whole=whole)
        elif operation.op == "mremap" and not whole and args[3] & MREMAP_FIXED and result.errno_name != "EINVAL":
            contents.doubt(args[0], args[0] + page_end(args[1]))
            contents.doubt(args[4], args[4] + page_end(args[2]))
        if not whole:
            return
        if operation.op == "mmap":
            start, end = result.ret, result.ret + page_end(args[1])
            end = end + HUGE_SIZE - 1 & -HUGE_SIZE if huge else end
            contents.map(Region(start, end, bool(args[3] & 1), file, offset, huge=huge))
            if args[3] & MAP_POPULATE and args[2] & PROT_WRITE:
                contents.advise(start, end, MADV_POPULATE_WRITE, whole=False)
        elif operation.op == "munmap":
            contents.unmap(args[0], args[0] + page_end(args[1]))
        elif operation.op == "mremap":
            keep = bool(args[3] & MREMAP_DONTUNMAP)
            old, new = (contents.whole_end(args[0] + page_end(size)) - args[0] for size in args[1:3])
            contents.move(args[0], old, new, result.ret, keep=keep)
        elif operation.op == "brk" and result.ret != space.brk:
            if space.brk:
                contents.resize_heap(page_end(space.brk), page_end(result.ret))
            space.brk = result.ret
        elif operation.op == "remap_file_pages" and (region := contents.region(args[0])):
            page = args[3] if len(args) == 5 else args[2]
            contents.map(Region(args[0], args[0] + page_end(args[1]), True, region.file, page * PAGE_SIZE))


def page_end(address: int) -> int:
    """The address, or the length, rounded up to a page; what is longer than a register wraps around."""
    return (address + PAGE_SIZE - 1) & -PAGE_SIZE & REGISTER_MASK


def changed_by(operation: Operation, space: Space) -> Sequence[tuple[int, int]] | None:
    """The ranges that a call may change; None: it cannot be told from its arguments."""
    args = operation.args
    if operation.op in RANGED:
        return [(args[0], page_end(args[0] + args[1]))]
    if operation.op == "mmap":
        start = operation.ret if operation.ret is not None else args[0]
        return [(start, start + page_end(args[1]))]
    if operation.op == "mremap":
        target = operation.ret if operation.ret is not None else args[4]
        return [(args[0], args[0] + page_end(args[1])), (target, target + page_end(args[2]))]
    if operation.op == "brk":
        low, high = sorted((space.brk, args[0]))
        return [(low, page_end(high))]
    return None


def notified(result: Result, wanted: Callable[[int], bool]) -> tuple[Notified, ...]:
    """The notifier calls of a result that concern the address spaces that are wanted."""
    return tuple(Notified(one.call, one.start, one.end) for one in result.notifications if wanted(one.mm))
