"""The fifteen tests that peers' bugs ask for first, each by its number in the list."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import mmubus
import pytest
from mmubusd.mm.check import check_idle
from mmubusd.mm.errno import MmError
from mmubusd.mm.notification import InvalidateRange, Reason
from mmubusd.notify import FencedError, Limits, Op, PeerError, RequestError, StaleTranslation
from mmubusd.rpc import EmbeddedServer
from notify.machine_room import AT, MachineRoom
from notify.transcript import MAINLINE, PAGE, SEED, World, assert_rules
from patience import BUDGET_S

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure_unread import measure

BASE = 0x7000_0000_0000
FEATURES = frozenset({"within", "findings"})
FIXED = mmubus.MAP_PRIVATE | mmubus.MAP_ANONYMOUS | mmubus.MAP_FIXED
EVERY_CALL = ("munmap", "mprotect", "mremap", "exit")


def call(room: MachineRoom, mm: object, name: str) -> object:
    """One of the calls that take pages away."""
    program = room.memory.mm(1) if mm is None else mm
    match name:
        case "munmap":
            return program.munmap(AT, PAGE)  # type: ignore[attr-defined]
        case "mprotect":
            return program.mprotect(AT, PAGE, 1)  # type: ignore[attr-defined]
        case "mremap":
            return program.mremap(AT, PAGE, PAGE, 3, AT + 64 * PAGE)  # type: ignore[attr-defined]
        case _:
            return program.exit()  # type: ignore[attr-defined]


def test_01_same_address_again_with_a_new_frame() -> None:
    room = MachineRoom()
    nic = room.client("nic")
    mm = room.program(data=b"old")
    registration = nic.register(mm, *SEED)
    (old,) = room.grant(nic, registration, AT)
    room.run(mm.munmap(AT, PAGE), "munmap")
    nic.hears()
    nic.acks(1)
    room.run(mm.mmap(AT, PAGE, 3, 0x32)).value()
    room.run(mm.store(AT, b"new")).value()
    (new,) = room.grant(nic, registration, AT)
    with pytest.raises(StaleTranslation):
        room.read(nic, registration, AT, old)
    assert room.read(nic, registration, AT, new) == b"new"


def test_02_unread_notices_are_bounded_and_one_read_catches_up() -> None:
    put, ranges, growth, read = measure(20_000)
    assert put >= 20_000
    assert ranges <= 1024
    assert read <= 1024
    assert growth <= 1 << 20


@pytest.mark.parametrize("name", EVERY_CALL)
@pytest.mark.parametrize("after", ["ok", "error", "disconnect"])
def test_03_busy_and_then(name: str, after: str) -> None:
    room = MachineRoom(Limits(ack_budget_s=2.0, ack_budget_max_s=5.0, grace_s=0.5))
    nic = room.client("nic")
    mm = room.program()
    room.grant(nic, nic.register(mm, *SEED), AT)
    operation = room.run(call(room, mm, name), name)  # type: ignore[arg-type]
    nic.hears()
    room.later(1.5)
    for seq in range(1, nic.session.as_of_seq + 1):
        nic.acks(0, seq=seq, busy=True)
    room.later(1.5)
    assert not operation.done, "BUSY has bought time"
    assert nic.session.fenced is None
    if after == "ok":
        nic.acks(nic.session.as_of_seq)
        nic.hears()
        nic.acks(nic.session.as_of_seq)
    elif after == "error":
        for seq in range(1, nic.session.as_of_seq + 1):
            nic.acks(0, seq=seq, failed="broken")
    else:
        room.bus.session_lost(nic.session, room.now)
    room.later(6.0)
    assert operation.done
    assert (nic.session.fenced is None) == (after == "ok")
    assert_rules(room, over=False)


def test_04_a_handler_that_unmaps_its_own_range_anothers_and_one_in_flight() -> None:
    world = World()
    mm = world.memory.create_mm()

    def takes(start: int, end: int):
        yield InvalidateRange(mm, start, end, Reason.UNMAP)
        return "taken"

    a, b = world.client("a", features=FEATURES), world.client("b", features=FEATURES)
    a.register(mm, Op.INVALIDATE_RANGE, start=0, end=4 * PAGE)
    b.register(mm, Op.INVALIDATE_RANGE, start=8 * PAGE, end=12 * PAGE)
    first = world.run(takes(0, 4 * PAGE), "first")
    a.hears()
    elsewhere = world.bus.start(takes(8 * PAGE, 9 * PAGE), world.now, session=a.session, within=1)
    b.hears()
    b.acks(1)
    assert elsewhere.value() == "taken", "a range that another one holds is no deadlock"
    own = world.bus.start(takes(0, PAGE), world.now, label="its own", session=a.session, within=1)
    in_flight = world.bus.start(takes(2 * PAGE, 6 * PAGE), world.now, label="in flight", session=a.session, within=1)
    for operation in (own, in_flight):
        assert isinstance(operation.error, MmError)
        assert operation.error.errno == "EDEADLK"
    a.hears()
    a.acks(a.session.as_of_seq)
    assert first.value() == "taken"
    assert not world.bus.running


@pytest.mark.parametrize("invalidate_first", [True, False])
async def test_05_an_invalidation_between_populate_and_its_answer(invalidate_first: bool) -> None:
    async with (
        EmbeddedServer(frames_nr=1 << 12, ack_budget_s=BUDGET_S) as server,
        mmubus.connect(server.address) as bus,
    ):
        mm = await bus.create_mm()
        await mm.mmap(BASE, 4 * PAGE, flags=FIXED)
        mirror = await bus.mirror(mm)
        for turn in range(20):
            data = bytes([turn + 1]) * 8
            await mm.store(BASE, b"before".ljust(8))
            taking, populating = mm.madvise(BASE, PAGE, mmubus.MADV_DONTNEED), mirror.read(BASE, 8)
            await asyncio.gather(*((taking, populating) if invalidate_first else (populating, taking)))
            await mm.store(BASE, data)
            assert await mirror.read(BASE, 8) == data


def test_06_a_paused_client_wakes_after_its_fence_and_writes() -> None:
    """SIGSTOP of client and server in real processes: test_processes.py; here what they could do afterwards."""
    room = MachineRoom()
    nic = room.client("nic", window=True)
    mm = room.program()
    registration = nic.register(mm, *SEED)
    (held,) = room.grant(nic, registration, AT, write=True)
    operation = room.run(mm.munmap(AT, PAGE), "munmap")
    room.later(2.5)
    assert operation.done
    with pytest.raises(FencedError):
        room.write(nic, registration, AT, held, b"late")
    room.memory.frames.store[held[0] * PAGE] = 1  # through shared memory, where nobody can refuse it
    other = room.program(data=b"")
    for page in range(4):
        room.run(other.store(AT + page * PAGE, b"mine")).value()
    room.bus.process_died(nic.session, room.now)
    assert all(room.run(other.load(AT + page * PAGE, 4)).value() == b"mine" for page in range(4))


def test_06_a_server_that_was_stopped_fences_nobody() -> None:
    room = MachineRoom()
    nic = room.client("nic")
    room.grant(nic, nic.register(room.program(), *SEED), AT)
    operation = room.run(room.memory.mm(1).munmap(AT, PAGE), "munmap")
    nic.hears()
    room.now += 60.0
    room.bus.expire(room.now)
    assert nic.session.fenced is None
    nic.acks(1)
    assert operation.done


def test_07_a_disconnect_between_stopping_and_having_drained_inherits_nothing() -> None:
    """START is acknowledged, END is not: whoever comes back without the token begins with nothing."""
    room = MachineRoom(Limits(grace_s=0.5))
    nic = room.client("nic")
    mm = room.program()
    registration = nic.register(mm, *MAINLINE)
    room.grant(nic, registration, AT)
    room.run(mm.munmap(AT, PAGE), "munmap")
    nic.hears()
    nic.acks(1)
    room.bus.session_lost(nic.session, room.now)
    room.later(1.0)
    again = room.client("nic")
    assert again.session is not nic.session
    assert not again.session.registrations
    assert again.hears() == []
    with pytest.raises(FencedError):
        room.bus.session_by_token(nic.session.token)


def test_08_two_exporters_of_one_frame_and_one_leaves() -> None:
    room = MachineRoom()
    first, second = room.client("first"), room.client("second")
    mm = room.program()
    exports = [one.register(None, Op.RMAP_INVALIDATE_PAGE) for one in (first, second)]
    for one, registration in zip((first, second), exports, strict=True):
        room.bus.export(one.session, registration.id, mm.id, AT, AT + PAGE, True, room.now).value()
    room.bus.leave(first.session, room.now)
    operation = room.run(mm.munmap(AT, 4 * PAGE), "munmap")
    assert not operation.done
    assert [line.split()[1] for line in second.hears()] == ["rmap_invalidate_page"]
    second.acks(1)
    assert operation.done
    check_idle(room.memory)


@pytest.mark.parametrize(
    "where", ["before the notice", "before the ack", "before the fence", "before the end", "resume"]
)
def test_09_a_pause_of_a_second_at_each_of_these(where: str) -> None:
    room = MachineRoom(Limits(ack_budget_s=2.0, grace_s=5.0))
    nic = room.client("nic")
    mm = room.program()
    room.grant(nic, nic.register(mm, *MAINLINE), AT)
    operation = room.run(mm.munmap(AT, PAGE), "munmap")
    if where == "before the notice":
        room.later(1.0)
    nic.hears()
    if where == "before the ack":
        room.later(1.0)
    if where == "before the fence":
        room.later(1.99)
    if where == "resume":
        room.bus.session_lost(nic.session, room.now)
        room.later(1.0)
        nic.session = room.bus.open_session(room.hello("nic", token=nic.session.token), room.now, "x")
        nic.hears()
    nic.acks(1)
    assert operation.done
    if where == "before the end":
        room.later(1.0)
    assert [line.split()[1] for line in nic.hears() if "late" not in line] == ["invalidate_range_end"]
    assert nic.session.fenced is None


def test_10_partial_unmaps_a_swap_of_three_and_fork_then_write() -> None:
    room = MachineRoom()
    nic = room.client("nic")
    mm = room.program(16)
    nic.register(mm, *SEED)

    def run(generator: object, label: str = "") -> object:
        operation = room.run(generator, label)  # type: ignore[arg-type]
        while not operation.done:
            nic.hears()
            nic.acks(nic.session.as_of_seq)
        return operation.value()

    for page in range(16):
        run(mm.store(AT + page * PAGE, bytes([page + 1])))
    for first in (0, 7, 15):  # at the start, in the middle, at the end
        run(mm.munmap(AT + first * PAGE, PAGE))
    spare = AT + 64 * PAGE
    for source, target in ((1, None), (2, 1), (3, 2), (None, 3)):
        old = spare if source is None else AT + source * PAGE
        new = spare if target is None else AT + target * PAGE
        run(mm.mremap(old, PAGE, PAGE, 3, new))
    assert [run(mm.load(AT + page * PAGE, 1)) for page in (1, 2, 3)] == [b"\3", b"\4", b"\2"]
    child = run(mm.fork("child"))
    run(mm.store(AT + PAGE, b"x"))
    assert run(child.load(AT + PAGE, 1)) == b"\3"  # type: ignore[attr-defined]
    assert_rules(room, over=False)


def test_11_a_start_that_the_second_client_refuses() -> None:
    world = World()
    mm = world.memory.create_mm()
    clients = [world.client(f"client {n}") for n in range(3)]
    for client in clients:
        client.register(mm, *MAINLINE)

    def may_not_wait():
        answer = yield InvalidateRange(mm, 0, PAGE, Reason.CLEAR, blockable=False)
        return answer.refused

    operation = world.run(may_not_wait(), "reap")
    for client in clients:
        client.hears()
    clients[0].acks(1)
    clients[1].acks(1, seq=1, refused=True)
    clients[2].acks(1)
    assert operation.value() is True
    ends = [[line.split()[1] for line in client.hears()] for client in clients]
    assert ends == [["invalidate_range_end"], [], ["invalidate_range_end"]]


def test_12_acks_that_are_wrong_old_double_or_of_another_epoch() -> None:
    world = World()
    mm = world.memory.create_mm()
    nic = world.client("nic")
    nic.register(mm, Op.INVALIDATE_RANGE)
    with pytest.raises(PeerError):
        nic.acks(1)
    for seq in (1, 2):

        def takes():
            yield InvalidateRange(mm, 0, PAGE, Reason.UNMAP)

        operation = world.run(takes())
        nic.hears()
        nic.acks(seq)
        nic.acks(seq)
        nic.acks(seq - 1)
        assert operation.done
    with pytest.raises(PeerError):
        nic.acks(3)
    other = World()
    other.bus.epoch = 2
    with pytest.raises(RequestError, match="no session with this token"):
        other.bus.session_by_token(nic.session.token)


async def test_13_an_ack_gets_through_when_every_slot_is_busy() -> None:
    """More calls in flight than a stream takes, all of which wait for this client's ack."""
    options: dict[str, Any] = {"frames_nr": 1 << 12, "operations_max": 8, "ack_budget_s": BUDGET_S}
    async with EmbeddedServer(**options) as server, mmubus.connect(server.address) as bus:
        mm = await bus.create_mm()
        await mm.mmap(BASE, 64 * PAGE, flags=FIXED)

        class Slow(mmubus.Notifier):
            async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
                await asyncio.sleep(0.01)

            def release(self, mm: int) -> None:
                """Nothing is held."""

        with pytest.warns(RuntimeWarning):
            await bus.register(Slow(), mm)
        async with bus.operations(mm=mm.id) as operations:
            futures = [
                await operations.submit(mmubus.Op.MUNMAP, BASE + page * PAGE, PAGE, thread=page) for page in range(64)
            ]
            assert [(await future).value() for future in futures] == [0] * 64
        assert bus.session.fenced is None


async def test_14_clients_that_come_back_at_once_after_a_restart() -> None:
    from test_reconnect import come_back

    _, held = await come_back(10)
    assert held == 0


async def test_15_the_library_without_a_notifier() -> None:
    """Nobody registers: no session, no notice, and everything works."""
    async with (
        EmbeddedServer(frames_nr=1 << 12, ack_budget_s=BUDGET_S) as server,
        mmubus.connect(server.address) as bus,
    ):
        mm = await bus.create_mm()
        await mm.mmap(BASE, 4 * PAGE, flags=FIXED)
        await mm.store(BASE, b"here")
        assert await mm.load(BASE, 4) == b"here"
        await mm.munmap(BASE, 4 * PAGE)
        await mm.exit()
        assert bus.session.state == "idle"
        assert not server.server.bus.sessions
