"""Playing a program recording: every process of it, from the moment when its notifier was attached.

What a recording leaves open, and what is done about it:

    kernel-chosen addresses   are replayed where the kernel put them, MAP_FIXED at a place that is free
    write, protection true    says that the page was mapped; where it is not here, it is mapped first, as the file's
    child between fork and    ran unseen: what its first snapshot shows is carried out then (`reconcile`)
    its notifier
    exit                      is not the end of an mm, `unmapped` is; recordings without such lines end it at exit, and
                              a copy that the kernel still made for an ended relative is then "unknowable"
    kernel lines              belong to no call: nobody can tell what to replay; unknowable
    overwritten snapshots     show a later program of the same process; until that one begins, all is unknowable
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mmubus.file import File
from mmubus.inspection import InitialMapping, Mapping
from mmubus.linux import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MREMAP_FIXED,
    PAGE_SHIFT,
    PAGE_SIZE,
    TASK_SIZE,
    Op,
)
from mmubus.operations import Result
from mmubus.trace.compare import Outcome
from mmubus.trace.contents import Contents, Region, pattern
from mmubus.trace.format import FAULTS, Notified, Operation, Snapshot
from mmubus.trace.player import CALLS, Player, Space, notified, page_end
from mmubus.trace.program_files import FileKey, FilePlan, key_of, plan_files
from mmubus.trace.reconcile import Repair, repairs_of

__all__ = ["ProgramPlayer"]

PAGE_KINDS = {"f": 0, "a": 1, "s": 2}
FIRST_BREAK = 0x21000  # what malloc asks for first beyond the old break, when nothing tells where that was


@dataclass(slots=True)
class ProgramPlayer(Player):
    """Plays one program recording."""

    spaces: dict[int, Space] = field(default_factory=dict)  # by the recording's process
    families: dict[int, int] = field(default_factory=dict)  # process -> the process whose snapshot it all began with
    ghosts: dict[int, list[int]] = field(default_factory=dict)  # family -> forks whose child's end is not told
    forks: dict[int, int] = field(default_factory=dict)  # process -> the operation that forked it
    plan: FilePlan = field(default_factory=FilePlan)
    opened: dict[FileKey, File] = field(default_factory=dict)
    ends_told: bool = True
    overwritten: set[int] = field(default_factory=set)  # `process` lines whose snapshot is not their own
    repaired: Repair = field(default_factory=Repair)
    attached: set[int] = field(default_factory=set)

    async def prepare(self) -> None:
        """Files are made when they are first mapped; their sizes must be known before."""
        self.plan = plan_files(self.trace.operations)
        self.ends_told = any(operation.op == "unmapped" for operation in self.trace.operations)
        self.overwritten = overwritten_snapshots(self.trace.operations)

    async def step(self, operation: Operation) -> None:
        """Play one operation."""
        space = self.spaces.get(operation.pid)
        if operation.op == "process":
            await self._process(operation, space)
        elif operation.op in ("kernel", "thread", "exit_group") or space is None:
            await self.drain()
            untold = space is None or operation.op == "kernel"
            self.books.enter(operation, None, lambda notified: untold)
        elif operation.op == "unmapped":
            await self._ended(operation, space)
        elif operation.op in ("exit", "execve"):
            await self._leaving(operation, space)
        elif operation.op in FAULTS:
            await self._fault(operation, space)
        else:
            await self._call(operation, space)

    async def cleanup(self) -> None:
        """Whatever still lives ends, the files go."""
        for space in self.spaces.values():
            await self.call(Op.EXIT, space=space, told=False)
            self.crew.forget(space.mm)
        self.spaces.clear()
        for file in self.opened.values():
            await file.unlink()

    def remarks(self) -> list[str]:
        """What was reconciled, and why something may be unknowable."""
        found = []
        if self.repaired.pages or self.repaired.mappings:
            found.append(
                f"children ran unseen until their notifier was attached: {self.repaired.pages:,} pages and "
                f"{self.repaired.mappings:,} mappings were made what their snapshots show"
            )
        if self.overwritten:
            found.append(
                f"{len(self.overwritten):,} snapshots are those of a later program of the same process: unknowable"
            )
        if not self.ends_told:
            found.append("this recording does not say when an ended process's pages went: copies may be unknowable")
        return found

    # A process begins.

    async def _process(self, operation: Operation, space: Space | None) -> None:
        await self.drain()
        pid = operation.pid
        if space is not None and operation.why == "fork" and not space.attached:
            space.attached = True
            await self._reconcile(operation, space)
        else:
            if space is not None:  # an earlier mm of this process is gone
                await self._end(space)
            if operation.number in self.overwritten:
                self.books.enter(operation, None)
                return
            space = await self._create(operation)
            self.spaces[pid] = space
            self.families[pid] = pid
            await self.crew.attach(space.mm)
        self.attached.add(space.mm)
        self.books.enter(operation, None)

    async def _create(self, operation: Operation) -> Space:
        """An address space as the snapshot shows it."""
        maps = [mapping for mapping in operation.maps if mapping.end <= TASK_SIZE]
        brk = next((mapping.end for mapping in maps if mapping.name == "[heap]"), 0)
        brk = brk or first_break(self._rest(operation), maps)
        contents = Contents(self.files)
        initial = []
        for mapping in maps:
            file = await self._open(key) if (key := key_of(mapping)) else 0
            shared = mapping.protection.endswith("s")
            contents.map(Region(mapping.start, mapping.end, shared, file or None, mapping.offset))
            resident = [(first, end, PAGE_KINDS[kind]) for first, end, kind in mapping.resident]
            flags = mapping.flags or (("gd",) if mapping.name == "[stack]" else ())
            line = Mapping(mapping.start, mapping.end, mapping.protection, mapping.offset, file, mapping.name, 0, flags)
            initial.append(InitialMapping(line, resident))
            for first, end, kind in mapping.resident:
                if kind != "f" and file:  # a private copy of a page that nobody has written since
                    contents.touched(mapping.start + first * PAGE_SIZE, mapping.start + end * PAGE_SIZE, whole=True)
        name = f"{self.trace.name}/{operation.pid}"
        mm = await self.bus.create_mm(name, initial=initial, brk=brk, huge_pages=self.huge_pages)
        return Space(mm.id, operation.pid, contents, brk)

    def _rest(self, operation: Operation) -> Iterable[Operation]:
        """What the same process does after this line, until its mm is replaced."""
        at = self.trace.operations.index(operation)
        for later in self.trace.operations[at + 1 :]:
            if later.pid == operation.pid:
                if later.op in ("process", "unmapped"):
                    return
                yield later

    async def _open(self, key: FileKey) -> int:
        """The server's number of a file, which is made when it is first needed."""
        if key not in self.opened:
            size, kind = self.plan.sizes[key], self.plan.kinds[key]
            self.opened[key] = await self.bus.open_file(size=size, kind=kind, cached=True)
        return self.opened[key].id

    async def _reconcile(self, operation: Operation, space: Space) -> None:
        """The child ran unseen between its fork and this snapshot: carry out what it must have done."""
        there = await self.bus.inspection.maps(space.mm)
        pages = await self.bus.inspection.pagemap(space.mm)
        repair = repairs_of(operation.maps, there, pages)
        await self.crew.settle(space.mm)
        for op, *args in repair.calls:
            result = await self.call(op, *args, space=space, told=False)
            if result.errno_name:
                continue
            if op == Op.MMAP:
                space.contents.map(Region(args[0], args[0] + args[1], shared=False))
            elif op == Op.MUNMAP:
                space.contents.unmap(args[0], args[0] + args[1])
            elif op == Op.WRITE:
                space.contents.touched(args[0], args[0] + args[1], whole=True)
        self.repaired = self.repaired.plus(repair)

    # A process ends.

    async def _leaving(self, operation: Operation, space: Space) -> None:
        """exit, or an execve: the end of the mm is told by `unmapped`, if this recording has such lines."""
        await self.drain()
        if not self.ends_told and operation.err is None:
            pid = operation.pid
            self.ghosts.setdefault(self.families[pid], []).append(self.forks.get(pid, operation.number))
            await self._end(space)
        self.books.enter(operation, None)

    async def _ended(self, operation: Operation, space: Space) -> None:
        await self.drain()
        result = await self._end(space)
        # Its notifier went with KVM's release, before the first page: what is reported here the kernel could not see.
        self.books.enter(operation, Outcome(result.errno_name or None))

    async def _end(self, space: Space) -> Result:
        await self.crew.settle(space.mm)
        self.crew.forget(space.mm)
        self.attached.discard(space.mm)
        del self.spaces[space.pid]
        return await self.call(Op.EXIT, space=space, told=False)

    # What it does between.

    async def _fault(self, operation: Operation, space: Space) -> None:
        """A page fault. Pipelined."""
        address = operation.args[0] & -PAGE_SIZE
        region = space.contents.region(address)
        if operation.during == "execve" and region is None:  # the kernel sets up the new image, which is not known yet
            self.books.enter(operation, None)
            return
        if operation.op == "write" and not self.crew.empty:
            if region is not None and region.shared:
                await self.drain()
                await self.crew.settle()
            elif self.crew.asked(space.mm, address):
                await self.drain()
                await self.crew.settle(space.mm, address, address + PAGE_SIZE)
        if operation.protection:  # it was mapped: if it is not here, it is mapped first, and nothing happens if it is
            await self.submit(_ignored, Op.READ, address, PAGE_SIZE, space=space, told=False)
        untold = self._untold(space, operation)

        def then(result: Result) -> None:
            self._faulted(operation, space, result, untold)

        if operation.op == "write" and not self.crew.empty:
            data = pattern(space.mm, address, operation.number)
            await self.submit(then, Op.STORE, address, space=space, data=data)
        else:
            await self.submit(then, CALLS[operation.op], address, PAGE_SIZE, space=space)

    def _faulted(self, operation: Operation, space: Space, result: Result, untold: bool) -> None:
        address = operation.args[0] & -PAGE_SIZE
        if not result.errno_name:
            if operation.op == "write" and not self.crew.empty:
                space.contents.written(address, pattern(space.mm, address, operation.number))
            self.touched(space, address, address + PAGE_SIZE, written=operation.op == "write")
        outcome = Outcome(result.errno_name or None, None, self._seen(result))
        self.books.enter(operation, outcome, lambda notified: untold)

    def _untold(self, space: Space, operation: Operation) -> bool:
        """Whether a copy that the kernel makes here depends on a relative whose end the recording does not tell.

        The page may still be shared with every process forked from this family after it was last written here; a
        process that ended at a line which does not say when its pages went is such a one.
        """
        page = operation.args[0] >> PAGE_SHIFT
        since = space.written.get(page, -1)
        if operation.op == "write":
            space.written[page] = operation.number
        ghosts = self.ghosts.get(self.families.get(space.pid, space.pid), ())
        return operation.op == "write" and operation.protection and any(fork > since for fork in ghosts)

    def _seen(self, result: Result) -> tuple[Notified, ...]:
        """The notifications that a recorder would have seen: of processes that had their notifier."""
        return notified(result, self.attached.__contains__)

    async def _call(self, operation: Operation, space: Space) -> None:
        """A memory call: as the program made it, at the address that the kernel chose."""
        if operation.op == "fork" and operation.err is not None:
            self.books.enter(operation, None)
            return
        await self.before(operation, space)
        file, offset = 0, 0
        args = operation.args
        if operation.op == "mmap":
            file, offset = await self._file_of(operation), args[5]
            flags = args[3] if operation.ret is None else args[3] | MAP_FIXED
            args = (args[0] if operation.ret is None else operation.ret, *args[1:3], flags, file, offset)
            if args[3] & MAP_ANONYMOUS and args[3] & 1:
                file = -1 - operation.number  # a file of its own, which nobody else has
        elif operation.op == "mremap" and operation.ret not in (None, args[0]):
            assert operation.ret is not None
            args = (*args[:3], args[3] | MREMAP_FIXED, operation.ret)
        elif operation.op == "brk" and not space.brk and operation.ret is not None:
            space.brk = operation.ret
        result = await self.call(CALLS[operation.op], *args, space=space)
        ret: int | None = None if result.errno_name else result.ret
        if operation.op == "fork" and ret is not None:
            await self._forked(operation, space, ret)
            ret = operation.ret
        self.follow(operation, space, result, file=file or None, offset=offset)
        self.books.enter(operation, Outcome(result.errno_name or None, ret, self._seen(result)))

    async def _file_of(self, operation: Operation) -> int:
        key = self.plan.mapped.get(operation.number)
        return await self._open(key) if key is not None else 0

    async def _forked(self, operation: Operation, space: Space, mm: int) -> None:
        """The child lives; if nobody saw it start, it ends at once."""
        child = Space(mm, operation.child or 0, space.contents.fork(), space.brk, attached=False)
        if operation.child is None:
            await self.call(Op.EXIT, space=child, told=False)
            return
        self.spaces[operation.child] = child
        self.families[operation.child] = self.families.get(space.pid, space.pid)
        self.forks[operation.child] = operation.number
        await self.crew.attach(mm)


