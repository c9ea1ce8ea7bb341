"""The core beside a dict of pages: calls, accesses, forks, files, device faults and pins in any order.

The model knows nothing of frames or page tables: an address space is a dict from page number to what a load gives.
After each step every invariant is recomputed, and what devices have is what the page tables say.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mm.driver import ANON_PRIVATE, ANON_SHARED, BASE, FIXED, Mirror, at, run
from mmubusd.mm import Memory, Mm, MmError, device, device_exclusive
from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.check import check_idle
from mmubusd.mm.device_memory import Select
from mmubusd.mm.madvise import (
    COLD,
    DONTFORK,
    DONTNEED,
    FREE,
    MERGEABLE,
    PAGEOUT,
    POPULATE_READ,
    POPULATE_WRITE,
    SOFT_OFFLINE,
    WIPEONFORK,
)
from mmubusd.mm.notification import Operation

ARENA = 48
FILE_PAGES = 12
DEVICE = 99
ZERO = bytes(8)

page_numbers = st.integers(0, ARENA - 1)
counts = st.integers(1, 10)
mm_choice = st.integers(0, 3)
data = st.binary(min_size=8, max_size=8)
protections = st.sampled_from([0, 1, 3, 3, 3])


@dataclass
class FileModel:
    """Page number to its first 8 bytes; what is not there is zeros."""

    pages_nr: int
    pages: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """One mapped page. own: a private copy's bytes; lazy: its bytes may turn to zeros at any time."""

    prot: int
    shared: bool
    file: FileModel | None = None
    index: int = 0
    own: bytes | None = None
    lazy: bool = False
    dont_fork: bool = False
    wipe: bool = False


Space = dict[int, Page]


