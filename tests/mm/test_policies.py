"""Memory policies: who has which, when mappings merge, and from which node pages come."""

from __future__ import annotations

from typing import Any

import pytest
from mm.driver import ANON_PRIVATE, ANON_SHARED, FIXED, RW, at, errno_of, run
from mmubusd.mm import Memory, Mm
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE
from mmubusd.mm.check import check_idle, check_memory
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.madvise import HUGEPAGE, PAGEOUT, POPULATE_WRITE
from mmubusd.mm.mempolicy import (
    MPOL_BIND,
    MPOL_DEFAULT,
    MPOL_F_NUMA_BALANCING,
    MPOL_F_RELATIVE_NODES,
    MPOL_F_STATIC_NODES,
    MPOL_INTERLEAVE,
    MPOL_LOCAL,
    MPOL_PREFERRED,
    MPOL_PREFERRED_MANY,
    MPOL_WEIGHTED_INTERLEAVE,
    Mempolicy,
    SharedPolicy,
)
from mmubusd.mm.mmap import MAP_HUGETLB
from mmubusd.mm.pgtable import PFN_SHIFT
from mmubusd.mm.set_mempolicy import MPOL_F_ADDR, MPOL_F_MEMS_ALLOWED, MPOL_F_NODE, POLICY

P = PAGE_SIZE
NODES = 4


def machine(frames_nr: int = 4096, **options: Any) -> Mm:
    mm = Memory(frames_nr=frames_nr, swap_slots_nr=64, nodes_nr=NODES, **options).create_mm("test")
    mm.notified = True
    return mm


@pytest.fixture
def mm() -> Mm:
    return machine()


def map_pages(mm: Mm, pages: int = 8, flags: int = ANON_PRIVATE, page: int = 0) -> None:
    run(mm.mmap(at(page), pages * P, RW, flags | FIXED))


def touch(mm: Mm, pages: int = 8, page: int = 0) -> list[int]:
    """Write to pages. Returns: the node of each."""
    for number in range(page, page + pages):
        run(mm.store(at(number), b"page %d" % number))
    return nodes_of(mm, pages, page)


def nodes_of(mm: Mm, pages: int, page: int = 0) -> list[int]:
    frames = mm.memory.frames
    pfns = [mm.pgtable.get(at(number) >> PAGE_SHIFT) >> PFN_SHIFT for number in range(page, page + pages)]
    assert all(pfns)
    return [frames.node_of(pfn) for pfn in pfns]


def pieces(mm: Mm) -> list[int]:
    """How many pages each mapping has."""
    return [vma.pages for vma in mm.vmas]


def policy(mm: Mm, page: int | None = None) -> tuple[int, int]:
    addr, flags = (0, 0) if page is None else (at(page), MPOL_F_ADDR)
    mode, nodes = POLICY.unpack(run(mm.get_mempolicy(addr, flags)))
    return mode, nodes


# Whose it is


def test_a_range_is_cut_out_and_merged_again_by_its_policy(mm: Mm) -> None:
    map_pages(mm)
    run(mm.mbind(at(2), 3 * P, MPOL_BIND, 0b0110, 0))
    assert pieces(mm) == [2, 3, 3]
    assert policy(mm, 2) == (MPOL_BIND, 0b0110)
    assert policy(mm, 5) == (MPOL_DEFAULT, 0)
    run(mm.mbind(at(5), P, MPOL_BIND, 0b0110, 0))
    assert pieces(mm) == [2, 4, 2]
    run(mm.mbind(at(5), P, MPOL_BIND | MPOL_F_STATIC_NODES, 0b0110, 0))
    assert pieces(mm) == [2, 3, 1, 2], "flags tell policies apart"
    run(mm.mbind(at(0), 8 * P, MPOL_DEFAULT, 0, 0))
    assert pieces(mm) == [8]
    map_pages(mm, 4, page=8)
    assert pieces(mm) == [12], "what is mapped anew has none, as its neighbour"
    run(mm.mbind(at(8), 4 * P, MPOL_LOCAL, 0, 0))
    map_pages(mm, 2, page=12)
    assert pieces(mm) == [8, 4, 2]
    check_memory(mm.memory)


