"""Calls as their manual pages tell them: errnos, chosen addresses, limits, locked and growing memory."""

from __future__ import annotations

import pytest
from mm.driver import ANON_PRIVATE, ANON_SHARED, BASE, FIXED, RW, at, errno_of, run, told
from mmubusd.mm import Memory, Mm, MmError
from mmubusd.mm.addr import PAGE_SIZE, PMD_SIZE, TASK_SIZE
from mmubusd.mm.check import check_idle
from mmubusd.mm.madvise import COLLAPSE, DONTDUMP, DONTNEED, DONTNEED_LOCKED, HUGEPAGE, PAGEOUT, REMOVE, WILLNEED
from mmubusd.mm.mlock import MCL_CURRENT, MCL_FUTURE
from mmubusd.mm.mm import BRK_START, MMAP_BASE
from mmubusd.mm.syscall import call

P = PAGE_SIZE
GROWSDOWN = 0x100
MREMAP_MAYMOVE, MREMAP_MOVES = 1, 3
RLIMIT_DATA, RLIMIT_MEMLOCK, RLIMIT_AS, INFINITY = 2, 8, 9, (1 << 64) - 1


@pytest.fixture
def mm() -> Mm:
    mm = Memory(frames_nr=2048).create_mm("test")
    mm.notified = True
    return mm


def map_at(mm: Mm, page: int, count: int, prot: int = RW, flags: int = ANON_PRIVATE) -> None:
    run(mm.mmap(at(page), count * P, prot, flags | FIXED))


@pytest.mark.parametrize(
    ("op", "args", "errno"),
    [
        ("mmap", (BASE, 0, 3, 0x32, 0, 0), "EINVAL"),
        ("mmap", (BASE, P, 3, 0x30, 0, 0), "EINVAL"),
        ("mmap", (BASE, P, 3, 0x33, 0, 0), "EINVAL"),
        ("mmap", (BASE + 1, P, 3, 0x32, 0, 0), "EINVAL"),
        ("mmap", (BASE, P, 3, 0x32, 0, 1), "EINVAL"),
        ("mmap", (BASE, P, 3, 0x12, 77, 0), "EBADF"),
        ("mmap", (TASK_SIZE, P, 3, 0x32, 0, 0), "ENOMEM"),
        ("mmap", (0, 1 << 48, 3, 0x22, 0, 0), "ENOMEM"),
        ("mmap", (0, (1 << 64) - 1, 3, 0x22, 0, 0), "ENOMEM"),
        ("mmap", (0, P, 3, 0x32, 0, 0), "EPERM"),
        ("munmap", (BASE + 1, P), "EINVAL"),
        ("munmap", (BASE, 0), "EINVAL"),
        ("munmap", (TASK_SIZE, 2 * P), "EINVAL"),
        ("mprotect", (BASE + 1, P, 1), "EINVAL"),
        ("mprotect", (BASE, P, 0x10), "EINVAL"),
        ("mprotect", (BASE, P, 0x3000000), "EINVAL"),
        ("mprotect", (BASE, P, 1), "ENOMEM"),
        ("mprotect", (BASE, (1 << 64) - P, 1), "ENOMEM"),
        ("mremap", (BASE, P, P, 8, 0), "EINVAL"),
        ("mremap", (BASE, P, 0, 1, 0), "EINVAL"),
        ("mremap", (BASE, P, P, 2, BASE + P), "EINVAL"),
        ("mremap", (BASE, P, P, 3, BASE), "EINVAL"),
        ("mremap", (BASE, P, 2 * P, 1, 0), "EFAULT"),
        ("madvise", (BASE, P, 99), "EINVAL"),
        ("madvise", (BASE + 1, P, 4), "EINVAL"),
        ("madvise", (BASE, (1 << 64) - 1, 4), "EINVAL"),
        ("madvise", (BASE, P, 4), "ENOMEM"),
        ("msync", (BASE, P, 5), "EINVAL"),
        ("msync", (BASE, P, 8), "EINVAL"),
        ("msync", (BASE, P, 4), "ENOMEM"),
        ("mlock", (BASE, P), "ENOMEM"),
        ("munlock", (BASE, P), "ENOMEM"),
        ("remap_file_pages", (BASE, P, 0), "EINVAL"),
        ("read", (BASE, 1), "EFAULT"),
        ("execute", (BASE, 1), "EFAULT"),
        ("fsync", (5,), "EBADF"),
        ("ftruncate", (5, 0), "EBADF"),
        ("nonsense", (), "ENOSYS"),
        ("munmap", (1,), "EINVAL"),
        ("munmap", (-1, P), "EINVAL"),
        ("munmap", (1 << 64, P), "EINVAL"),
    ],
)  # fmt: skip
def test_bad_arguments(mm: Mm, op: str, args: tuple[int, ...], errno: str) -> None:
    with pytest.raises(MmError) as caught:
        run(call(mm, op, args))
    assert caught.value.errno == errno
    assert not mm.mappings()
    check_idle(mm.memory)


