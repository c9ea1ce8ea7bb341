"""Playing a random recording: one arena, two files, at most one child; the whole state is compared each time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mmubus.address_space import POLICY
from mmubus.file import File
from mmubus.inspection import Mapping
from mmubus.linux import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_GROWSDOWN,
    MAP_HUGETLB,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    TASK_SIZE,
    FileKind,
    Op,
)
from mmubus.operations import Result
from mmubus.trace.compare import Outcome
from mmubus.trace.contents import Contents, pattern
from mmubus.trace.format import Operation, VmaLine
from mmubus.trace.player import CALLS, Player, Space, notified

__all__ = ["ArenaPlayer"]

KINDS = {"disk": FileKind.DISK, "shm": FileKind.SHM, "hugetlb": FileKind.HUGETLB}
RIGHTS = {"r": PROT_READ, "w": PROT_WRITE, "x": PROT_EXEC}
RLIMIT_MEMLOCK = 8
RETURN = frozenset({"get_mempolicy", "mmap", "mremap", "uffd_move", "brk", "process_madvise"})
"""Calls that return something; of the others the recording has 0."""
FILE_CALLS = frozenset({"fsync", "ftruncate", "punch"})
POLICY_NODES_SHIFT = 16
"""From which bit on what get_mempolicy returned has the nodes."""


@dataclass(slots=True)
class ArenaPlayer(Player):
    """Plays one random recording."""

    space: Space = field(init=False)
    child: Space | None = None
    opened: dict[int, File] = field(default_factory=dict)  # by the recording's number
    numbers: dict[int, int] = field(default_factory=dict)  # the server's number -> the recording's
    heap_shift: int = 0  # from where the recorded heap began to where the server's does

    async def prepare(self) -> None:
        """The arena is empty; the files are as the recording began."""
        for file in self.trace.header.files:
            size = file.pages * PAGE_SIZE
            opened = await self.bus.open_file(size=size, kind=KINDS[file.kind], cached=file.cached)
            self.opened[file.id] = opened
            self.numbers[opened.id] = file.id
        mm = await self.bus.create_mm(self.trace.name, huge_pages=self.huge_pages)
        self.space = Space(mm.id, self.trace.operations[0].pid if self.trace.operations else 1, Contents(self.files))
        await self._lay_out()
        await self.crew.attach(mm.id)

    async def _lay_out(self) -> None:
        """Map what the recorder had mapped beside the arena, as private memory: where it is decides what is chosen."""
        header = self.trace.header
        for each in header.maps:
            protection = sum(bit for letter, bit in RIGHTS.items() if letter in each.protection)
            flags = MAP_FIXED | MAP_ANONYMOUS | (MAP_SHARED if each.protection.endswith("s") else MAP_PRIVATE)
            flags |= MAP_GROWSDOWN if each.name == "[stack]" else 0
            if each.name != "[heap]":
                await self._must(Op.MMAP, each.start, each.end - each.start, protection, flags, 0, 0)
        if header.brk is not None:
            start = await self._must(Op.BRK, 0)
            self.heap_shift = start - header.brk[0]
            self.space.brk = await self._must(Op.BRK, header.brk[1] + self.heap_shift)
        if header.locked_limit is not None:
            await self._must(Op.SETRLIMIT, RLIMIT_MEMLOCK, header.locked_limit)

    async def _must(self, op: Op, *args: int) -> int:
        return (await self.call(op, *args, space=self.space, told=False)).value()

    async def step(self, operation: Operation) -> None:
        """Play one operation, and compare everything."""
        await self.before(operation, self.space)
        if self.trace.header.settled:  # as the recorder did: to move a page, if only in name, empties the batches first
            end = self.trace.header.end
            await self.submit(_ignored, Op.MOVE_PAGES, end, PAGE_SIZE, 0, space=self.space, told=False)
        if operation.op == "reap":
            result = await self._reap()
        else:
            result = await self._play(operation)
        if operation.op == "fork" and not result.errno_name:
            self.child = Space(result.ret, self.space.pid, self.space.contents.fork())
            await self.crew.attach(result.ret)
        self._follow(operation, result)
        self.books.enter(operation, self._outcome(operation, result))

    async def cleanup(self) -> None:
        """Both address spaces end, the files go."""
        for space in (self.child, self.space):
            if space is not None:
                await self.call(Op.EXIT, space=space, told=False)
                self.crew.forget(space.mm)
        for file in self.opened.values():
            await file.unlink()

    @property
    def _window(self) -> tuple[int, int]:
        return self.trace.header.base, self.trace.header.end

    def _file(self, number: int) -> int:
        """The server's number of a file of the recording; 0, which is none, when there is none of that number."""
        return self.opened[number].id if number in self.opened else 0

    async def _play(self, operation: Operation) -> Result:
        args = operation.args
        if operation.op == "mmap":
            file = 0 if args[3] & MAP_ANONYMOUS else self._file(args[4])
            args = (*args[:4], file, args[5])
        elif operation.op in FILE_CALLS:
            args = (self._file(args[0]), *args[1:])
        elif operation.op == "remap_file_pages" and len(args) == 3:
            args = (args[0], args[1], 0, args[2], 0)
        elif operation.op == "brk":
            args = (self._in_heap(args[0]),)
        elif operation.op == "write" and (self.trace.header.thp or not self.crew.empty):
            return await self._write(operation)
        result = await self.call(CALLS[operation.op], *args, space=self.space, window=self._window)
        if operation.op == "get_mempolicy" and not result.errno_name:
            mode, nodes = POLICY.unpack(result.data)
            return replace(result, ret=nodes << POLICY_NODES_SHIFT | mode)
        return result

    def _in_heap(self, address: int) -> int:
        """The server's address of one in the recorded heap; what is below it stays."""
        heap = self.trace.header.brk
        return address + self.heap_shift if heap is not None and heap[0] <= address < TASK_SIZE else address

    async def _write(self, operation: Operation) -> Result:
        """One access a page, then its pattern into every page: these stores find them writable and change nothing."""
        start, length = operation.args
        result = await self.call(Op.WRITE, start, length, space=self.space, window=self._window)
        if not result.errno_name:
            for address in range(start, start + length, PAGE_SIZE):
                data = self._written(address, operation)
                await self.submit(_must_succeed, Op.STORE, address, space=self.space, data=data, told=False)
            await self.drain()
        elif self.trace.header.thp:
            await self._store_until_failure(operation)
        return result

    async def _store_until_failure(self, operation: Operation) -> None:
        """What a write that fails leaves in the pages before the one that it fails at."""
        start, length = operation.args
        for address in range(start, start + length, PAGE_SIZE):
            results: list[Result] = []
            data = self._written(address, operation)
            await self.submit(results.append, Op.STORE, address, space=self.space, data=data, told=False)
            await self.drain()
            if results[0].errno_name:
                return
            self.space.contents.written(address, data)

    def _written(self, address: int, operation: Operation) -> bytes:
        """What a write leaves in its page. The recorder stores a byte that counts up: with huge pages it matters where
        that is 0, since a page of zeros becomes the zero page when its folio is split.
        """
        data = pattern(self.space.mm, address, operation.number)
        return bytes(len(data)) if self.trace.header.thp and operation.number & 0xFF == 0xFF else data

    async def _reap(self) -> Result:
        """The child ends; the parent's state is looked at afterwards."""
        if self.child is None:
            return Result(0, "ECHILD", "there is no child")
        child, self.child = self.child, None
        ended = await self.call(Op.EXIT, space=child)
        self.crew.forget(child.mm)
        seen = await self.call(Op.READ, self.trace.header.base, 0, space=self.space, told=False, window=self._window)
        return replace(
            seen, ret=0, errno_name=ended.errno_name, message=ended.message, notifications=ended.notifications
        )

    def _follow(self, operation: Operation, result: Result) -> None:
        """The contents, and what the drivers shall read."""
        if self.crew.empty:
            return
        args, contents = operation.args, self.space.contents
        if operation.op in ("read", "write"):
            start, end = args[0], args[0] + args[1]
            if operation.op == "write":
                contents.touched(start, end, whole=not result.errno_name)
            if not result.errno_name:
                if operation.op == "write":
                    for address in range(start, end, PAGE_SIZE):
                        contents.written(address, self._written(address, operation))
                self.touched(self.space, start, end, written=operation.op == "write")
            return
        if operation.op == "uffd_move" and not result.errno_name:
            contents.carry(args[1], result.ret, args[0])
            return
        if operation.op in ("ftruncate", "punch") and not result.errno_name:
            file = self._file(args[0])
            if operation.op == "punch":
                self.files.punch(file, args[1], args[2])
            else:
                self.files.truncate(file, args[1])
                for space in (self.space, self.child):
                    if space is not None:
                        space.contents.truncated(file, args[1])
            return
        file_of_mapping: int | None = None
        offset, huge = 0, operation.op == "mmap" and self._is_hugetlb(args[3], args[4])
        if operation.op == "mmap" and args[3] & MAP_ANONYMOUS:
            # A shared anonymous mapping is a file of its own, which nobody else has: a number that no file has.
            file_of_mapping = -1 - operation.number if args[3] & 1 else None
        elif operation.op == "mmap":
            file_of_mapping, offset = self._file(args[4]), args[5]
        self.follow(operation, self.space, result, file=file_of_mapping, offset=offset, huge=huge)

    def _is_hugetlb(self, flags: int, number: int) -> bool:
        """Whether an mmap with these flags, of the recording's file of this number, is of hugetlb."""
        if flags & MAP_ANONYMOUS:
            return bool(flags & MAP_HUGETLB)
        return any(file.id == number and file.kind == "hugetlb" for file in self.trace.header.files)

    def _outcome(self, operation: Operation, result: Result) -> Outcome:
        """The result in the recording's own terms."""
        base, end = self._window
        of_parent = notified(result, lambda mm: mm == self.space.mm)
        inside = tuple(one for one in of_parent if one.start < end and one.end > base)
        ret = result.ret if operation.op in RETURN else 0
        if operation.op == "brk":
            ret -= self.heap_shift
        return Outcome(
            result.errno_name or None,
            None if result.errno_name else ret,
            inside,
            tuple(self._vma(mapping) for mapping in result.mappings),
            tuple(result.present),
            tuple(result.swapped),
            tuple(result.huge),
        )

    def _vma(self, mapping: Mapping) -> VmaLine:
        file = self.numbers.get(mapping.file)
        offset = None if file is None else mapping.offset
        return VmaLine(mapping.start, mapping.end, mapping.protection, offset, file)


def _ignored(result: Result) -> None:
    """There is no page that could be moved."""


def _must_succeed(result: Result) -> None:
    result.value()