def overwritten_snapshots(operations: Sequence[Operation]) -> set[int]:
    """`process` lines with the snapshot of a later program of the same process.

    Some recorders keep one file for each process, so that of two programs that it runs one after another both lines
    show the second. No two programs start with the same addresses, so equal snapshots tell.
    """
    latest: dict[tuple[int, str], Operation] = {}
    found = set()
    for operation in operations:
        if operation.op == "process":
            before = latest.get((operation.pid, operation.why))
            if before is not None and before.maps == operation.maps:
                found.add(before.number)
            latest[operation.pid, operation.why] = operation
    return found


def first_break(rest: Iterable[Operation], maps: Sequence[Snapshot]) -> int:
    """Where the program break is when no mapping tells: brk(0) says it, or the lowest page touched below the new one.

    Returns: bytes; 0 when the process never calls brk.
    """
    ends = [mapping.end for mapping in maps]
    touched: list[int] = []
    new = 0
    for operation in rest:
        if operation.op in FAULTS:
            touched.append(operation.args[0] & -PAGE_SIZE)
        elif operation.op == "brk" and operation.ret:
            if new == 0 and operation.args[0] == 0:
                return operation.ret
            if new:
                break
            new = operation.ret
    floor = max((end for end in ends if end <= new), default=0)
    below = [page for page in touched if floor <= page < new]
    return min([page_end(max(0, new - FIRST_BREAK)), *below]) if new else 0


def _ignored(result: Result) -> None:
    """Mapping a page that should have been there: where it cannot be, the fault itself says so."""