def test_it_moves_with_the_mapping_and_is_inherited(mm: Mm) -> None:
    map_pages(mm)
    run(mm.mbind(at(0), 2 * P, MPOL_PREFERRED, 0b1000, 0))
    run(mm.set_mempolicy(MPOL_INTERLEAVE, 0b0011))
    run(mm.mremap(at(0), 2 * P, 2 * P, 3, at(20)))
    assert policy(mm, 20) == (MPOL_PREFERRED, 0b1000)
    child = run(mm.fork())
    assert policy(child, 20) == (MPOL_PREFERRED, 0b1000)
    assert policy(child) == (MPOL_INTERLEAVE, 0b0011)
    run(child.set_mempolicy(MPOL_DEFAULT, 0))
    assert policy(mm) == (MPOL_INTERLEAVE, 0b0011)
    assert touch(child, 1, 20) == [3]


def test_shared_memory_keeps_it_for_whoever_maps_it(mm: Mm) -> None:
    memory = mm.memory
    file = memory.create_file("f", "shm", 8)
    other = memory.create_mm("other")
    for each in (mm, other):
        run(each.mmap(at(0), 8 * P, RW, 1 | FIXED, file, 0))
    run(mm.mbind(at(2), 2 * P, MPOL_BIND, 0b0100, 0))
    assert policy(other, 2) == (MPOL_BIND, 0b0100)
    assert len(other.vmas) == 1
    assert touch(other, 5) == [0, 0, 2, 2, 0]
    run(mm.munmap(at(0), 8 * P))
    run(mm.mmap(at(0), 8 * P, RW, 1 | FIXED, file, 0))
    assert policy(mm, 3) == (MPOL_BIND, 0b0100)
    run(mm.mbind(at(0), 8 * P, MPOL_LOCAL, 0, 0))
    assert policy(other, 3) == (MPOL_LOCAL, 0)
    check_idle(memory)


def test_policies_of_a_file_by_page() -> None:
    shared, one, two = SharedPolicy(), Mempolicy(MPOL_BIND, 0, 1), Mempolicy(MPOL_BIND, 0, 2)
    shared.set(0, 10, one)
    shared.set(4, 6, two)
    assert [shared.lookup(index) for index in (0, 3, 4, 5, 6, 9, 10)] == [one, one, two, two, one, one, None]
    shared.set(5, 20, None)
    assert [shared.lookup(index) for index in (3, 4, 5, 9)] == [one, two, None, None]


def test_mappings_of_different_policies_share_no_anon_vma(mm: Mm) -> None:
    map_pages(mm)
    run(mm.mbind(at(4), 4 * P, MPOL_LOCAL, 0, 0))
    touch(mm)
    run(mm.mbind(at(4), 4 * P, MPOL_DEFAULT, 0, 0))
    assert pieces(mm) == [4, 4], "as on Linux they merge no more"


def test_who_asks_is_told(mm: Mm) -> None:
    map_pages(mm)
    run(mm.mbind(at(0), P, MPOL_BIND | MPOL_F_STATIC_NODES, 0b110001, 0))
    assert policy(mm, 0) == (MPOL_BIND | MPOL_F_STATIC_NODES, 0b110001), "the nodes as they were named"
    run(mm.mbind(at(0), P, MPOL_BIND | MPOL_F_RELATIVE_NODES, 0b110000, 0))
    assert touch(mm, 1) == [0], "the fifth of four nodes is the first"
    run(mm.mbind(at(0), P, MPOL_PREFERRED, 0b1100, 0))
    assert policy(mm, 0) == (MPOL_PREFERRED, 0b0100)
    run(mm.set_mempolicy(MPOL_WEIGHTED_INTERLEAVE, 0b1100))
    assert POLICY.unpack(run(mm.get_mempolicy(0, MPOL_F_NODE)))[0] == 2
    assert POLICY.unpack(run(mm.get_mempolicy(0, MPOL_F_MEMS_ALLOWED))) == (0, 0b1111)
    assert POLICY.unpack(run(mm.get_mempolicy(at(3), MPOL_F_ADDR | MPOL_F_NODE)))[0] == 0, "the zero page's"
    touch(mm, 1, 3)
    found = POLICY.unpack(run(mm.get_mempolicy(at(3) + 5, MPOL_F_ADDR | MPOL_F_NODE)))[0]
    assert [found] == nodes_of(mm, 1, 3)


