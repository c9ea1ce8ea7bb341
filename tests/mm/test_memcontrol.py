"""Groups of address spaces and files: charged for what they have, bounded, and nobody's trouble but their own."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import pytest
from mm.driver import ANON_PRIVATE, ANON_SHARED, FIXED, RW, Mirror, at, run
from mmubusd.mm import Memory, Mm, device
from mmubusd.mm.addr import PAGE_SIZE, PTRS_PER_TABLE, FileId, Pfn
from mmubusd.mm.check import check_charges, check_idle, check_memory
from mmubusd.mm.errno import MmError
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.madvise import DONTNEED, PAGEOUT
from mmubusd.mm.memcontrol import MemCgroup, change_limits, join
from mmubusd.mm.userfaultfd import MISSING

P = PAGE_SIZE
SHARED = 1
ALLOW_HOLES = 2
TABLE = 1
"""What the one leaf table of an address space is charged for."""


@pytest.fixture
def memory() -> Memory:
    return Memory(frames_nr=512, swap_slots_nr=512)


@pytest.fixture
def group(memory: Memory) -> MemCgroup:
    return change_limits(memory, "mallory", 64, 128)


@pytest.fixture
def mm(memory: Memory, group: MemCgroup) -> Mm:
    mm = memory.create_mm("hers")
    join(mm, group)
    return mm


def fill(mm: Mm, pages: int, kind: int = ANON_PRIVATE, first: int = 0) -> None:
    run(mm.mmap(at(first), pages * P, RW, kind | FIXED))
    for page in range(first, first + pages):
        run(mm.store(at(page), b"page %d" % page))


def check_bytes(mm: Mm, pages: int, first: int = 0) -> None:
    for page in range(first, first + pages):
        assert run(mm.load(at(page), 9)).rstrip(b"\0") == b"page %d" % page


def no_swap(memory: Memory, group: MemCgroup) -> None:
    """Private memory cannot be reclaimed then."""
    change_limits(memory, group.name, group.limit, 0)


def test_frames_and_page_tables_are_charged_until_they_are_free(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    fill(mm, 8)
    assert group.charged == 8 + TABLE
    check_idle(memory)
    run(mm.madvise(at(0), 4 * P, DONTNEED))
    assert group.charged == 4 + TABLE
    run(mm.exit())
    assert group.charged == 0
    check_idle(memory)


def test_at_its_limit_its_own_pages_go_and_nobody_else_s(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    other = memory.create_mm("alice's")
    fill(other, 200)
    memory.lru.drain()
    fill(mm, 150)
    assert group.charged <= group.limit
    assert group.limit_hits > 0
    assert other.present(at(0), at(200)) == [(0, 200)], "nothing of alice's was taken"
    assert memory.frames.free_nr > 200, "though the machine had room"
    check_bytes(mm, 150)
    check_bytes(other, 200)
    check_memory(memory)


def test_when_nothing_can_be_reclaimed_who_asked_gets_enomem(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    no_swap(memory, group)
    run(mm.mmap(at(0), 200 * P, RW, ANON_PRIVATE | FIXED))
    with pytest.raises(MmError, match="mallory has 64 of its 64 frames") as caught:
        run(mm.touch(at(0), 200 * P, "write"))
    assert caught.value.errno == "ENOMEM"
    assert mm.resident_pages() == 64 - TABLE
    assert group.ooms == 1
    other = memory.create_mm("alice's")
    fill(other, 200)
    run(mm.madvise(at(0), P, DONTNEED))  # what she gives back she can have again
    run(mm.store(at(100), b"x"))
    check_idle(memory)


def test_the_oom_killer_ends_one_of_the_group(group: MemCgroup) -> None:
    memory = Memory(frames_nr=512, oom_kill=True)
    group = change_limits(memory, "mallory", 64, 0)
    small, large, larger = (memory.create_mm(name) for name in ("small", "large", "alice's"))
    for mm in (small, large):
        join(mm, group)
    fill(larger, 100)
    fill(large, 50)
    fill(small, 20)
    assert (large.unstable, small.unstable, larger.unstable) == (True, False, False)
    for _, operation in memory.wanted():
        run(operation)
    assert large.id not in memory.mms
    check_bytes(small, 20)
    check_bytes(larger, 100)
    check_idle(memory)


def test_swap_is_charged_and_bounded_apart(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    change_limits(memory, "mallory", 64, 16)
    run(mm.mmap(at(0), 200 * P, RW, ANON_PRIVATE | FIXED))
    with pytest.raises(MmError, match="ENOMEM"):
        run(mm.touch(at(0), 200 * P, "write"))
    assert group.swapped == 16
    assert memory.swap.free_nr == 512 - 16, "the rest of it is for others"
    run(mm.exit())
    assert (group.charged, group.swapped) == (0, 0)
    check_idle(memory)


@pytest.mark.parametrize("kind", ["disk", "shm", "xip"])
def test_a_file_s_pages_are_its_owner_s_whoever_wants_them(memory: Memory, group: MemCgroup, kind: str) -> None:
    file = memory.create_file("hers", kind, 32, cached=kind == "disk", memcg=group)
    other = memory.create_mm("alice's")
    run(other.mmap(at(0), 32 * P, RW, SHARED | FIXED, file))
    run(other.touch(at(0), 32 * P, "write"))
    assert group.charged == 32
    run(other.exit())
    memory.unlink(file)
    assert group.charged == 0
    check_idle(memory)


def test_a_file_that_is_larger_than_its_owner_s_memory(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    file = memory.create_file("hers", "disk", 0, memcg=group)
    for page in range(100):
        run(memory.write_file(file, page * P, b"page %d" % page))
        assert group.charged <= group.limit
    run(mm.mmap(at(0), 100 * P, RW, SHARED | FIXED, file))
    check_bytes(mm, 100)
    assert group.charged <= group.limit
    check_memory(memory)


def test_reading_ahead_takes_no_more_than_there_is(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    change_limits(memory, "mallory", 8, 0)
    file = memory.file(memory.create_file("hers", "disk", 64, memcg=group))
    for index in range(64):
        file.set_block(index, 2)
    run(mm.mmap(at(0), 64 * P, RW, SHARED | FIXED, file.id))
    for page in range(64):
        run(mm.load(at(page), 1))
        assert group.charged <= group.limit
    check_idle(memory)


def test_shared_anonymous_memory_is_his_who_mapped_it(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    fill(mm, 150, ANON_SHARED)
    child = run(mm.fork())
    join(child, None)
    check_bytes(child, 150)
    assert 0 < group.charged <= group.limit
    assert group.swapped >= 150 - 64
    check_memory(memory)


def test_page_tables_alone_reach_the_limit(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    """Zero pages cost nothing, their tables do."""
    no_swap(memory, group)
    block = PTRS_PER_TABLE
    run(mm.mmap(at(0), 200 * block * P, RW, ANON_PRIVATE | FIXED))
    for number in range(64):
        run(mm.load(at(number * block), 1))
    with pytest.raises(MmError, match="page tables included"):
        run(mm.load(at(64 * block), 1))
    assert group.charged == 64
    assert memory.tables.nr == 64
    check_idle(memory)


def test_tables_that_moving_holes_would_make_are_charged_too(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    no_swap(memory, group)
    block = PTRS_PER_TABLE
    for start in (0, 1000):
        run(mm.mmap(at(start * block), 200 * block * P, RW, ANON_PRIVATE | FIXED))
    run(mm.uffd_register(at(1000 * block), 200 * block * P, MISSING, 1))
    for number in range(32):
        run(mm.uffd_move(at((1000 + number) * block), at(number * block), P, ALLOW_HOLES, 1))
    with pytest.raises(MmError, match="ENOMEM"):
        run(mm.uffd_move(at(1032 * block), at(32 * block), P, ALLOW_HOLES, 1))
    assert group.charged <= 64


def test_fork_needs_room_for_its_tables(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    no_swap(memory, group)
    for number in range(20):
        fill(mm, 1, first=number * PTRS_PER_TABLE)
    assert group.charged == 40
    child = run(mm.fork())
    assert group.charged == 60
    with pytest.raises(MmError, match="ENOMEM"):
        run(mm.fork())
    run(child.exit())
    check_idle(memory)


def test_a_child_that_is_another_s_pays_for_itself_from_then_on(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    fill(mm, 8)
    heir = change_limits(memory, "alice", 64, 0)
    child = run(mm.fork())
    join(child, heir)
    assert (group.charged, heir.charged) == (8 + TABLE, TABLE)
    run(child.touch(at(0), 8 * P, "write"))
    assert (group.charged, heir.charged) == (8 + TABLE, 8 + TABLE)
    run(mm.exit())
    assert (group.charged, heir.charged) == (0, 8 + TABLE)
    check_idle(memory)


def test_what_waits_for_a_round_still_counts(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    """Not to acknowledge is no way to more memory."""
    no_swap(memory, group)
    fill(mm, 60)
    mm.notified = True
    operation = mm.munmap(at(0), 60 * P)
    next(operation)
    assert mm.resident_pages() == 0
    assert group.charged >= 60
    run(mm.mmap(at(100), 60 * P, RW, ANON_PRIVATE | FIXED))
    with pytest.raises(MmError, match="ENOMEM"):
        run(mm.touch(at(100), 60 * P, "write"))
    run(operation)
    run(mm.touch(at(100), 60 * P, "write"))
    check_idle(memory)


def test_what_is_pinned_or_withheld_still_counts(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    fill(mm, 4)
    pinned = device.pin(mm, at(0), at(2), True)
    pfns = [int(pfn) for pfn in run(pinned)]
    memory.frames.withhold([pfns[0]])
    run(mm.munmap(at(0), 4 * P))
    assert group.charged == 2
    memory.unpin([Pfn(pfn) for pfn in pfns])
    assert group.charged == 1
    memory.frames.let_go([pfns[0]])
    assert group.charged == 0


def test_a_page_that_moves_takes_its_charge_along(group: MemCgroup) -> None:
    memory = Memory(frames_nr=512, nodes_nr=2)
    group = change_limits(memory, "mallory", 16, 0)
    mm = memory.create_mm("hers")
    join(mm, group)
    fill(mm, 15)
    assert group.room == 0
    assert run(mm.move_pages(at(0), 15 * P, 1)) == 0
    assert group.charged == 16
    owner = 7
    run(mm.migrate_to_device(at(0), at(15), owner))
    assert group.charged == 16
    check_memory(memory)
    check_bytes(mm, 15)
    assert group.charged == 16
    check_idle(memory)


def test_a_device_gets_no_new_pages_beyond_the_limit(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    no_swap(memory, group)
    run(mm.mmap(at(0), 200 * P, RW, ANON_PRIVATE | FIXED))
    assert run(mm.migrate_to_device(at(0), at(200), 7)) == 64 - TABLE
    assert group.charged <= 64 + TABLE
    check_idle(memory)


def test_copies_on_write_with_a_notifier(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    """The copy is made after a round; there must be room for it then, or its maker waits for room first."""
    fill(mm, 40)
    child = run(mm.fork())
    mm.notified = child.notified = True
    Mirror(memory)
    run(child.touch(at(0), 40 * P, "write"))
    assert group.charged <= group.limit
    check_bytes(mm, 40)
    no_swap(memory, group)
    again = run(child.fork())
    with pytest.raises(MmError, match="ENOMEM"):
        run(again.touch(at(0), 40 * P, "write"))
    check_memory(memory)


def test_huge_pages_only_with_room_for_one(group: MemCgroup) -> None:
    memory = Memory(frames_nr=4096, thp=Thp.ALWAYS)
    group = change_limits(memory, "mallory", 600, 0)
    mm = memory.create_mm("hers")
    join(mm, group)
    run(mm.mmap(at(0), 2048 * P, RW, ANON_PRIVATE | FIXED))
    run(mm.store(at(0), b"x"))
    assert mm.huge(at(0), at(2048)) == [(0, 512)]
    assert group.charged == 512 + TABLE
    run(mm.store(at(512), b"x"))  # in small pages
    assert group.charged == 513 + 2 * TABLE
    run(mm.madvise(at(0), 2048 * P, DONTNEED))
    assert group.charged <= 2 * TABLE
    check_idle(memory)


def test_a_limit_that_is_lowered_is_kept_from_the_next_frame_on(memory: Memory, group: MemCgroup, mm: Mm) -> None:
    fill(mm, 60)
    change_limits(memory, "mallory", 10, 128)
    assert group.room == 10 - 61
    run(mm.mmap(at(100), P, RW, ANON_PRIVATE | FIXED))
    run(mm.store(at(100), b"x"))
    assert group.charged <= 10
    check_bytes(mm, 60)


def test_groups_that_nothing_belongs_to_are_forgotten(memory: Memory) -> None:
    for number in range(100):
        mm = memory.create_mm()
        join(mm, change_limits(memory, f"principal {number}", 16, 16))
        fill(mm, 2)
        if number % 10:
            run(mm.exit())
    assert len(memory.memcgs) < 64
    assert memory.memcgs.keys() >= {f"principal {number}" for number in range(0, 100, 10)}
    check_idle(memory)


@pytest.mark.parametrize("arguments", [("", 1, 1), ("x", 0, 1), ("x", 1, -1)])
def test_limits_that_mean_nothing(memory: Memory, arguments: tuple[str, int, int]) -> None:
    with pytest.raises(MmError, match="EINVAL"):
        change_limits(memory, *arguments)
    assert memory.memcgs == {}


def test_nobody_s_memory_is_not_counted(memory: Memory) -> None:
    mm = memory.create_mm()
    fill(mm, 8)
    assert not memory.frames.charges.owner.any()
    with pytest.raises(MmError, match="ESRCH"):
        memory.memcg("nobody")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_three_groups_do_each_stays_within_its_limit(seed: int) -> None:
    """Calls at random, also such as fail for want of memory; every charge is recomputed."""
    chance = random.Random(seed)
    memory = Memory(frames_nr=1024, swap_slots_nr=256, nodes_nr=2)
    groups = [change_limits(memory, name, chance.randrange(24, 120), chance.randrange(0, 90)) for name in "abc"]
    files = [memory.create_file(f"file {n}", chance.choice(["disk", "shm"]), 48, memcg=groups[n]) for n in range(3)]
    mms = [_joined(memory, chance.choice([*groups, None])) for _ in range(5)]
    for _ in range(150):
        mm = chance.choice(mms)
        page, pages = chance.randrange(180), chance.randrange(1, 60)
        calls: list[Callable[[], object]] = [
            lambda mm=mm, page=page, pages=pages: run(mm.touch(at(page), pages * P, "write")),
            lambda mm=mm, page=page, pages=pages: run(mm.touch(at(page), pages * P, "write")),
            lambda mm=mm, page=page, pages=pages: run(mm.touch(at(page), pages * P, "read")),
            lambda mm=mm, page=page, pages=pages: run(mm.madvise(at(page), pages * P, DONTNEED)),
            lambda mm=mm, page=page, pages=pages: run(mm.madvise(at(page), pages * P, PAGEOUT)),
            lambda mm=mm, page=page, pages=pages: run(mm.move_pages(at(page), pages * P, chance.randrange(2))),
            lambda mm=mm, page=page: _map(mm, page, chance.choice(files), chance),
            lambda: run(memory.write_file(chance.choice(files), chance.randrange(48) * P, b"x")),
            lambda mm=mm: mms.append(run(mm.fork())),
            lambda mm=mm: len(mms) > 3 and (mms.remove(mm), run(mm.exit())),
        ]
        with suppress(MmError):  # many want more than there is
            chance.choice(calls)()
        for one in groups:
            assert one.charged <= one.limit
            assert one.swapped <= one.swap_limit
        check_charges(memory)
    check_idle(memory)
    for mm in mms:
        run(mm.exit())
    for file in files:
        memory.unlink(file)
    assert [(one.charged, one.swapped) for one in groups] == [(0, 0)] * 3


def _joined(memory: Memory, group: MemCgroup | None) -> Mm:
    mm = memory.create_mm()
    join(mm, group)
    run(mm.mmap(at(0), 240 * P, RW, ANON_PRIVATE | FIXED))
    return mm


def _map(mm: Mm, page: int, file: FileId, chance: random.Random) -> None:
    run(mm.mmap(at(page), 48 * P, RW, chance.choice([SHARED, 2]) | FIXED, file))
