"""The same without asyncio.

    with mmubus.sync.connect(name="my-driver") as bus:
        mm = bus.create_mm("program")
        address = mm.mmap(0, 1 << 20)
        mirror = bus.mirror(mm)
        mirror.write(address, b"hello")

Names, arguments and errors are those of the asynchronous face; nothing is awaited. A thread of the library's own runs
the connection, so notices are handled and acknowledged while the program does something else.

Handlers of notifiers run, as `connect(handlers=…)` says,
    "loop":    in that thread: the fast way, for handlers that touch their own tables and return. Calling back into
               the library raises CalledFromHandler there.
    "worker":  in a thread pool: for handlers that take time or call back. Overlapping ranges still run in order.
Either way they run beside the program: what both touch needs a lock.

Every call has the time-out of `connect(timeout_s=…)`. An interrupt (Ctrl-C) ends the call that waits, and leaving the
`with` block says goodbye to the server as always. One thread of a process should connect this way or with asyncio,
not both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

from mmubus import address_space as aio_address_space
from mmubus import connection as aio
from mmubus import device as aio_device
from mmubus import file as aio_file
from mmubus import mirror as aio_mirror
from mmubus import registration as aio_registration
from mmubus.channel import default_address
from mmubus.device import Translations
from mmubus.errors import Fenced
from mmubus.inspection import InitialMapping, Mapping, PageRun
from mmubus.linux import MAP_ANONYMOUS, MAP_PRIVATE, MS_SYNC, PROT_READ, PROT_WRITE, FileKind, Op
from mmubus.mirror import Entry, MirrorStatistics, Style
from mmubus.notifier import METHODS, Notifier, RmapNotifier, ops_of
from mmubus.operations import Result
from mmubus.portal import Portal
from mmubus.session import SessionOptions

__all__ = ["AddressSpace", "Bus", "File", "Handlers", "Mirror", "Pin", "Registration", "connect"]

Handlers: TypeAlias = Literal["loop", "worker"]
T = TypeVar("T")
Run: TypeAlias = "Callable[[Coroutine[Any, Any, Any]], Any]"


@contextmanager
def connect(
    address: str | None = None,
    *,
    name: str = "",
    ack_budget_s: float = 0.0,
    lease_s: float = 0.0,
    reattach: bool = False,
    on_fenced: Callable[[Fenced], None] | None = None,
    handlers: Handlers = "loop",
    timeout_s: float | None = 60.0,
) -> Iterator[Bus]:
    """Connect to a server; see `mmubus.connect`.

    Args:
        handlers: where handlers run; see above. on_fenced always runs in the library's thread.
        timeout_s: seconds that each call may take; None: for ever.
    """
    options = SessionOptions(name, ack_budget_s, lease_s, reattach, on_fenced)
    portal = Portal.enter()
    bus = None
    try:
        bus = Bus(portal, address or default_address(), options, handlers, timeout_s)
        yield bus
    finally:
        if bus is not None:
            bus.close()
        portal.leave()


class Bus:
    """A connection; see `mmubus.Bus`. Attributes: aio: the asynchronous one below, for the library's thread only."""

    def __init__(
        self, portal: Portal, address: str, options: SessionOptions, handlers: Handlers, timeout_s: float | None
    ) -> None:
        self._portal = portal
        self._timeout_s = timeout_s
        self._handlers = handlers
        self._pool: ThreadPoolExecutor | None = None
        self.aio: aio.Bus = portal.run(_make_bus(address, options))

    def __repr__(self) -> str:
        return f"<sync {self.aio!r}>"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the asynchronous face in the library's thread, and wait for it."""
        return self._portal.run(work, self._timeout_s)

    def create_mm(self, name: str = "", *, initial: Sequence[InitialMapping] = (), brk: int = 0) -> AddressSpace:
        """Make an address space."""
        return AddressSpace(self.run, self.run(self.aio.create_mm(name, initial=initial, brk=brk)))

    def mm(self, mm: int) -> AddressSpace:
        """An address space that exists already, by its number."""
        return AddressSpace(self.run, self.aio.mm(mm))

    def open_file(self, name: str = "", *, size: int = 0, kind: FileKind = FileKind.DISK, cached: bool = False) -> File:
        """Make a file, or open the one of that name."""
        return File(self.run, self.run(self.aio.open_file(name, size=size, kind=kind, cached=cached)))

    def operate(self, calls: Iterable[tuple[Op, *tuple[int, ...]]], *, mm: int = 0, thread: int = 0) -> list[Result]:
        """Many calls, pipelined, in order: each an Op with Linux's arguments. Returns: their results, in order."""
        return self.run(self._operate(list(calls), mm, thread))

    async def _operate(self, calls: list[tuple[Op, *tuple[int, ...]]], mm: int, thread: int) -> list[Result]:
        async with self.aio.operations(mm=mm.__index__()) as operations:
            futures = [await operations.submit(op, *args, thread=thread) for op, *args in calls]
            return [await future for future in futures]

    def register(self, notifier: Notifier, mm: AddressSpace | int, **options: Any) -> Registration:
        """Register a notifier; options as in `mmubus.Bus.register`."""
        placed = notifier if self._handlers == "loop" else _InWorker(notifier, self._workers())
        raw = self.run(self.aio.register(placed, mm.__index__(), **options))
        notifier.registration = raw
        return Registration(self.run, self._portal, raw)

    def register_rmap(self, notifier: RmapNotifier, **options: Any) -> Registration:
        """Register an rmap notifier; options as in `mmubus.Bus.register_rmap`."""
        placed = notifier if self._handlers == "loop" else _RmapInWorker(notifier, self._workers())
        raw = self.run(self.aio.register_rmap(placed, **options))
        notifier.registration = raw
        return Registration(self.run, self._portal, raw)

    def mirror(self, mm: AddressSpace | int, *, style: Style = "seed", **options: Any) -> Mirror:
        """A registered mirror of an address space; options as in `mmubus.Bus.mirror`."""
        return Mirror(self.run, self._portal, self.run(self.aio.mirror(mm.__index__(), style=style, **options)))

    def close(self) -> None:
        """Say goodbye and close. Idempotent."""
        self._portal.run(self.aio.close())
        if self._pool is not None:
            self._pool.shutdown()

    def _workers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(thread_name_prefix="mmubus handler")
        return self._pool


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
        address: int = self._run(self.aio.mmap(addr, length, prot, flags, file.__index__(), offset))
        return address

    def munmap(self, addr: int, length: int) -> None:
        """munmap(2)."""
        self._run(self.aio.munmap(addr, length))

    def mprotect(self, addr: int, length: int, prot: int) -> None:
        """mprotect(2)."""
        self._run(self.aio.mprotect(addr, length, prot))

    def mremap(self, addr: int, old_length: int, new_length: int, flags: int = 0, new_addr: int = 0) -> int:
        """mremap(2)."""
        address: int = self._run(self.aio.mremap(addr, old_length, new_length, flags, new_addr))
        return address

    def madvise(self, addr: int, length: int, advice: int) -> None:
        """madvise(2)."""
        self._run(self.aio.madvise(addr, length, advice))

    def brk(self, addr: int = 0) -> int:
        """brk(2)."""
        program_break: int = self._run(self.aio.brk(addr))
        return program_break

    def msync(self, addr: int, length: int, flags: int = MS_SYNC) -> None:
        """msync(2)."""
        self._run(self.aio.msync(addr, length, flags))

    def mlock(self, addr: int, length: int) -> None:
        """mlock(2)."""
        self._run(self.aio.mlock(addr, length))

    def munlock(self, addr: int, length: int) -> None:
        """munlock(2)."""
        self._run(self.aio.munlock(addr, length))

    def fork(self, name: str = "") -> AddressSpace:
        """fork(2)."""
        return AddressSpace(self._run, self._run(self.aio.fork(name)))

    def exit(self) -> None:
        """exit."""
        self._run(self.aio.exit())

    def load(self, addr: int, length: int) -> bytes:
        """Read bytes by virtual address, as the CPU would."""
        data: bytes = self._run(self.aio.load(addr, length))
        return data

    def store(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes by virtual address, as the CPU would."""
        self._run(self.aio.store(addr, data))

    def touch(self, addr: int, length: int, *, write: bool = False, execute: bool = False) -> int:
        """One access a page, without bytes."""
        value: int = self._run(self.aio.touch(addr, length, write=write, execute=execute))
        return value

    def call(self, op: Op, *args: int, data: bytes = b"") -> int:
        """Any call by its number and Linux's arguments."""
        value: int = self._run(self.aio.call(op, *args, data=data))
        return value

    def maps(self) -> list[Mapping]:
        """The mappings, as /proc/PID/maps."""
        mappings: list[Mapping] = self._run(self.aio.maps())
        return mappings

    def pagemap(self, start: int = 0, end: int = 0) -> list[PageRun]:
        """The pages that are present."""
        runs: list[PageRun] = self._run(self.aio.pagemap(start, end))
        return runs


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
        data: bytes = self._run(self.aio.pread(length, offset))
        return data

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> int:
        """pwrite(2)."""
        written: int = self._run(self.aio.pwrite(data, offset))
        return written

    def truncate(self, size: int) -> None:
        """ftruncate(2)."""
        self._run(self.aio.truncate(size))

    def fsync(self) -> None:
        """fsync(2)."""
        self._run(self.aio.fsync())

    def punch_hole(self, offset: int, length: int) -> None:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE."""
        self._run(self.aio.punch_hole(offset, length))

    def unlink(self) -> None:
        """unlink(2)."""
        self._run(self.aio.unlink())


class Registration:
    """A registration; see `mmubus.Registration`."""

    def __init__(self, run: Run, portal: Portal, raw: aio_registration.Registration) -> None:
        self._run = run
        self._portal = portal
        self.aio = raw

    def __repr__(self) -> str:
        return repr(self.aio)

    @property
    def id(self) -> int:
        """The server's number."""
        return self.aio.id

    @property
    def warnings(self) -> tuple[str, ...]:
        """What will slip through because an op is missing."""
        return self.aio.warnings

    @property
    def endangered(self) -> bool:
        """True while nothing that is held may be used."""
        endangered: bool = self._run(_get(lambda: self.aio.endangered))
        return endangered

    def unregister(self) -> None:
        """Take the notifier off its list. Nothing is delivered after this returns."""
        self._run(self.aio.unregister())

    def fault(
        self,
        start: int,
        end: int,
        write: bool = False,
        *,
        commit: Callable[[Translations], None] | None = None,
        wait_s: float = 0.0,
    ) -> Translations:
        """Fault pages in; commit runs in the library's thread, where no handler of "loop" can come between."""
        granted: Translations = self._run(self.aio.fault(start, end, write, commit=commit, wait_s=wait_s))
        return granted

    def snapshot(self, start: int, end: int) -> Translations:
        """Look at the page table without faulting."""
        seen: Translations = self._run(self.aio.snapshot(start, end))
        return seen

    def pin(self, start: int, end: int, write: bool = False) -> Pin:
        """Pin pages for the long term."""
        return Pin(self._run, self._run(self.aio.pin(start, end, write)))

    def dma_read(self, addr: int, length: int, pfns: Sequence[int], generations: Sequence[int]) -> bytes:
        """Read memory through translations."""
        data: bytes = self._run(self.aio.dma_read(addr, length, pfns, generations))
        return data

    def dma_write(self, addr: int, data: bytes, pfns: Sequence[int], generations: Sequence[int]) -> None:
        """Write memory through translations."""
        self._run(self.aio.dma_write(addr, data, pfns, generations))

    def export(
        self,
        mm: AddressSpace | int,
        start: int,
        end: int,
        write: bool = False,
        *,
        commit: Callable[[Translations], None] | None = None,
    ) -> Translations:
        """Export pages through an rmap registration."""
        granted: Translations = self._run(self.aio.export(mm.__index__(), start, end, write, commit=commit))
        return granted

    def unexport(self, pfns: Sequence[int], dirty: Sequence[int] = ()) -> None:
        """Give exports back."""
        self._run(self.aio.unexport(pfns, dirty))


class Pin:
    """Pinned pages; see `mmubus.Pin`."""

    def __init__(self, run: Run, raw: aio_device.Pin) -> None:
        self._run = run
        self.aio = raw
        self.translations = raw.translations

    def read(self, offset: int, length: int) -> bytes:
        """Read through the pin."""
        data: bytes = self._run(self.aio.read(offset, length))
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write through the pin."""
        self._run(self.aio.write(offset, data))

    def unpin(self, *, dirty: bool = False) -> None:
        """Give the pin back."""
        self._run(self.aio.unpin(dirty=dirty))


class Mirror:
    """A shadow page table; see `mmubus.Mirror`."""

    def __init__(self, run: Run, portal: Portal, raw: aio_mirror.Mirror) -> None:
        self._run = run
        self.aio = raw
        assert raw.registration is not None
        self.registration = Registration(run, portal, raw.registration)

    @property
    def held(self) -> dict[int, Entry]:
        """What is held now: a copy."""
        held: dict[int, Entry] = self._run(_get(lambda: self.aio.held))
        return held

    @property
    def valid(self) -> bool:
        """False while nothing may be used."""
        valid: bool = self._run(_get(lambda: self.aio.valid))
        return valid

    @property
    def statistics(self) -> MirrorStatistics:
        """Counters."""
        return self.aio.statistics

    def read(self, address: int, length: int) -> bytes:
        """Read memory as the device sees it."""
        data: bytes = self._run(self.aio.read(address, length))
        return data

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write memory through the device."""
        self._run(self.aio.write(address, data))

    def fault(self, start: int, end: int, *, write: bool = False) -> None:
        """Hold every page of [start, end) that may be had."""
        self._run(self.aio.fault(start, end, write=write))


async def _make_bus(address: str, options: SessionOptions) -> aio.Bus:
    return aio.Bus(address, options)


async def _get(look: Callable[[], T]) -> T:
    """Look at something that belongs to the library's thread."""
    return look()


def _elsewhere(pool: ThreadPoolExecutor, method: Callable[..., Any]) -> Callable[..., Any]:
    async def handler(*args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, partial(method, *args))

    handler.__name__ = method.__name__
    return handler


class _InWorker(Notifier):
    """A notifier whose handlers run in a thread pool. It has the ops that the one inside has."""

    def __init__(self, inside: Notifier, pool: ThreadPoolExecutor) -> None:
        for op in ops_of(inside):
            setattr(self, METHODS[op], _elsewhere(pool, getattr(inside, METHODS[op])))
        self.invalidated_everything = _elsewhere(pool, inside.invalidated_everything)  # type: ignore[method-assign]
        self.jeopardy = inside.jeopardy  # type: ignore[method-assign]


class _RmapInWorker(RmapNotifier):
    """The same for the rmap list."""

    def __init__(self, inside: RmapNotifier, pool: ThreadPoolExecutor) -> None:
        self.invalidate_page = _elsewhere(pool, inside.invalidate_page)  # type: ignore[method-assign]
        self.invalidated_everything = _elsewhere(pool, inside.invalidated_everything)  # type: ignore[method-assign]
        self.jeopardy = inside.jeopardy  # type: ignore[method-assign]