def test_addresses_are_chosen_from_the_top_down(mm: Mm) -> None:
    first = run(mm.mmap(0, 2 * P, RW, ANON_PRIVATE))
    second = run(mm.mmap(0, P, 1, ANON_PRIVATE))
    assert (first, second) == (MMAP_BASE - 2 * P, MMAP_BASE - 3 * P)
    run(mm.munmap(first, P))
    assert run(mm.mmap(0, P, 1, ANON_PRIVATE)) == first
    assert run(mm.mmap(BASE + 5, P, RW, ANON_PRIVATE)) == BASE  # a hint is rounded down
    assert run(mm.mmap(BASE, P, RW, ANON_PRIVATE)) == MMAP_BASE - 4 * P  # and not honoured when taken
    assert run(mm.mmap(0, P, RW, ANON_PRIVATE | 0x40)) == 0x40000000


def test_noreplace(mm: Mm) -> None:
    map_at(mm, 0, 1)
    assert errno_of(mm.mmap(at(0), 2 * P, RW, ANON_PRIVATE | 0x100000)) == "EEXIST"
    assert run(mm.mmap(at(1), P, RW, ANON_PRIVATE | 0x100000)) == at(1)


def test_mremap_moves_to_an_address_it_chooses(mm: Mm) -> None:
    map_at(mm, 0, 2)
    map_at(mm, 2, 1, 1)
    run(mm.store(at(1), b"hello"))
    assert errno_of(mm.mremap(at(0), 2 * P, 3 * P, 0)) == "ENOMEM"
    target = run(mm.mremap(at(0), 2 * P, 3 * P, 1))
    assert target == MMAP_BASE - 3 * P
    assert run(mm.load(target + P, 5)) == b"hello"
    assert errno_of(mm.load(at(1), 1)) == "EFAULT"


@pytest.mark.parametrize(
    ("others", "wanted"),
    [
        ((), [(0, 1100), (100, 1100)]),  # nothing before either address: the first page table moves whole
        ((50,), [(100, 1100), (100, 1100)]),  # a mapping in the source's first 2 MiB
        ((2060,), [(100, 1100), (100, 1100)]),  # one in the target's
    ],
)
def test_mremap_moves_page_tables_from_the_2_mib_boundary_on(mm: Mm, others: tuple[int, ...], wanted: object) -> None:
    map_at(mm, 100, 1000)
    run(mm.touch(at(100), 1000 * P, "write"))
    for page in others:
        map_at(mm, page, 1, flags=ANON_SHARED)
    assert told(mm.mremap(at(100), 1000 * P, 1000 * P, 3, at(2148))) == wanted
    assert mm.present(at(2148), at(3148)) == [(0, 1000)]
    check_idle(mm.memory)


@pytest.mark.parametrize(("first", "count", "target"), [(100, 400, 2148), (100, 1000, 2149), (101, 999, 2149)])
def test_mremap_does_not_realign(mm: Mm, first: int, count: int, target: int) -> None:
    """Too short to reach the table's end, other offsets in the table, not from the mapping's start."""
    map_at(mm, 100, 1000)
    run(mm.touch(at(100), 1000 * P, "write"))
    ranges = told(mm.mremap(at(first), count * P, count * P, 3, at(target)))
    assert (first, first + count) in ranges
    assert all(start >= 100 for start, _ in ranges)
    check_idle(mm.memory)


def test_mremap_of_length_zero_maps_shared_memory_twice(mm: Mm) -> None:
    map_at(mm, 0, 2, RW, ANON_SHARED)
    map_at(mm, 8, 1)
    second = run(mm.mremap(at(0), 0, 2 * P, 1))
    run(mm.store(second + P, b"both"))
    assert run(mm.load(at(1), 4)) == b"both"
    assert errno_of(mm.mremap(at(8), 0, P, 1)) == "EINVAL"


