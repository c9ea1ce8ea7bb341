"""What a program recording leaves open, and how it is worked out."""

from mmubus.inspection import Mapping, PageRun
from mmubus.linux import FileKind, Op
from mmubus.trace.format import Operation, Snapshot
from mmubus.trace.program import first_break, overwritten_snapshots
from mmubus.trace.program_files import key_of, plan_files
from mmubus.trace.reconcile import repairs_of

PAGE = 4096
PRIVATE, FIXED, ANONYMOUS = 2, 0x10, 0x20


def mmap(number: int, addr: int, length: int, flags: int, fd: int, offset: int = 0, *, pid: int = 1) -> Operation:
    return Operation(number, pid, "mmap", (addr, length, 1, flags, fd, offset), ret=addr)


def snapshot(start: int, end: int, protection: str, *resident: tuple[int, int, str], **more: object) -> Snapshot:
    options = {"offset": 0, "file": None, "name": ""} | more
    return Snapshot(start, end, protection, resident=resident, **options)


def process(number: int, *maps: Snapshot, pid: int = 1, why: str = "exec") -> Operation:
    return Operation(number, pid, "process", (), why=why, maps=maps)


def test_the_loader_s_segments_are_one_file():
    plan = plan_files(
        [
            mmap(0, 0x10000, 0x5000, PRIVATE, 3),
            mmap(1, 0x12000, 0x2000, PRIVATE | FIXED, 3, 0x2000),
            mmap(2, 0x14000, 0x2800, PRIVATE | FIXED, 3, 0x4000),
        ]
    )
    assert plan.mapped == {0: ("fd", 0), 1: ("fd", 0), 2: ("fd", 0)}
    assert plan.sizes == {("fd", 0): 0x7000}


def test_a_descriptor_is_used_again_for_another_file():
    plan = plan_files([mmap(0, 0x10000, 100, PRIVATE, 3), mmap(1, 0x20000, 100, PRIVATE, 3)])
    assert plan.mapped == {0: ("fd", 0), 1: ("fd", 1)}


def test_descriptors_of_two_processes_are_two_files():
    plan = plan_files([mmap(0, 0x10000, 0x4000, PRIVATE, 3), mmap(1, 0x11000, 0x1000, PRIVATE | FIXED, 3, pid=2)])
    assert len(set(plan.mapped.values())) == 2


def test_anonymous_and_failed_mappings_have_no_file():
    failed = Operation(1, 1, "mmap", (0, PAGE, 1, PRIVATE, 3, 0), err="EBADF")
    assert plan_files([mmap(0, 0x10000, PAGE, PRIVATE | ANONYMOUS, 0xFFFFFFFF), failed]).mapped == {}


def test_files_of_snapshots_reach_as_far_as_they_are_mapped():
    code = snapshot(0x10000, 0x12000, "r-xp", offset=0x3000, file="fe:00:7")
    shared = snapshot(0x20000, 0x21000, "rw-s", file="00:01:9")
    vdso = snapshot(0x30000, 0x31000, "r-xp", (0, 1, "f"), name="[vdso]")
    plan = plan_files([process(0, code, shared, vdso)])
    assert plan.sizes == {("fe:00:7", 0): 0x5000, ("00:01:9", 0): 0x1000, ("special", 0x30000): 0x1000}
    assert plan.kinds[("00:01:9", 0)] is FileKind.SHM
    assert key_of(snapshot(0x40000, 0x41000, "r--p", name="[vvar]")) is None


def fault(number: int, address: int) -> Operation:
    return Operation(number, 1, "write", (address, PAGE))


def brk(number: int, asked: int, ret: int) -> Operation:
    return Operation(number, 1, "brk", (asked,), ret=ret)


def test_the_first_break_is_asked_for_by_the_program():
    assert first_break([fault(0, 0x900000), brk(1, 0, 0x555000), brk(2, 0x576000, 0x576000)], []) == 0x555000


def test_the_first_break_is_the_lowest_page_below_the_new_one():
    below = [snapshot(0x400000, 0x500000, "rw-p")]
    rest = [fault(0, 0x4FF000), brk(1, 0x560000, 0x560000), fault(2, 0x510000), fault(3, 0x520000), fault(4, 0x700000)]
    assert first_break(rest, below) == 0x510000
    assert first_break(rest[:2], below) == 0x560000 - 0x21000
    assert first_break([], below) == 0


def test_snapshots_that_a_later_program_overwrote():
    first, second = snapshot(0x10000, 0x11000, "r--p"), snapshot(0x20000, 0x21000, "r--p")
    same = [process(0, second), process(5, second), process(9, second, pid=2)]
    assert overwritten_snapshots(same) == {0}
    assert overwritten_snapshots([process(0, first), process(5, second), process(6, second, why="fork")]) == set()


def run(start: int, end: int, *, exclusive: bool) -> PageRun:
    return PageRun(start, end, 1, False, True, True, True, False, exclusive, False, False)


def line(start: int, end: int, protection: str) -> Mapping:
    return Mapping(start, end, protection, 0, 0, "", 0)


def test_pages_that_the_child_has_copied_unseen():
    wanted = [snapshot(0x10000, 0x18000, "rw-p", (0, 2, "a"), (2, 4, "s"), (4, 6, "a"))]
    pages = [run(0x10000, 0x11000, exclusive=True), run(0x11000, 0x18000, exclusive=False)]
    repair = repairs_of(wanted, [line(0x10000, 0x18000, "rw-p")], pages)
    assert repair.calls == ((Op.WRITE, 0x11000, 0x1000), (Op.WRITE, 0x14000, 0x2000))
    assert (repair.mappings, repair.pages) == (0, 3)


def test_pages_that_nobody_can_have_copied():
    """Where the child may not write, only its parent can have copied away."""
    wanted = [snapshot(0x10000, 0x11000, "r--p", (0, 1, "a")), snapshot(0x20000, 0x21000, "rw-s", (0, 1, "a"))]
    there = [line(0x10000, 0x11000, "r--p"), line(0x20000, 0x21000, "rw-s")]
    repair = repairs_of(wanted, there, [run(0x10000, 0x21000, exclusive=False)])
    assert repair.calls == ()


def test_mappings_that_came_went_and_changed():
    wanted = [
        snapshot(0x10000, 0x12000, "rw-p"),
        snapshot(0x12000, 0x14000, "r--p"),
        snapshot(0x30000, 0x31000, "rw-p"),
    ]
    there = [line(0x10000, 0x14000, "rw-p"), line(0x20000, 0x22000, "rw-p")]
    repair = repairs_of(wanted, there, [])
    assert repair.calls == (
        (Op.MPROTECT, 0x12000, 0x2000, 1),
        (Op.MUNMAP, 0x20000, 0x2000),
        (Op.MMAP, 0x30000, 0x1000, 3, 0x32, 0, 0),
    )
    assert repair.mappings == 3