@pytest.mark.parametrize(
    ("addr", "flags", "errno"),
    [
        (0, 8, "EINVAL"),
        (at(0), 0, "EINVAL"),
        (0, MPOL_F_MEMS_ALLOWED | MPOL_F_NODE, "EINVAL"),
        (0, MPOL_F_NODE, "EINVAL"),
        (at(9), MPOL_F_ADDR, "EFAULT"),
        (at(9), MPOL_F_ADDR | MPOL_F_NODE, "EFAULT"),
        (at(7), MPOL_F_ADDR | MPOL_F_NODE, "EFAULT"),
        (at(7), MPOL_F_ADDR, None),
    ],
)
def test_get_mempolicy_refuses(mm: Mm, addr: int, flags: int, errno: str | None) -> None:
    map_pages(mm)
    run(mm.mprotect(at(7), P, 0))
    assert errno_of(mm.get_mempolicy(addr, flags)) == errno


@pytest.mark.parametrize(
    ("mode", "nodes", "errno"),
    [
        (MPOL_DEFAULT, 0b1, "EINVAL"),
        (MPOL_LOCAL, 0b1, "EINVAL"),
        (MPOL_LOCAL | MPOL_F_STATIC_NODES, 0, "EINVAL"),
        (MPOL_PREFERRED | MPOL_F_RELATIVE_NODES, 0, "EINVAL"),
        (MPOL_BIND, 0, "EINVAL"),
        (MPOL_BIND, 1 << 5, "EINVAL"),
        (MPOL_BIND | MPOL_F_STATIC_NODES | MPOL_F_RELATIVE_NODES, 1, "EINVAL"),
        (MPOL_INTERLEAVE | MPOL_F_NUMA_BALANCING, 1, "EINVAL"),
        (MPOL_BIND | MPOL_F_NUMA_BALANCING, 1, None),
        (7, 1, "EINVAL"),
        (MPOL_PREFERRED, 0, None),
    ],
)
def test_set_mempolicy_refuses(mm: Mm, mode: int, nodes: int, errno: str | None) -> None:
    assert errno_of(mm.set_mempolicy(mode, nodes)) == errno


def test_home_nodes(mm: Mm) -> None:
    map_pages(mm)
    assert errno_of(mm.set_mempolicy_home_node(at(0), 8 * P, 2, 0)) == "ENOENT"
    assert errno_of(mm.set_mempolicy_home_node(at(0), 8 * P, 2, 1)) == "EINVAL"
    assert errno_of(mm.set_mempolicy_home_node(at(0), 8 * P, NODES, 0)) == "EINVAL"
    assert errno_of(mm.set_mempolicy_home_node(at(0), 0, 2, 0)) is None
    run(mm.mbind(at(0), 4 * P, MPOL_BIND, 0b1101, 0))
    run(mm.mbind(at(4), 4 * P, MPOL_LOCAL, 0, 0))
    assert errno_of(mm.set_mempolicy_home_node(at(1), 7 * P, 2, 0)) == "EOPNOTSUPP"
    assert pieces(mm) == [1, 3, 4], "what lies before has been done"
    assert touch(mm, 5) == [0, 2, 2, 2, 0]


# Where pages come from


@pytest.mark.parametrize(
    ("mode", "nodes", "expected"),
    [
        (MPOL_DEFAULT, 0, [1] * 8),
        (MPOL_LOCAL, 0, [1] * 8),
        (MPOL_PREFERRED, 0b1000, [3] * 8),
        (MPOL_PREFERRED_MANY, 0b1001, [0] * 8),
        (MPOL_BIND, 0b1100, [2] * 8),
        (MPOL_INTERLEAVE, 0b1010, [1, 3] * 4),
        (MPOL_WEIGHTED_INTERLEAVE, 0b0111, [2, 0, 1] * 3),
    ],
)
def test_the_policy_of_a_mapping_or_of_the_program_says_where(
    mm: Mm, mode: int, nodes: int, expected: list[int]
) -> None:
    run(mm.numa_scan(at(0), P, 1))  # the program runs on node 1
    map_pages(mm, 24)
    run(mm.mbind(at(0), 8 * P, mode, nodes, 0))
    assert touch(mm) == expected[:8]
    run(mm.set_mempolicy(mode, nodes))
    found = touch(mm, 8, 8)
    assert found == [expected[(number + 8) % len(set(expected))] for number in range(8)]
    run(mm.madvise(at(16), 8 * P, POPULATE_WRITE))
    assert nodes_of(mm, 8, 16) == [expected[number % len(set(expected))] for number in range(16, 24)]
    check_idle(mm.memory)