def test_mremap_tells_of_the_source_even_if_it_stays(mm: Mm) -> None:
    map_at(mm, 0, 2)
    run(mm.store(at(0), b"moved"))
    assert told(mm.mremap(at(0), 2 * P, 2 * P, 7, at(8))) == [(0, 2)]
    assert told(mm.mremap(at(8), 2 * P, 2 * P, 3, at(4))) == [(8, 10), (8, 10)]
    assert run(mm.load(at(4), 5)) == b"moved"
    assert run(mm.load(at(0), 5)) == bytes(5)
    assert errno_of(mm.load(at(8), 1)) == "EFAULT"


def test_brk_grows_shrinks_and_stops_at_a_neighbour(mm: Mm) -> None:
    assert run(mm.brk(0)) == BRK_START
    assert run(mm.brk(BRK_START + 3 * P + 7)) == BRK_START + 3 * P + 7
    assert [(m.start, m.end, m.prot) for m in mm.mappings()] == [(BRK_START, BRK_START + 4 * P, "rw-p")]
    run(mm.mmap(BRK_START + 8 * P, P, 1, ANON_PRIVATE | FIXED))
    assert run(mm.brk(BRK_START + 9 * P)) == BRK_START + 3 * P + 7
    assert run(mm.brk(BRK_START + P)) == BRK_START + P
    assert mm.mappings()[0].end == BRK_START + P


def test_a_stack_grows_down_to_its_limit(mm: Mm) -> None:
    mm.stack_limit = 8 * P
    map_at(mm, 1000, 2, RW, ANON_PRIVATE | 0x100)
    run(mm.store(at(997), b"deep"))
    assert mm.mappings()[0].start == at(997)
    assert errno_of(mm.touch(at(990), 1, "write")) == "EFAULT"
    map_at(mm, 700, 1)
    assert errno_of(mm.touch(at(995), 1, "write")) is None
    map_at(mm, 800, 1)
    assert errno_of(mm.touch(at(994), 1, "write")) == "EFAULT"  # the guard gap


def test_limits(mm: Mm) -> None:
    mm.memory.max_map_count = 4
    for page in range(0, 10, 2):
        map_at(mm, page, 1)
    assert errno_of(mm.mmap(at(20), P, RW, ANON_PRIVATE | FIXED)) == "ENOMEM"
    mm.memory.max_map_count = 5
    map_at(mm, 4, 1)
    run(mm.munmap(at(0), 10 * P))
    map_at(mm, 0, 4)
    mm.memory.max_map_count = 1
    assert errno_of(mm.munmap(at(1), P)) == "ENOMEM"
    assert errno_of(mm.mprotect(at(1), P, 1)) == "ENOMEM"
    mm.memory.max_map_count = 100
    mm.address_space_limit = 6 * P
    assert errno_of(mm.mmap(at(10), 3 * P, RW, ANON_PRIVATE | FIXED)) == "ENOMEM"
    assert errno_of(mm.mmap(at(0), 6 * P, RW, ANON_PRIVATE | FIXED)) is None
    mm.address_space_limit = None
    mm.memory.commit_limit = 8
    assert errno_of(mm.mmap(at(10), 3 * P, RW, ANON_PRIVATE | FIXED)) == "ENOMEM"
    assert errno_of(mm.mmap(at(10), 3 * P, RW, ANON_PRIVATE | FIXED | 0x4000)) is None
    mm.locked_limit = 2 * P
    assert errno_of(mm.mlock(at(0), 3 * P)) == "ENOMEM"
    assert errno_of(mm.mmap(at(20), 3 * P, 1, ANON_PRIVATE | FIXED | 0x2000)) == "EAGAIN"
    check_idle(mm.memory)


def test_every_kind_of_growth_is_limited(mm: Mm) -> None:
    map_at(mm, 0, 4, 1)
    run(call(mm, "setrlimit", (RLIMIT_DATA, 2 * P)))
    assert errno_of(mm.mprotect(at(0), 3 * P, RW)) == "ENOMEM"  # what may be written to is data
    assert errno_of(mm.mprotect(at(0), 2 * P, RW)) is None
    assert errno_of(mm.mmap(at(8), P, RW, ANON_PRIVATE | FIXED)) == "ENOMEM"
    assert errno_of(mm.mmap(at(8), P, RW, ANON_SHARED | FIXED)) is None
    run(call(mm, "setrlimit", (RLIMIT_DATA, INFINITY)))
    run(call(mm, "setrlimit", (RLIMIT_AS, 6 * P)))
    assert errno_of(mm.mremap(at(0), 2 * P, 2 * P, MREMAP_MOVES | 4, at(20))) == "ENOMEM"  # the old place stays mapped
    assert errno_of(mm.mmap(at(1), 5 * P, RW, ANON_PRIVATE | FIXED)) == "ENOMEM"
    assert [each.end for each in mm.mappings()][:2] == [at(1), at(2)]  # cut before the limit was asked
    run(call(mm, "setrlimit", (RLIMIT_AS, INFINITY)))
    run(mm.mmap(at(40), P, RW, ANON_PRIVATE | FIXED | GROWSDOWN))
    run(call(mm, "setrlimit", (RLIMIT_AS, 6 * P)))
    assert errno_of(mm.touch(at(39), P, "write")) == "EFAULT"
    assert errno_of(call(mm, "setrlimit", (0, P))) == "EINVAL"
    check_idle(mm.memory)


