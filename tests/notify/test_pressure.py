"""Sustained pressure over the whole bus: more memory wanted than there is, and four drivers that hold translations.

One is always young, one pins a tenth. Nothing is freed early (the rules are judged over the whole history), no page is
lost or wrong, progress never stops, and the young driver's pages are the last to go.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE
from mmubusd.mm.aging import page_referenced
from mmubusd.mm.check import check_memory
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.memory import Memory
from mmubusd.mm.pgtable import PFN_SHIFT
from mmubusd.notify import Op, Registration
from notify.machine_room import AT, READ_WRITE, MachineRoom
from notify.transcript import MAINLINE, SEED, Client, World

FRAMES = 1024
YOUNG_PAGES = 128
PAGES_EACH = (2 * FRAMES - YOUNG_PAGES) // 3
"""Four drivers with an address space each; the young one uses less, all together twice the frames."""


class Room(MachineRoom):
    def __init__(self, **memory: Any) -> None:
        World.__init__(self, None, Memory(**memory))


class Driver:
    """A model driver: it lets go when it is told, and says which of its pages are young."""

    def __init__(self, room: Room, name: str, ops: tuple[Op, ...], young: bool) -> None:
        self.room, self.young = room, young
        self.mm = room.program(PAGES_EACH, data=b"")
        self.client: Client = room.client(name)
        self.registration: Registration = self.client.register(self.mm, *ops)
        self.held: dict[int, tuple[int, int]] = {}
        self.asked: list[int] = []  # pages a message of aging
        self.evicted: list[int] = []

    def answer(self) -> bool:
        """Handle and acknowledge what has come; whether anything has."""
        self.client.received.clear()
        if not self.client.hears():
            return False
        for seq, notice, _ in self.client.received:
            if notice.op in (Op.AGE_PAGE, Op.CLEAR_FLUSH_YOUNG):
                self.asked.append(len(notice.pages))
                young = notice.pages if self.young else ()
                self.client.acks(seq=seq, young=tuple(young), also=(seq,))
                continue
            for page in notice.pages or range(notice.start, notice.end, PAGE_SIZE):
                if self.held.pop(page, None) is not None:
                    self.evicted.append(page)
        self.client.acks(self.client.received[-1][0])
        return True

    def take(self, page: int, write: bool) -> None:
        """Fault one page in, while everyone answers."""
        address = AT + page * PAGE_SIZE
        operation = self.room.fault(self.client, self.registration, address, 1, write=write, wait_s=1e9)
        self.room.settle(operation)
        translations = operation.value().translations
        assert translations is not None
        self.held[address] = (int(translations.pfns[0]), int(translations.generations[0]))


class Soak(Room):
    def __init__(self, profile: str) -> None:
        super().__init__(frames_nr=FRAMES, swap_slots_nr=4096, profile=profile)
        ops = SEED if profile == "v3" else MAINLINE
        self.drivers = [Driver(self, f"driver {n}", ops, young=n == 0) for n in range(4)]

    def settle(self, operation: Any = None) -> None:
        """Everyone answers until nothing is left to answer. Progress never stops: an operation must end."""
        for _ in range(100_000):
            answered = [driver.answer() for driver in self.drivers]
            self.bus.expire(self.now)
            if not any(answered) and (operation is None or operation.done):
                return
        raise AssertionError("an operation makes no progress")


@pytest.mark.parametrize("profile", ["mainline", "v3"])
def test_a_working_set_of_twice_the_frames(profile: str) -> None:
    soak = Soak(profile)
    draw = random.Random(7)
    model: dict[tuple[int, int], bytes] = {}
    pinning = soak.drivers[1]
    operation = soak.bus.pin(
        pinning.client.session, pinning.registration.id, AT, AT + FRAMES // 10 * PAGE_SIZE, True, soak.now
    )
    soak.settle(operation)
    pinned = operation.value().translations.pfns.tolist()
    for step in range(6000):
        which = draw.randrange(4)
        driver, page = soak.drivers[which], draw.randrange(PAGES_EACH)
        if which == 0:
            page %= YOUNG_PAGES  # the young driver's: what it uses fits, if everyone else gives way
        address = AT + page * PAGE_SIZE
        if draw.random() < 0.5:
            driver.take(page, write=True)
            data = b"%d %d" % (which, step)
            soak.write(driver.client, driver.registration, address, driver.held[address], data)
            model[which, page] = data
        else:
            operation = soak.run(driver.mm.load(address, 12))
            soak.settle(operation)
            want = model.get((which, page), b"")
            assert operation.value()[: len(want)] == want, f"step {step}: page {page} of driver {which}"
        if step % 500 == 0:
            check_memory(soak.memory)
    for (which, page), want in model.items():
        operation = soak.run(soak.drivers[which].mm.load(AT + page * PAGE_SIZE, len(want)))
        soak.settle(operation)
        assert operation.value() == want
    check_memory(soak.memory)
    for vpn, pfn in enumerate(pinned, AT >> PAGE_SHIFT):
        assert pinning.mm.pgtable.get(vpn) >> PAGE_SHIFT == pfn, "a pinned page never goes"
    young, *others = soak.drivers
    assert sum(len(driver.evicted) for driver in others) > 500
    assert len(young.evicted) == 0, "while others have pages that are not young"
    for driver in soak.drivers:
        assert driver.asked, "everyone is asked"
        assert len(driver.asked) <= -(-sum(driver.asked) // 32), "one message for 32 pages or more"


def test_the_young_drivers_pages_go_when_nothing_else_is_left() -> None:
    soak = Soak("mainline")
    young, other = soak.drivers[0], soak.drivers[1]
    for page in range(400):
        young.take(page, write=True)
    for driver in (other, soak.drivers[2]):
        operation = soak.bus.pin(
            driver.client.session, driver.registration.id, AT, AT + 400 * PAGE_SIZE, True, soak.now
        )
        soak.settle(operation)
        operation.value()
    assert young.evicted, "pinned pages cannot go, so at last the young ones do"
    check_memory(soak.memory)


def test_locked_pages_stay_and_who_wants_more_gets_an_error() -> None:
    room = Room(frames_nr=64, swap_slots_nr=256)
    mm = room.program(128, data=b"")
    room.run(mm.mlock(AT, 40 * PAGE_SIZE)).value()
    room.run(mm.touch(AT, 128 * PAGE_SIZE, "write")).value()
    assert mm.present(AT, AT + 40 * PAGE_SIZE) == [(0, 40)]
    error = room.run(mm.mlock(AT, 100 * PAGE_SIZE)).error
    assert error is not None
    assert error.errno == "EAGAIN"  # what mlock(2) says when memory cannot be had
    check_memory(room.memory)


def test_without_a_swap_file_only_pages_of_files_can_go() -> None:
    room = Room(frames_nr=64)
    file = room.memory.create_file("data", "disk", 100)
    mm = room.program(200, data=b"")
    room.run(mm.mmap(0x2000_0000, 100 * PAGE_SIZE, READ_WRITE, 1 | 0x10, file, 0)).value()
    for page in range(100):
        room.run(mm.store(0x2000_0000 + page * PAGE_SIZE, b"file %d" % page)).value()
    for page in range(100):
        assert room.run(mm.load(0x2000_0000 + page * PAGE_SIZE, 7)).value().rstrip(b"\0") == b"file %d" % page
    assert room.run(mm.touch(AT, 200 * PAGE_SIZE, "write")).error.errno == "ENOMEM"
    check_memory(room.memory)


def test_kswapd_runs_beside_everyone_and_keeps_some_frames_free() -> None:
    room = Room(frames_nr=1024, swap_slots_nr=2048)
    mm = room.program(2000, data=b"")
    for page in range(1500):
        room.run(mm.touch(AT + page * PAGE_SIZE, PAGE_SIZE, "write")).value()
        room.bus.expire(room.now)
    assert room.memory.frames.free_nr >= room.memory.low_watermark
    assert not room.bus.running


def test_exporters_may_refuse_reclaim_and_their_pages_stay() -> None:
    room = Room(frames_nr=64, swap_slots_nr=256)
    mm = room.program(128)
    client = room.client("exporter")
    registration = client.register(None, Op.RMAP_INVALIDATE_PAGE)
    granted = room.bus.export(client.session, registration.id, mm.id, AT, AT + PAGE_SIZE, True, room.now).value()
    pfn = int(granted.translations.pfns[0])
    operation = room.run(mm.touch(AT + PAGE_SIZE, 127 * PAGE_SIZE, "write"))
    for _ in range(1000):
        if operation.done:
            break
        client.received.clear()
        client.hears()
        for seq, notice, _ in client.received:
            assert not notice.must_evict
            client.acks(seq, seq=seq, refused=True)
    assert operation.done
    operation.value()
    assert mm.pgtable.get(AT >> PAGE_SHIFT) >> PAGE_SHIFT == pfn
    assert room.run(mm.load(AT, 3)).value() == b"old"


class Reaped(Room):
    """Two address spaces, the larger of which has a driver that refuses so many times to let go at once."""

    def __init__(self, refusals: int) -> None:
        super().__init__(frames_nr=128, oom_kill=True)
        self.large, self.small = self.program(100), self.program(100)
        self.client_ = self.client("driver")
        self.registration = self.client_.register(self.large, *MAINLINE)
        self.run(self.large.touch(AT, 80 * PAGE_SIZE, "write")).value()
        self.held = self.grant(self.client_, self.registration, AT, write=True)[0]
        self.nonblock = 0
        operation = self.run(self.small.touch(AT, 90 * PAGE_SIZE, "write"))
        lines = []
        for _ in range(200):
            self.client_.received.clear()
            lines += self.client_.hears()
            for seq, notice, _ in self.client_.received:
                refuses = notice.nonblock and self.nonblock < refusals
                if notice.nonblock:
                    self.nonblock += 1
                    assert self.memory.frames.generation[self.held[0]] == self.held[1], "touched before the answer"
                self.client_.acks(seq, seq=seq, refused=refuses)
        self.lines, self.operation = lines, operation


def test_the_oom_reaper_takes_the_largest_address_space() -> None:
    room = Reaped(refusals=0)
    room.operation.value()
    assert room.nonblock == 1
    assert not room.large.alive, "it ends"
    assert room.small.alive
    check_memory(room.memory)


def test_a_refused_round_is_tried_again_and_gets_no_end() -> None:
    room = Reaped(refusals=3)
    room.operation.value()
    assert room.nonblock == 4
    assert sum("invalidate_range_start" in line and "200000" not in line for line in room.lines) >= 4
    ends = [line for line in room.lines if "invalidate_range_end" in line]
    assert len(ends) <= 2, "the refused ones have none"


def test_the_reaper_gives_up_after_ten_attempts() -> None:
    room = Reaped(refusals=1000)
    assert room.nonblock == 10
    room.operation.value()  # its exit, which may wait, has freed what the reaper could not
    assert not room.large.alive


def test_a_killed_address_space_serves_no_more_faults() -> None:
    """Semantic 36 in detail: nothing reads as zeros that was reaped."""
    room = Room(frames_nr=64)
    mm = room.program(8)
    mm.unstable = True
    client = room.client("driver")
    error = room.fault(client, client.register(mm, *MAINLINE), AT + PAGE_SIZE).error
    assert error.errno == "EFAULT"
    assert room.run(mm.load(AT + PAGE_SIZE, 1)).error.errno == "ENXIO"


def test_a_fault_of_more_than_there_is_gives_up() -> None:
    """Kernel: hmm_range_fault() says -EBUSY, and drivers give up after a while."""
    room = Room(frames_nr=64, swap_slots_nr=1024)
    mm = room.program(pages=200)
    client = room.client("driver")
    registration = client.register(mm, *MAINLINE)
    operation = room.fault(client, registration, AT, 200, write=True, wait_s=1e9)
    for _ in range(10_000):
        if operation.done:
            break
        client.received.clear()
        if client.hears():
            client.acks(client.received[-1][0])
        room.bus.expire(room.now)
    assert getattr(operation.error, "errno", "") == "EBUSY"
    check_memory(room.memory)


@pytest.mark.parametrize(
    ("profile", "ops", "op"), [("mainline", MAINLINE, Op.CLEAR_FLUSH_YOUNG), ("v3", SEED, Op.AGE_PAGE)]
)
def test_a_huge_page_is_asked_about_once(profile: str, ops: tuple[Op, ...], op: Op) -> None:
    room = Room(frames_nr=4096, thp=Thp.ALWAYS, profile=profile)
    mm = room.program(1024, data=b"")
    block = -(-AT // PMD_SIZE) * PMD_SIZE
    client = room.client("driver")
    registration = client.register(mm, *ops)
    room.grant(client, registration, block, 512, write=True)
    head = mm.pgtable.get(block >> PAGE_SHIFT) >> PFN_SHIFT
    operation = room.run(page_referenced(room.memory, [head]))
    client.hears()
    ((seq, notice, _),) = client.received[-1:]
    assert (notice.op, notice.start, notice.end, notice.pages) == (op, block, block + PMD_SIZE, ())
    client.acks(seq, seq=seq, young=(block + 9 * PAGE_SIZE,))
    assert operation.value() == {head: 2}, "the program that has just made it, and the driver that has used page 9"