def test_who_prefers_goes_elsewhere_when_there_is_no_room_and_who_is_bound_reclaims() -> None:
    mm = machine(frames_nr=64)  # 16 frames a node
    map_pages(mm, 40)
    run(mm.mbind(at(0), 20 * P, MPOL_PREFERRED, 0b1000, 0))
    assert touch(mm, 20) == [3] * 16 + [2] * 4
    run(mm.mbind(at(20), 20 * P, MPOL_BIND, 0b0010, 0))
    touch(mm, 20, 20)
    assert mm.memory.frames.free.nr_on((0,)) == 15, "there is room elsewhere"
    assert mm.present(at(0), at(20)) == [(0, 20)], "and others keep theirs"
    swapped = sum(b - a for a, b in mm.swapped(at(20), at(40)))
    assert swapped >= 4
    for page in range(40):
        assert run(mm.load(at(page), 7)).rstrip(b"\0") == b"page %d" % page
    check_idle(mm.memory)


def test_who_is_bound_and_can_reclaim_nothing_gets_enomem() -> None:
    mm = Memory(frames_nr=64, nodes_nr=NODES).create_mm("test")
    map_pages(mm, 40)
    run(mm.mbind(at(0), 40 * P, MPOL_BIND, 0b0010, 0))
    touch(mm, 16)
    assert errno_of(mm.store(at(16), b"x")) == "ENOMEM"
    assert mm.memory.frames.free_nr == 47
    run(mm.mbind(at(16), P, MPOL_BIND, 0b0110, 0))
    assert touch(mm, 1, 16) == [2]
    check_idle(mm.memory)


def test_pages_that_come_back_and_copies_follow_it_too(mm: Mm) -> None:
    map_pages(mm, 2)
    touch(mm, 2)
    run(mm.mbind(at(0), 2 * P, MPOL_BIND, 0b0100, 0))
    run(mm.madvise(at(0), P, PAGEOUT))
    run(mm.load(at(0), 1))
    child = run(mm.fork())
    run(child.store(at(1), b"copy"))
    assert nodes_of(mm, 2) == [2, 0]
    assert nodes_of(child, 1, 1) == [2]
    check_idle(mm.memory)


def test_huge_pages_follow_it() -> None:
    mm = machine(frames_nr=8192, thp=Thp.MADVISE, hugetlb_nr=4)
    block = at(0) + PMD_SIZE & -PMD_SIZE
    run(mm.mmap(block, 2 * PMD_SIZE, RW, ANON_PRIVATE | FIXED))
    run(mm.madvise(block, 2 * PMD_SIZE, HUGEPAGE))
    run(mm.mbind(block, 2 * PMD_SIZE, MPOL_BIND, 0b0100, 0))
    run(mm.store(block, b"x"))
    assert mm.huge(block, block + PMD_SIZE) == [(0, 512)]
    run(mm.mmap(block + 4 * PMD_SIZE, PMD_SIZE, RW, ANON_SHARED | MAP_HUGETLB | FIXED))
    run(mm.mbind(block + 4 * PMD_SIZE, PMD_SIZE, MPOL_BIND, 0b1000, 0))
    run(mm.store(block + 4 * PMD_SIZE, b"x"))
    frames = mm.memory.frames
    pfns = [mm.pgtable.get(address >> PAGE_SHIFT) >> PFN_SHIFT for address in (block, block + 4 * PMD_SIZE)]
    assert [frames.node_of(pfn) for pfn in pfns] == [2, 3]
    run(mm.set_mempolicy(MPOL_BIND, 0b1000))
    wants_more = mm.mmap(block + 6 * PMD_SIZE, PMD_SIZE, RW, ANON_PRIVATE | MAP_HUGETLB | FIXED)
    assert errno_of(wants_more) == "ENOMEM", "its nodes have no huge page left"
    check_idle(mm.memory)