def test_locking_everything(mm: Mm) -> None:
    map_at(mm, 0, 2)
    map_at(mm, 2, 1, 0)
    map_at(mm, 3, 1)
    for flags in (0, 4, 8):
        assert errno_of(call(mm, "mlockall", (flags,))) == "EINVAL"
    run(call(mm, "setrlimit", (RLIMIT_MEMLOCK, 3 * P)))
    assert errno_of(call(mm, "mlockall", (MCL_CURRENT,))) == "ENOMEM"
    run(call(mm, "setrlimit", (RLIMIT_MEMLOCK, 6 * P)))
    run(call(mm, "mlockall", (MCL_CURRENT | MCL_FUTURE,)))
    assert mm.present(at(0), at(9)) == [(0, 2), (3, 4)]  # what cannot be accessed is passed over
    map_at(mm, 6, 1)
    assert mm.present(at(6), at(9)) == [(0, 1)]
    assert errno_of(mm.mmap(at(8), 2 * P, RW, ANON_PRIVATE | FIXED)) == "EAGAIN"
    run(call(mm, "munlockall", ()))
    map_at(mm, 8, 2)
    assert mm.present(at(8), at(10)) == []
    run(call(mm, "setrlimit", (RLIMIT_MEMLOCK, 0)))
    assert errno_of(mm.mlock(at(0), P)) == "EPERM"
    check_idle(mm.memory)


def test_locked_on_fault(mm: Mm) -> None:
    map_at(mm, 0, 3)
    assert errno_of(call(mm, "mlock2", (at(0), P, 2))) == "EINVAL"
    run(call(mm, "mlock2", (at(0), 3 * P, 1)))
    assert mm.present(at(0), at(3)) == []
    assert errno_of(mm.madvise(at(0), P, DONTNEED)) == "EINVAL"
    run(call(mm, "mlock2", (at(1), P, 0)))
    assert mm.present(at(0), at(3)) == [(1, 2)]


def test_what_is_moved_and_kept_is_counted_as_locked_twice(mm: Mm) -> None:
    map_at(mm, 0, 2)
    run(mm.mlock(at(0), 2 * P))
    run(mm.mremap(at(0), 2 * P, 2 * P, MREMAP_MOVES | 4, at(20)))
    run(call(mm, "setrlimit", (RLIMIT_MEMLOCK, 4 * P)))
    assert errno_of(mm.mlock(at(0), P)) == "ENOMEM"


def test_arguments_are_as_wide_as_the_call_declares_them(mm: Mm) -> None:
    map_at(mm, 0, 1)
    run(mm.touch(at(0), P, "write"))
    run(call(mm, "madvise", (at(0), P, DONTNEED + (1 << 32))))
    assert mm.present(at(0), at(1)) == []
    file = mm.memory.create_file("f", "disk", 1)
    assert errno_of(call(mm, "ftruncate", (file, 1 << 63))) == "EINVAL"
    assert errno_of(call(mm, "ftruncate", (file, 1 << 44))) == "EFBIG"
    assert errno_of(call(mm, "punch", (file, (1 << 64) - P, P))) == "EINVAL"


def test_lengths_that_are_rounded_up_to_nothing(mm: Mm) -> None:
    map_at(mm, 0, 2, RW, ANON_SHARED)
    everything = (1 << 64) - 1
    assert errno_of(mm.msync(at(0), everything, 4)) is None
    assert errno_of(mm.mlock(at(0), everything)) is None
    assert errno_of(mm.madvise(at(0), everything, 4)) == "EINVAL"
    twin = run(mm.mremap(at(0), everything, 2 * P, MREMAP_MAYMOVE))  # length 0: a second mapping
    run(mm.store(twin, b"both"))
    assert run(mm.load(at(0), 4)) == b"both"