class Machine(RuleBasedStateMachine):
    def make_memory(self) -> Memory:
        return Memory(frames_nr=2048, nodes_nr=2)

    @initialize()
    def begin(self) -> None:
        self.memory = self.make_memory()
        self.mirror = Mirror(self.memory)
        self.files = []
        for kind in ("disk", "shm", "xip"):
            file = self.memory.create_file(kind, kind, FILE_PAGES, cached=kind == "disk")
            self.files.append((file, FileModel(FILE_PAGES)))
        self.spaces: list[tuple[Mm, Space]] = []
        self.pins: list[tuple[Mm, list[int], list[int]]] = []
        self._adopt(self.memory.create_mm("first"), {})

    def _adopt(self, mm: Mm, space: Space) -> None:
        mm.notified = len(self.spaces) != 1  # one of them has nobody registered
        self.spaces.append((mm, space))

    def _pick(self, choice: int) -> tuple[Mm, Space]:
        return self.spaces[choice % len(self.spaces)]

    def _attempt(self, operation: Operation[Any]) -> tuple[Any, str | None]:
        """The result and no error, or the errno."""
        try:
            return run(operation, self.mirror.hear), None
        except MmError as error:
            return None, error.errno

    def _call(self, operation: Operation[Any]) -> str | None:
        return self._attempt(operation)[1]

    # Calls

    @rule(mm=mm_choice, page=page_numbers, count=counts, prot=protections, shared=st.booleans(), populate=st.booleans())
    def map_anonymous(self, mm: int, page: int, count: int, prot: int, shared: bool, populate: bool) -> None:
        space, pages = self._pick(mm)
        flags = (ANON_SHARED if shared else ANON_PRIVATE) | FIXED | (0x8000 if populate else 0)
        assert self._call(space.mmap(at(page), count * PAGE_SIZE, prot, flags)) is None
        file = FileModel(count) if shared else None
        for n in range(count):
            pages[page + n] = Page(prot, shared, file, n)

    @rule(
        mm=mm_choice, page=page_numbers, count=counts, prot=protections, shared=st.booleans(),
        which=st.integers(0, 2), offset=st.integers(0, FILE_PAGES - 1),
    )  # fmt: skip
    def map_file(self, mm: int, page: int, count: int, prot: int, shared: bool, which: int, offset: int) -> None:
        space, pages = self._pick(mm)
        file, model = self.files[which]
        flags = (1 if shared else 2) | FIXED
        assert self._call(space.mmap(at(page), count * PAGE_SIZE, prot, flags, file, offset * PAGE_SIZE)) is None
        for n in range(count):
            pages[page + n] = Page(prot, shared, model, offset + n)

    @rule(mm=mm_choice, page=page_numbers, count=counts)
    def unmap(self, mm: int, page: int, count: int) -> None:
        space, pages = self._pick(mm)
        assert self._call(space.munmap(at(page), count * PAGE_SIZE)) is None
        for n in range(page, page + count):
            pages.pop(n, None)

    @rule(mm=mm_choice, page=page_numbers, count=counts, prot=protections)
    def protect(self, mm: int, page: int, count: int, prot: int) -> None:
        space, pages = self._pick(mm)
        error = self._call(space.mprotect(at(page), count * PAGE_SIZE, prot))
        for n in range(page, page + count):
            if n not in pages:
                assert error == "ENOMEM"
                return
            pages[n] = replace(pages[n], prot=prot)
        assert error is None

    @rule(mm=mm_choice, page=page_numbers, count=counts, to=page_numbers, keep=st.booleans())
    def move(self, mm: int, page: int, count: int, to: int, keep: bool) -> None:
        space, pages = self._pick(mm)
        size = count * PAGE_SIZE
        error = self._call(space.mremap(at(page), size, size, 7 if keep else 3, at(to)))
        if abs(to - page) < count:
            assert error == "EINVAL"
        elif page not in pages:
            assert error == "EFAULT"
        else:
            assert error is None
            for n in range(page, page + count):
                if n in pages:
                    pages[n - page + to] = pages[n]
                    if keep:
                        pages[n] = replace(pages[n], own=None, lazy=False)
                    else:
                        del pages[n]

    @rule(mm=mm_choice, page=page_numbers, count=counts, advice=st.sampled_from([DONTNEED, FREE, COLD, PAGEOUT]))
    def advise(self, mm: int, page: int, count: int, advice: int) -> None:
        space, pages = self._pick(mm)
        error = self._call(space.madvise(at(page), count * PAGE_SIZE, advice))
        for n in range(page, page + count):
            if n not in pages:
                continue
            if advice == FREE and (pages[n].file is not None or pages[n].shared):
                assert error == "EINVAL"
                return
            if advice == DONTNEED:
                pages[n] = replace(pages[n], own=None, lazy=False)
            elif advice == FREE and pages[n].own is not None:
                pages[n] = replace(pages[n], lazy=True)
        assert error == (None if all(n in pages for n in range(page, page + count)) else "ENOMEM")

    # What moves pages and changes no byte

    @rule(mm=mm_choice, page=page_numbers, count=counts, node=st.integers(0, 1))
    def move_pages(self, mm: int, page: int, count: int, node: int) -> None:
        space, _ = self._pick(mm)
        assert self._call(space.move_pages(at(page), count * PAGE_SIZE, node)) is None

    @rule(mm=mm_choice, old=st.integers(1, 3), new=st.integers(1, 3))
    def migrate_pages(self, mm: int, old: int, new: int) -> None:
        space, _ = self._pick(mm)
        assert self._call(space.migrate_pages(old, new)) is None

    @rule(
        mm=mm_choice, page=page_numbers, count=counts, mode=st.sampled_from([0, 1, 2, 3, 4]), nodes=st.integers(1, 3),
        move=st.sampled_from([0, 2, 4]),
    )  # fmt: skip
    def bind(self, mm: int, page: int, count: int, mode: int, nodes: int, move: int) -> None:
        space, pages = self._pick(mm)
        if mode == 2 and self.memory.frames.frames_nr < 1000:
            mode = 1  # who is bound may find no memory where others do
        error = self._call(space.mbind(at(page), count * PAGE_SIZE, mode, 0 if mode in (0, 4) else nodes, move))
        mapped = [n in pages for n in range(page, page + count)]
        assert error == (None if (any(mapped) if mode == 0 else all(mapped)) else "EFAULT")

    @rule(mm=mm_choice, page=page_numbers)
    def soft_offline(self, mm: int, page: int) -> None:
        space, _ = self._pick(mm)
        if self.memory.frames.frames_nr > 1000:  # each takes a frame away for good
            assert self._call(space.madvise(at(page), PAGE_SIZE, SOFT_OFFLINE)) in (None, "EFAULT", "EBUSY", "EIO")

    @rule(which=st.integers(0, 2), first=st.integers(0, FILE_PAGES - 1), clean=st.booleans())
    def dirty_helpers(self, which: int, first: int, clean: bool) -> None:
        track = self.memory.clean_record if clean else self.memory.wp_shared
        assert self._call(track(self.files[which][0], first * PAGE_SIZE, PAGE_SIZE)) is None

    @rule(mm=mm_choice, page=page_numbers, count=counts, back=st.booleans(), coherent=st.booleans())
    def device_memory(self, mm: int, page: int, count: int, back: bool, coherent: bool) -> None:
        space, pages = self._pick(mm)
        if back:
            select = Select.DEVICE_COHERENT if coherent else Select.DEVICE_PRIVATE
            assert self._call(space.migrate_to_system(at(page), at(page + count), DEVICE, select)) is None
        elif self.memory.frames.frames_nr > 1000:  # what is in a device's memory cannot be reclaimed
            error = self._call(space.migrate_to_device(at(page), at(page + count), DEVICE, coherent))
            readable = all(n in pages and pages[n].prot & 1 for n in range(page, page + count))
            assert error == (None if readable else "EINVAL")

    @rule(mm=mm_choice, page=page_numbers, count=counts)
    def exclusive(self, mm: int, page: int, count: int) -> None:
        space, pages = self._pick(mm)
        error = self._call(device_exclusive.make_exclusive(space, at(page), at(page + count), DEVICE))
        for n in range(page, page + count):
            if self._fault_error(pages.get(n), 2) is not None:
                assert error == "EFAULT"  # get_user_pages() knows no SIGBUS
                return
            if not pages[n].shared:  # written to as far as the kernel knows: a page of its own
                got, _ = self._attempt(space.load(at(n), 8))
                assert got == self._value(pages[n]) or (pages[n].lazy and got == ZERO)
                pages[n] = replace(pages[n], own=got, lazy=False)
        assert error is None

    @rule(mm=mm_choice, page=page_numbers, count=counts)
    def merge(self, mm: int, page: int, count: int) -> None:
        space, pages = self._pick(mm)
        error = self._call(space.madvise(at(page), count * PAGE_SIZE, MERGEABLE))
        assert error == (None if all(n in pages for n in range(page, page + count)) else "ENOMEM")
        assert self._call(self.memory.ksm_scan()) is None

    @rule(mm=mm_choice)
    def clear_soft_dirty(self, mm: int) -> None:
        space, _ = self._pick(mm)
        assert self._call(space.clear_refs(4)) is None
        assert space.soft_dirty(at(0), at(ARENA)) == []

    @rule(mm=mm_choice, page=page_numbers, count=counts, wipe=st.booleans())
    def fork_advice(self, mm: int, page: int, count: int, wipe: bool) -> None:
        space, pages = self._pick(mm)
        error = self._call(space.madvise(at(page), count * PAGE_SIZE, WIPEONFORK if wipe else DONTFORK))
        for n in range(page, page + count):
            if n in pages:
                if wipe and (pages[n].shared or pages[n].file is not None):
                    assert error == "EINVAL"
                    return
                pages[n] = replace(pages[n], **({"wipe": True} if wipe else {"dont_fork": True}))

    @rule(mm=mm_choice, page=page_numbers, count=counts, write=st.booleans())
    def populate(self, mm: int, page: int, count: int, write: bool) -> None:
        space, pages = self._pick(mm)
        error = self._call(space.madvise(at(page), count * PAGE_SIZE, POPULATE_WRITE if write else POPULATE_READ))
        for n in range(page, page + count):
            found = pages.get(n)
            if found is None:
                assert error == "ENOMEM"
                return
            if not found.prot & (2 if write else 1):
                assert error == "EINVAL"
                return
            if found.file is not None and found.index >= found.file.pages_nr and found.own is None:
                assert error == "EFAULT"
                return
            if write and not found.shared and found.own is None:
                self._write(pages, n, self._value(found))
        assert error is None

    # Accesses

    def _value(self, page: Page) -> bytes:
        if page.own is not None:
            return page.own
        return page.file.pages.get(page.index, ZERO) if page.file is not None else ZERO

    def _fault_error(self, page: Page | None, right: int) -> str | None:
        if page is None or not page.prot & right:
            return "EFAULT"
        if page.own is None and page.file is not None and page.index >= page.file.pages_nr:
            return "ENXIO"
        return None

    def _write(self, pages: Space, number: int, value: bytes) -> None:
        page = pages[number]
        if page.shared:
            assert page.file is not None
            page.file.pages[page.index] = value
        else:
            pages[number] = replace(page, own=value, lazy=False)

    @rule(mm=mm_choice, page=page_numbers, value=data)
    def store(self, mm: int, page: int, value: bytes) -> None:
        space, pages = self._pick(mm)
        error = self._call(space.store(at(page), value))
        assert error == self._fault_error(pages.get(page), 2)
        if error is None:
            self._write(pages, page, value)

    @rule(mm=mm_choice, page=page_numbers)
    def load(self, mm: int, page: int) -> None:
        space, pages = self._pick(mm)
        wanted = self._fault_error(pages.get(page), 7)
        got, error = self._attempt(space.load(at(page), 8))
        assert error == wanted
        if error is not None:
            return
        found = pages[page]
        if found.lazy and got == ZERO:
            pages[page] = replace(found, own=None, lazy=False)
        else:
            assert got == self._value(found)

    # Processes

    @precondition(lambda self: len(self.spaces) < 4)
    @rule(mm=mm_choice)
    def fork(self, mm: int) -> None:
        space, pages = self._pick(mm)
        child = run(space.fork(), self.mirror.hear)
        self._adopt(
            child,
            {
                n: replace(page, own=None, lazy=False) if page.wipe else page
                for n, page in pages.items()
                if not page.dont_fork
            },
        )

    @precondition(lambda self: len(self.spaces) > 1)
    @rule(mm=mm_choice)
    def exit(self, mm: int) -> None:
        space, _ = self.spaces.pop(mm % len(self.spaces))
        run(space.exit(), self.mirror.hear)
        assert space.id not in self.memory.mms

    # Files

    @rule(which=st.integers(0, 2), pages_nr=st.integers(0, FILE_PAGES + 2))
    def truncate(self, which: int, pages_nr: int) -> None:
        file, model = self.files[which]
        assert self._call(self.memory.ftruncate(file, pages_nr * PAGE_SIZE)) is None
        model.pages_nr = pages_nr
        for index in [index for index in model.pages if index >= pages_nr]:
            del model.pages[index]
        for _, pages in self.spaces:
            for n, page in pages.items():
                if page.file is model and page.index >= pages_nr:
                    pages[n] = replace(page, own=None)

    @rule(which=st.integers(0, 2), first=st.integers(0, FILE_PAGES - 1), count=st.integers(1, 5))
    def punch(self, which: int, first: int, count: int) -> None:
        file, model = self.files[which]
        assert self._call(self.memory.punch(file, first * PAGE_SIZE, count * PAGE_SIZE)) is None
        for index in range(first, first + count):
            model.pages.pop(index, None)

    @rule(which=st.integers(0, 2))
    def fsync(self, which: int) -> None:
        assert self._call(self.memory.fsync(self.files[which][0])) is None

    @rule(which=st.integers(0, 2), index=st.integers(0, FILE_PAGES - 1), value=data)
    def write_file(self, which: int, index: int, value: bytes) -> None:
        file, model = self.files[which]
        assert self._call(self.memory.write_file(file, index * PAGE_SIZE, value + bytes(PAGE_SIZE - 8))) is None
        model.pages_nr = max(model.pages_nr, index + 1)
        model.pages[index] = value

    @rule(which=st.integers(0, 2), index=st.integers(0, FILE_PAGES - 1))
    def read_file(self, which: int, index: int) -> None:
        file, model = self.files[which]
        got = self.memory.read_file(file, index * PAGE_SIZE, 8)
        assert got == (model.pages.get(index, ZERO) if index < model.pages_nr else b"")

    # Devices

    @rule(mm=mm_choice, page=page_numbers, count=counts, write=st.booleans())
    def device_fault(self, mm: int, page: int, count: int, write: bool) -> None:
        space, pages = self._pick(mm)
        if not space.notified:
            return
        entries, error = self._attempt(device.fault(space, at(page), at(page + count), write))
        if error is not None:
            assert error in ("EFAULT", "EPERM")
            self._resync(space, pages, page, count)
            return
        self.mirror.take(space, at(page), entries)
        for n, entry in enumerate(entries.tolist(), page):
            found = pages[n]
            got = self.memory.frames.read(entry & device.PFN_MASK, 0, 8)
            if found.lazy and got == ZERO:
                found = pages[n] = replace(found, own=None, lazy=False)
            assert got == self._value(found)
            if write and not found.shared:
                self._write(pages, n, got)

    def _resync(self, space: Mm, pages: Space, page: int, count: int) -> None:
        """A fault that failed half-way has made some private copies: what happens to the file no longer shows there."""
        for n in range(page, page + count):
            found = pages.get(n)
            pfn = space.pgtable.get(at(n) >> 12) >> 12
            if found and not found.shared and found.own is None and pfn and self.memory.frames.flags_at[pfn] & 2:
                pages[n] = replace(found, own=self._value(found))

    @precondition(lambda self: self.mirror.entries)
    @rule(pick=st.integers(0, 1 << 16), value=data)
    def device_write(self, pick: int, value: bytes) -> None:
        (space, vpn), (pfn, _, write) = list(self.mirror.entries.items())[pick % len(self.mirror.entries)]
        if write:
            self.memory.frames.write(pfn, 0, value)
            self.memory.set_dirty([pfn])
            pages = next(pages for mm, pages in self.spaces if mm is space)
            self._write(pages, vpn - (BASE >> 12), value)

    @rule(mm=mm_choice, page=page_numbers, write=st.booleans())
    def pin(self, mm: int, page: int, write: bool) -> None:
        space, pages = self._pick(mm)
        pfns, error = self._attempt(device.pin(space, at(page), at(page + 1), write))
        if error is not None:
            assert error == "EFAULT"
            return
        found = pages[page]
        if not found.shared:
            got = self.memory.frames.read(int(pfns[0]), 0, 8)
            assert found.lazy or got == self._value(found)
            pages[page] = replace(found, own=got, lazy=found.lazy and not write)
        self.pins.append((space, pfns, [self.memory.frames.generation_at[int(pfn)] for pfn in pfns]))

    @precondition(lambda self: self.pins)
    @rule(dirty=st.booleans())
    def unpin(self, dirty: bool) -> None:
        space, pfns, generations = self.pins.pop(0)
        assert [self.memory.frames.generation_at[int(pfn)] for pfn in pfns] == generations
        device.unpin(space, pfns, dirty)

    @invariant()
    def every_invariant_holds(self) -> None:
        if hasattr(self, "memory"):
            check_idle(self.memory)
            self.mirror.check_current()

    def teardown(self) -> None:
        if not hasattr(self, "memory"):
            return
        for space, pages in self.spaces:
            for n in pages:
                self.load(self.spaces.index((space, pages)), n)
        while self.pins:
            self.unpin(False)
        for space, _ in self.spaces:
            run(space.exit(), self.mirror.hear)
        check_idle(self.memory)


class SmallMachine(Machine):
    """Little memory and much swap: whatever is done, something must be reclaimed for it."""

    def make_memory(self) -> Memory:
        return Memory(frames_nr=26, swap_slots_nr=4096, nodes_nr=2)


TestSmallMachine = SmallMachine.TestCase
TestSmallMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
