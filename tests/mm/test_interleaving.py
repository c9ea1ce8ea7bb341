"""Several operations at once, resumed in any order: nothing is freed early or lost, every count stays right."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from mm.driver import ANON_PRIVATE, ANON_SHARED, BASE, FIXED, RW, Mirror, at, heard, run
from mmubusd.mm import Memory, Mm, MmError, device
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.check import check_idle, check_memory
from mmubusd.mm.madvise import COLD, DONTNEED, FREE, PAGEOUT, POPULATE_WRITE, REMOVE
from mmubusd.mm.notification import ANSWERED, LockWait, Notification, Operation, ranges

REGION = 32
"""Pages of each thread's own region; the region behind all of them is everyone's."""


@dataclass
class Running:
    """One operation under way: what it waits for, and what is to be done with its result."""

    name: str
    operation: Operation[Any]
    waits: Notification | LockWait | None = None
    then: Any = None
    error: str | None = None
    started: bool = False
    log: list[Any] = field(default_factory=list)


class Thread:
    """Issues one call after another; its own region is compared with a dict of pages."""

    def __init__(self, world: World, number: int, rng: random.Random) -> None:
        self.world, self.rng, self.first = world, rng, number * REGION
        self.pages: dict[int, bytes] = {}
        self.mapped: set[int] = set()
        self.calls = self._calls()

    def _range(self) -> tuple[int, int]:
        start = self.rng.randrange(REGION)
        return self.first + start, self.rng.randint(1, min(8, REGION - start))

    def _calls(self) -> Iterator[Running]:
        mm, rng = self.world.mm, self.rng
        while True:
            page, count = self._range()
            span = range(page, page + count)
            kind = rng.choice(["map", "unmap", "store", "store", "store", "load", "drop", "move", "device", "pageout"])
            if kind == "map":
                call = Running("mmap", mm.mmap(at(page), count * PAGE_SIZE, RW, ANON_PRIVATE | FIXED))
                yield call
                self.mapped.update(span)
                self._forget(span)
            elif kind == "unmap":
                yield Running("munmap", mm.munmap(at(page), count * PAGE_SIZE))
                self.mapped.difference_update(span)
                self._forget(span)
            elif kind == "store" and page in self.mapped:
                data = rng.randbytes(8)
                call = Running("store", mm.store(at(page), data))
                yield call
                assert call.error is None
                self.pages[page] = data
            elif kind == "load" and page in self.mapped:
                call = Running("load", mm.load(at(page), 8))
                yield call
                assert call.then == self.pages.get(page, bytes(8)), f"page {page}"
            elif kind == "drop":
                yield Running("dontneed", mm.madvise(at(page), count * PAGE_SIZE, DONTNEED))
                self._forget(span)
            elif kind == "move":
                to = self.first + rng.randrange(REGION - count + 1)
                if abs(to - page) >= count and self.mapped.issuperset(span):
                    size = count * PAGE_SIZE
                    call = Running("mremap", mm.mremap(at(page), size, size, 3, at(to)))
                    yield call
                    assert call.error is None
                    moved = {n - page + to: self.pages[n] for n in span if n in self.pages}
                    self._forget(span)
                    self._forget(range(to, to + count))
                    self.pages.update(moved)
                    self.mapped.difference_update(span)
                    self.mapped.update(range(to, to + count))
            elif kind == "device":
                yield self.world.fault(page, count, rng.random() < 0.5)
            elif kind == "pageout":
                yield Running("pageout", mm.madvise(at(page), count * PAGE_SIZE, rng.choice([PAGEOUT, COLD])))

    def _forget(self, span: range) -> None:
        for page in span:
            self.pages.pop(page, None)


class Disturber(Thread):
    """Does to the region of all and to files whatever there is, and forks; only the invariants judge it."""

    def _calls(self) -> Iterator[Running]:
        while True:
            page, count = self._range()
            file, offset = self.rng.choice(self.world.files), self.rng.randrange(16) * PAGE_SIZE
            yield self.rng.choice(self._choices(page, count, file, offset))()

    def _choices(self, page: int, count: int, file: int, offset: int) -> list[Callable[[], Running]]:
        world, rng = self.world, self.rng
        mm, memory = world.mm, world.memory
        address, size = at(page), count * PAGE_SIZE
        advice = rng.choice([PAGEOUT, REMOVE, FREE, POPULATE_WRITE])
        return [
            lambda: Running("file", mm.mmap(address, size, RW, rng.choice([1, 2]) | FIXED, file, offset)),
            lambda: Running("shared", mm.mmap(address, size, RW, ANON_SHARED | FIXED)),
            lambda: Running("anon", mm.mmap(address, size, RW, ANON_PRIVATE | FIXED)),
            lambda: Running("write", mm.touch(address, size, "write")),
            lambda: Running("write", mm.touch(address, size, "write")),
            lambda: Running("read", mm.touch(address, size, "read")),
            lambda: Running("advise", mm.madvise(address, size, advice)),
            lambda: Running("mprotect", mm.mprotect(address, size, rng.choice([1, 3]))),
            lambda: Running("remap", mm.remap_file_pages(address, size, 0, offset >> PAGE_SHIFT)),
            lambda: Running("truncate", memory.ftruncate(file, rng.choice([4, 9, 16, 24]) * PAGE_SIZE + 100)),
            lambda: Running("punch", memory.punch(file, offset, size)),
            lambda: Running("fsync", memory.fsync(file)),
            lambda: Running("file write", memory.write_file(file, offset + 5, rng.randbytes(5000))),
            lambda: world.fault(page, count, rng.random() < 0.5),
            world.fork_or_exit,
        ]


class World:
    def __init__(self, seed: int, threads: int, disturbers: int) -> None:
        self.rng = random.Random(seed)
        self.memory = Memory(frames_nr=4096)
        self.mm = self.memory.create_mm("main")
        self.mm.notified = True
        self.files = [self.memory.create_file(kind, kind, 24, cached=kind != "xip") for kind in ("disk", "shm", "xip")]
        self.mirror = Mirror(self.memory)
        self.children: list[Mm] = []
        shared = threads
        self.threads = [Thread(self, n, random.Random(f"{seed}-{n}")) for n in range(threads)]
        self.threads += [Disturber(self, shared, random.Random(f"{seed}-d{n}")) for n in range(disturbers)]
        self.running: list[tuple[Thread, Running]] = []

    def fault(self, page: int, count: int, write: bool) -> Running:
        start, end = at(page), at(page + count)
        return Running("fault", self._fault(start, end, write))

    def _fault(self, start: int, end: int, write: bool) -> Operation[Any]:
        entries = yield from device.fault(self.mm, start, end, write)
        barred = [r for _, call in self.running for r in self._barred(call)]
        if not any(mm is self.mm and a < end and start < b for mm, a, b in barred):
            self.mirror.take(self.mm, start, entries)

    def _barred(self, call: Running) -> list[tuple[Mm, int, int]]:
        note = call.waits
        if note is None or isinstance(note, LockWait) or not hasattr(note, "mm"):
            return []
        spans = ranges(note) or [(0, 1 << 64)]
        return [(note.mm, a, b) for a, b in spans]

    def fork_or_exit(self) -> Running:
        if len(self.children) < 2:
            return Running("fork", self._fork())
        return Running("exit", self.children.pop(self.rng.randrange(2)).exit())

    def _fork(self) -> Operation[None]:
        child = yield from self.mm.fork()
        child.notified = self.rng.random() < 0.5
        self.children.append(child)

    def step(self) -> None:
        """Start a call of an idle thread, or resume one that may go on."""
        busy = {id(thread) for thread, _ in self.running}
        idle = [thread for thread in self.threads if id(thread) not in busy]
        able = [
            pair for pair in self.running if not isinstance(pair[1].waits, LockWait) or pair[1].waits.ticket.granted
        ]
        assert idle or able, "somebody can always go on"
        if idle and (not able or self.rng.random() < 0.5):
            thread = self.rng.choice(idle)
            pair = thread, next(thread.calls)
            self.running.append(pair)
        else:
            pair = self.rng.choice(able)
        self._resume(*pair)
        self.memory.granted.clear()

    def _resume(self, thread: Thread, call: Running) -> None:
        try:
            if not call.started:
                call.started = True
                call.waits = next(call.operation)
            else:
                if call.waits is not None and not isinstance(call.waits, LockWait):
                    self.mirror.hear(call.waits)
                call.waits = call.operation.send(ANSWERED)
            return
        except StopIteration as stop:
            call.then = stop.value
        except MmError as error:
            call.error = error.errno
        self.running.remove((thread, call))

    def unsettled(self, mm: Mm, vpn: int) -> bool:
        address = vpn << PAGE_SHIFT
        return any(m is mm and a <= address < b for _, call in self.running for m, a, b in self._barred(call))

    def finish(self) -> None:
        """No new calls: everything ends."""
        for thread in self.threads:
            thread.calls = iter(())
        while self.running:
            able = [p for p in self.running if not isinstance(p[1].waits, LockWait) or p[1].waits.ticket.granted]
            assert able, "everything ends"
            self._resume(*self.rng.choice(able))


@pytest.mark.parametrize("seed", range(16))
def test_threads_and_disturbers(seed: int) -> None:
    world = World(seed, threads=3, disturbers=3)
    for _ in range(400):
        world.step()
        check_memory(world.memory)
        world.mirror.check_current(world.unsettled)
    world.finish()
    check_idle(world.memory)
    world.mirror.check_current()


def test_disjoint_ranges_overlap_their_waits() -> None:
    memory = Memory(frames_nr=64)
    mm = memory.create_mm()
    mm.notified = True
    for _ in mm.mmap(BASE, 8 * PAGE_SIZE, RW, ANON_PRIVATE | FIXED | 0x8000):
        pass
    left, right, across = mm.munmap(at(0), PAGE_SIZE), mm.munmap(at(4), PAGE_SIZE), mm.munmap(at(3), 2 * PAGE_SIZE)
    assert ranges(next(left)) == [(at(0), at(1))]
    assert ranges(next(right)) == [(at(4), at(5))]
    waiting = next(across)
    assert isinstance(waiting, LockWait)
    assert memory.frames.quarantine_nr == 2
    with pytest.raises(StopIteration):
        right.send(ANSWERED)
    assert waiting.ticket.granted
    assert memory.granted == [waiting.ticket]
    assert ranges(across.send(ANSWERED)) == [(at(3), at(5))]
    across.close()
    left.close()
    assert not mm.lock


@pytest.mark.parametrize("seed", range(4))
def test_operations_closed_in_the_middle(seed: int) -> None:
    """A driver that gives up an operation leaves locks free and counts right."""
    world = World(seed + 100, threads=2, disturbers=2)
    for step in range(200):
        world.step()
        if step % 17 == 0 and world.running:
            thread, call = world.running.pop(world.rng.randrange(len(world.running)))
            if isinstance(thread, Disturber):
                if call.waits is not None and not isinstance(call.waits, LockWait):
                    world.mirror.hear(call.waits)
                call.operation.close()
            else:
                world.running.append((thread, call))
        check_memory(world.memory)
    world.finish()
    for holder in (world.mm, *(world.memory.file(file) for file in world.files)):
        assert not holder.lock


def test_a_hole_takes_the_page_away_while_its_copy_waits() -> None:
    memory = Memory(frames_nr=64)
    mm = memory.create_mm()
    mm.notified = True
    file = memory.create_file("f", "shm", 2)
    run(memory.write_file(file, 0, b"old file"))
    run(mm.mmap(at(0), PAGE_SIZE, RW, 2 | FIXED, file))
    assert run(mm.load(at(0), 8)) == b"old file"
    store = mm.store(at(0) + 4, b"mine")
    assert ranges(next(store)) == [(at(0), at(1))]
    run(memory.punch(file, 0, PAGE_SIZE))
    with pytest.raises(StopIteration):  # the page is gone: the store faults again, on the hole
        store.send(ANSWERED)
    assert run(mm.load(at(0), 8)) == b"\0\0\0\0mine"
    check_idle(memory)


def test_a_map_over_waits_for_the_faults_in_its_range() -> None:
    memory = Memory(frames_nr=64)
    mm = memory.create_mm()
    mm.notified = True
    run(mm.mmap(at(0), 2 * PAGE_SIZE, RW, ANON_PRIVATE | FIXED))
    run(mm.store(at(0), b"a"))
    child = run(mm.fork())
    store, over, load = mm.store(at(0), b"b"), mm.munmap(at(0), 2 * PAGE_SIZE), mm.load(at(1), 1)
    next(store)
    waits, behind = next(over), next(load)
    assert isinstance(waits, LockWait)
    assert isinstance(behind, LockWait)  # in order of arrival, though nobody holds its page yet
    with pytest.raises(StopIteration):
        store.send(ANSWERED)
    assert waits.ticket.granted
    assert not behind.ticket.granted
    over.send(ANSWERED)
    with pytest.raises(StopIteration):
        over.send(ANSWERED)
    with pytest.raises(MmError, match="EFAULT"):
        load.send(ANSWERED)
    assert run(child.load(at(0), 1)) == b"a"
    check_idle(memory)


def test_a_page_mapped_anew_while_a_hole_is_made_is_unmapped_too() -> None:
    memory = Memory(frames_nr=64)
    first, second = memory.create_mm("first"), memory.create_mm("second")
    first.notified = second.notified = True
    file = memory.create_file("f", "shm", 2)
    for mm in (first, second):
        run(mm.mmap(at(0), PAGE_SIZE, RW, 1 | FIXED, file))
    run(first.store(at(0), b"gone"))
    hole = memory.punch(file, 0, PAGE_SIZE)
    assert next(hole).mm is first
    assert hole.send(ANSWERED).mm is second
    assert run(first.load(at(0), 4)) == b"gone"  # it is still cached, so it can be mapped again
    again = hole.send(ANSWERED)
    assert (again.mm, ranges(again)) == (first, [(at(0), at(1))])
    with pytest.raises(StopIteration):
        hole.send(ANSWERED)
    assert run(first.load(at(0), 4)) == run(second.load(at(0), 4)) == bytes(4)
    check_idle(memory)


def test_a_page_written_while_fsync_waits_stays_dirty() -> None:
    memory = Memory(frames_nr=64)
    mm = memory.create_mm()
    mm.notified = True
    file = memory.create_file("f", "disk", 1)
    run(mm.mmap(at(0), PAGE_SIZE, RW, 1 | FIXED, file))
    run(mm.store(at(0), b"one"))
    fsync = memory.fsync(file)
    assert ranges(next(fsync)) == [(at(0), at(1))]
    run(mm.store(at(0), b"two"))
    with pytest.raises(StopIteration):
        fsync.send(ANSWERED)
    assert [ranges(note) for note in heard(memory.fsync(file))] == [[(at(0), at(1))]]
    assert heard(memory.fsync(file)) == []


def test_a_hole_shown_again_while_a_block_is_made_for_it() -> None:
    memory = Memory(frames_nr=64)
    first, second = memory.create_mm("first"), memory.create_mm("second")
    first.notified = second.notified = True
    file = memory.create_file("x", "xip", 1)
    for mm in (first, second):
        run(mm.mmap(at(0), PAGE_SIZE, RW, 1 | FIXED, file))
        run(mm.load(at(0), 1))
    store = first.store(at(0), b"code")
    assert next(store).mm is first
    assert store.send(ANSWERED).mm is second
    run(second.load(at(0), 1))  # the zero page once more
    assert store.send(ANSWERED).mm is second
    with pytest.raises(StopIteration):
        store.send(ANSWERED)
    assert run(second.load(at(0), 4)) == b"code"
    check_idle(memory)