def test_whole_huge_pages_are_put_where_they_can_be_huge(mm: Mm) -> None:
    run(mm.mmap(0, P, RW, ANON_PRIVATE))
    assert run(mm.mmap(0, PMD_SIZE, RW, ANON_PRIVATE)) % PMD_SIZE == 0
    assert run(mm.mmap(0, PMD_SIZE + P, RW, ANON_PRIVATE)) % PMD_SIZE
    file = mm.memory.create_file("f", "disk", 4)
    assert run(mm.mmap(0, 2 * PMD_SIZE, 1, 2, file, 3 * P)) % PMD_SIZE == 3 * P


def test_a_failed_mmap_leaves_a_gap_where_something_was(mm: Mm) -> None:
    map_at(mm, 0, 3)
    file = mm.memory.create_file("f", "disk", 4)
    assert errno_of(mm.mmap(at(1), P, 1, 2 | FIXED | 0x80000, file, 0)) == "EOPNOTSUPP"
    assert [(each.start, each.end) for each in mm.mappings()] == [(at(0), at(1)), (at(2), at(3))]


def test_out_of_frames_is_an_error_and_nothing_is_lost() -> None:
    mm = Memory(frames_nr=4).create_mm()
    map_at(mm, 0, 8)
    assert errno_of(mm.touch(at(0), 8 * P, "write")) == "ENOMEM"
    assert mm.resident_pages() == 3
    run(mm.munmap(at(0), 8 * P))
    assert mm.memory.frames.free_nr == 3
    check_idle(mm.memory)


def test_locked_memory(mm: Mm) -> None:
    map_at(mm, 0, 4)
    run(mm.mlock(at(1) + 5, P))
    assert mm.present(at(0), at(4)) == [(1, 3)]
    assert len(mm.mappings()) == 3
    for advice in (DONTNEED, PAGEOUT, REMOVE):
        assert errno_of(mm.madvise(at(1), P, advice)) == "EINVAL"
    assert told(mm.madvise(at(1), P, DONTNEED_LOCKED)) == [(1, 2)]
    run(mm.munlock(at(0), 4 * P))
    assert len(mm.mappings()) == 1


def test_advice_that_only_changes_flags_splits_and_merges(mm: Mm) -> None:
    map_at(mm, 0, 3)
    run(mm.madvise(at(1), P, DONTDUMP))
    assert len(mm.mappings()) == 3
    run(mm.madvise(at(1), P, 17))
    assert len(mm.mappings()) == 1
    run(mm.madvise(at(0), P, HUGEPAGE))
    assert len(mm.mappings()) == 2
    assert errno_of(mm.madvise(at(0), P, COLLAPSE)) == "EINVAL"
    assert errno_of(mm.madvise(at(0), P, WILLNEED)) is None


def test_execute_needs_the_right_but_brings_the_page(mm: Mm) -> None:
    map_at(mm, 0, 1, 1)
    assert errno_of(mm.touch(at(0), 1, "execute")) == "EFAULT"
    assert mm.present(at(0), at(1)) == [(0, 1)]
    map_at(mm, 0, 1, 5)
    assert errno_of(mm.touch(at(0), 1, "execute")) is None


def test_exit_releases_before_anything_is_freed(mm: Mm) -> None:
    map_at(mm, 0, 2)
    run(mm.store(at(0), b"x"))
    free = mm.memory.frames.free_nr
    operation = mm.exit()
    note = next(operation)
    assert type(note).__name__ == "Release"
    assert mm.memory.frames.free_nr == free
    note = operation.send(None)  # type: ignore[arg-type]
    assert (note.start, note.end) == (0, TASK_SIZE)
    assert mm.memory.frames.quarantine_nr == 1
    with pytest.raises(StopIteration):
        next(operation)
    assert mm.memory.frames.free_nr == free + 1
    assert errno_of(mm.mmap(at(0), P, RW, ANON_PRIVATE | FIXED)) == "ESRCH"
    with pytest.raises(MmError, match="ESRCH"):
        mm.memory.mm(mm.id)


def test_nobody_registered_nothing_is_yielded(mm: Mm) -> None:
    mm.notified = False
    map_at(mm, 0, 4, RW, ANON_PRIVATE | 0x8000)
    for operation in (mm.mprotect(at(0), P, 1), mm.fork(), mm.madvise(at(2), P, DONTNEED), mm.munmap(at(0), 4 * P)):
        with pytest.raises(StopIteration):
            next(operation)


def test_the_two_mebibyte_block_that_a_boundary_cuts_is_told_of(mm: Mm) -> None:
    map_at(mm, 0, 4096)
    run(mm.touch(at(0), 1, "write"))
    assert told(mm.munmap(at(600), 10 * P)) == [(512, 1024), (600, 610)]
    assert told(mm.mprotect(at(512), 88 * P, 1)) == [(512, 600)]
