"""The session under odd orders: duplicates, gaps, broken streams, fences, flushes, each by a server that obeys."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import mmubus
import pytest
from fake_server import Attachment, FakeServer, fake_server
from mmu.v1 import session_pb2 as pb
from mmu.v1 import types_pb2
from mmubus import NotifierOp
from patience import LIMIT_S, until

RANGE = types_pb2.NOTIFIER_OP_INVALIDATE_RANGE
FLUSH = types_pb2.NOTIFIER_OP_FLUSH_ALL


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with fake_server() as running:
        yield running


class Recorder(mmubus.Notifier):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []
        self.endangered: list[bool] = []

    def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> list[int]:
        self.seen.append((start, end))
        return [start] if start == 0xD000 else []

    def invalidated_everything(self, why: str) -> None:
        self.seen.append(("everything", why))

    def jeopardy(self, endangered: bool) -> None:
        self.endangered.append(endangered)


async def test_registers_the_ops_that_the_class_overrides(server: FakeServer) -> None:
    async with mmubus.connect(server.address, name="me") as bus:
        registration = await bus.register(Recorder(), 5, start=0x1000, end=0x9000, only_held=True, ack_budget_s=0.5)
        attachment = await server.attached()
        assert attachment.hello.name == "me"
        register = server.registered[0].register
        assert (register.mm, register.start, register.end, register.only_held) == (5, 0x1000, 0x9000, True)
        assert list(register.ops) == [NotifierOp.INVALIDATE_RANGE]
        assert registration.registered
    await asyncio.wait_for(attachment.ended.wait(), LIMIT_S)
    assert attachment.left


async def test_nothing_is_sent_before_the_first_registration(server: FakeServer) -> None:
    async with mmubus.connect(server.address):
        pass
    assert server.attachments.empty()


async def test_rejected_registration_raises_its_errno(server: FakeServer) -> None:
    server.reject = types_pb2.CallError(errno="ESRCH", message="no such address space")
    async with mmubus.connect(server.address) as bus:
        with pytest.raises(mmubus.MmError, match="no such address space") as caught:
            await bus.register(Recorder(), 5)
        assert caught.value.errno_name == "ESRCH"


async def test_warnings_of_the_server_are_python_warnings(server: FakeServer) -> None:
    server.warnings = ["age_page is missing"]
    async with mmubus.connect(server.address) as bus:
        with pytest.warns(RuntimeWarning, match="age_page"):
            registration = await bus.register(Recorder(), 5)
        assert registration.warnings == ("age_page is missing",)


async def test_nobody_there_is_said_at_once() -> None:
    async with mmubus.connect("unix:/nonexistent/socket") as bus:
        with pytest.raises(mmubus.ConnectionLost):
            await bus.register(Recorder(), 5)


async def test_a_batch_is_acknowledged_once_with_its_results(server: FakeServer) -> None:
    recorder = Recorder()
    async with mmubus.connect(server.address) as bus:
        await bus.register(recorder, 5)
        attachment = await server.attached()
        starts = (0x1000, 0xD000, 0x3000)
        batch = [pb.Notice(op=RANGE, mm=5, start=start, end=start + 0x1000) for start in starts]
        attachment.notices(1, batch, [[1], [1], [1]])
        acknowledge = await attachment.acknowledged()
        assert acknowledge.through == 3
        assert [(result.seq, list(result.dirty)) for result in acknowledge.results] == [(2, [0xD000])]
    assert [start for start, _ in recorder.seen] == [0x1000, 0xD000, 0x3000]


async def test_duplicates_are_not_handled_again_and_are_acknowledged_again(server: FakeServer) -> None:
    recorder = Recorder()
    async with mmubus.connect(server.address) as bus:
        await bus.register(recorder, 5)
        attachment = await server.attached()
        for _ in range(2):
            attachment.notice(1, op=RANGE, mm=5, start=0xD000, end=0xE000)
            acknowledge = await attachment.acknowledged()
            assert acknowledge.through == 1
            assert list(acknowledge.results[0].dirty) == [0xD000]
    assert recorder.seen == [(0xD000, 0xE000)]


async def test_broken_stream_is_resumed_with_the_token_and_results_are_told_again(server: FakeServer) -> None:
    recorder = Recorder()
    async with mmubus.connect(server.address) as bus:
        registration = await bus.register(recorder, 5)
        first = await server.attached()
        first.notice(1, op=RANGE, mm=5, start=0x1000, end=0x2000)
        await first.acknowledged()
        first.notice(2, op=RANGE, mm=5, start=0xD000, end=0xE000)
        await first.acknowledged()
        first.drop()
        second = await server.attached()
        assert second.hello.token == "token-1-1"
        # Notice 2's dirty page may not have arrived, so it is not claimed to be handled before it is told again.
        assert second.hello.handled_through == 1
        acknowledge = await second.acknowledged()
        assert acknowledge.through == 2
        assert list(acknowledge.results[0].dirty) == [0xD000]
        second.notice(3, op=RANGE, mm=5, start=0x4000, end=0x5000)
        assert (await second.acknowledged()).through == 3
        assert registration.registered
        assert recorder.endangered == [True, False]
    assert len(server.registered) == 1


async def test_missing_notices_void_everything_and_attach_again(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    async with mmubus.connect(server.address) as bus:
        await bus.register(recorder, 5)
        first = await server.attached()
        first.notice(1, op=RANGE, mm=5, start=0x1000, end=0x2000)
        await first.acknowledged()
        first.notice(4, op=RANGE, mm=5, start=0x4000, end=0x5000)
        second = await server.attached()
        assert second.hello.handled_through == 1
        assert recorder.seen[1] == ("everything", "notices 2 to 3 are missing")
        second.notices(2, [pb.Notice(op=RANGE, mm=5, start=0x2000, end=0x3000)] * 3, [[1]] * 3)
        await second.acknowledged_through(4)
        assert len(recorder.seen) == 5


async def test_notices_that_stay_missing_do_not_loop(server: FakeServer) -> None:
    recorder = Recorder()
    async with mmubus.connect(server.address) as bus:
        await bus.register(recorder, 5)
        (await server.attached()).notice(4, op=RANGE, mm=5, start=0x4000, end=0x5000)
        second = await server.attached()
        second.notice(4, op=RANGE, mm=5, start=0x4000, end=0x5000)
        await second.acknowledged_through(4)
        assert recorder.seen[-1] == (0x4000, 0x5000)
    assert server.attachments.empty()


async def test_flush_all_is_told_and_acknowledged(server: FakeServer) -> None:
    recorder = Recorder()
    async with mmubus.connect(server.address) as bus:
        await bus.register(recorder, 5)
        attachment = await server.attached()
        attachment.notice(1, op=FLUSH)
        assert (await attachment.acknowledged()).through == 1
    assert recorder.seen[0][0] == "everything"


async def test_flush_all_falls_back_to_the_widest_op(server: FakeServer) -> None:
    class Plain(mmubus.Notifier):
        seen = ()

        def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
            self.seen = (mm, start, end)

    plain = Plain()
    async with mmubus.connect(server.address) as bus:
        await bus.register(plain, 5)
        attachment = await server.attached()
        attachment.notice(1, op=FLUSH)
        await attachment.acknowledged()
    assert plain.seen == (5, 0, mmubus.TASK_SIZE)


def fence(attachment: Attachment) -> None:
    fenced = pb.Fenced(seq=7, round=3, waited_s=2.0, registrations=[1], held_pages=[12], message="too slow")
    attachment.send(pb.AttachResponse(fenced=fenced))


async def test_a_fence_voids_everything_and_says_what_was_lost(server: FakeServer) -> None:
    recorder = Recorder()
    told: list[mmubus.Fenced] = []
    async with mmubus.connect(server.address, on_fenced=told.append) as bus:
        registration = await bus.register(recorder, 5)
        fence(await server.attached())
        await until(lambda: told)
        assert (told[0].seq, told[0].round, told[0].waited_s, told[0].lost) == (7, 3, 2.0, {1: 12})
        assert recorder.seen == [("everything", "too slow")]
        assert registration.endangered
        with pytest.raises(mmubus.Fenced, match="too slow"):
            await registration.fault(0x1000, 0x2000)
        # Somebody who registers anew gets a new session.
        again = await bus.register(recorder, 5)
        assert again.registered
        assert (await server.attached()).hello.token == ""


async def test_reattach_registers_again_under_a_new_session(server: FakeServer) -> None:
    recorder = Recorder()
    async with mmubus.connect(server.address, reattach=True) as bus:
        registration = await bus.register(recorder, 5)
        fence(await server.attached())
        second = await server.attached()
        assert second.hello.token == ""
        await until(lambda: registration.registered)
        assert registration.id == 2
        second.notice(1, target=2, op=RANGE, mm=5, start=0x1000, end=0x2000)
        assert (await second.acknowledged()).through == 1
        assert recorder.seen == [("everything", "too slow"), (0x1000, 0x2000)]


async def test_a_fence_while_away_is_told_by_status(server: FakeServer) -> None:
    recorder = Recorder()
    told: list[mmubus.Fenced] = []
    async with mmubus.connect(server.address, on_fenced=told.append) as bus:
        await bus.register(recorder, 5)
        first = await server.attached()
        server.fenced_tokens.add("token-1-1")
        first.drop()
        await until(lambda: told)
    assert told[0].seq == 7


async def test_a_new_epoch_voids_everything_and_is_registered_again(server: FakeServer) -> None:
    recorder = Recorder()
    async with mmubus.connect(server.address, reattach=True) as bus:
        registration = await bus.register(recorder, 5)
        first = await server.attached()
        server.epoch, server.sessions = 2, {}
        first.drop()
        await server.attached()  # with the old token: nothing of it is known
        third = await server.attached()
        assert third.hello.token == ""
        await until(lambda: registration.registered)
        assert recorder.seen[0][0] == "everything"
        assert bus.session.epoch == 2


async def test_heartbeats_within_the_lease(server: FakeServer) -> None:
    server.lease_s = 0.9
    async with mmubus.connect(server.address) as bus:
        await bus.register(Recorder(), 5)
        attachment = await server.attached()
        await until(lambda: attachment.heartbeats >= 2)


async def test_a_silent_server_endangers_and_is_given_up(server: FakeServer) -> None:
    server.lease_s, server.silent = 0.12, True
    recorder = Recorder()
    async with mmubus.connect(server.address) as bus:
        registration = await bus.register(recorder, 5)
        await server.attached()
        await server.attached()  # after a lease of silence
        assert recorder.endangered[0] is True
        await until(lambda: not registration.endangered)


async def test_a_process_that_was_stopped_knows_it_before_it_reads_anything(server: FakeServer) -> None:
    async with mmubus.connect(server.address) as bus:
        registration = await bus.register(Recorder(), 5)
        assert not registration.endangered
        stream = bus.session._stream
        assert stream is not None
        stream.heard_at -= server.lease_s  # as if SIGSTOP and SIGCONT lay between this line and the last
        assert registration.endangered


async def test_unregistering_in_release_is_legal_and_nothing_comes_after_it(server: FakeServer) -> None:
    class Leaving(Recorder):
        async def release(self, mm: int) -> None:
            self.seen.append(("release",))
            assert self.registration is not None
            await self.registration.unregister()

    leaving = Leaving()
    async with mmubus.connect(server.address) as bus:
        registration = await bus.register(leaving, 5)
        attachment = await server.attached()
        attachment.notice(1, op=types_pb2.NOTIFIER_OP_RELEASE, mm=5)
        assert (await attachment.acknowledged_through(1))[-1].through == 1
        attachment.notice(2, op=RANGE, mm=5, start=0x1000, end=0x2000)
        assert (await attachment.acknowledged()).through == 2
        assert leaving.seen == [("release",)]
        assert server.unregistered == [1]
        await registration.unregister()
        assert server.unregistered == [1]
        with pytest.raises(mmubus.Unregistered):
            await registration.fault(0x1000, 0x2000)


async def test_unregister_waits_for_handlers_that_run(server: FakeServer) -> None:
    go = asyncio.Event()

    class Slow(mmubus.Notifier):
        done = False

        async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
            await go.wait()
            self.done = True

    slow = Slow()
    async with mmubus.connect(server.address) as bus:
        registration = await bus.register(slow, 5)
        attachment = await server.attached()
        attachment.notice(1, op=RANGE, mm=5, start=0x1000, end=0x2000)
        await until(lambda: bus.session.acks.received)
        leaving = asyncio.create_task(registration.unregister())
        await until(lambda: server.unregistered)
        assert not leaving.done()
        go.set()
        await leaving
        assert slow.done


async def test_unregister_is_asked_again_when_the_stream_breaks(server: FakeServer) -> None:
    async with mmubus.connect(server.address) as bus:
        registration = await bus.register(Recorder(), 5)
        first = await server.attached()
        server.answer_requests = False
        leaving = asyncio.create_task(registration.unregister())
        await asyncio.wait_for(first.inbox.get(), LIMIT_S)
        server.answer_requests = True
        first.drop()
        await asyncio.wait_for(leaving, LIMIT_S)
        assert server.unregistered == [1]


async def test_draining_is_known(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    async with mmubus.connect(server.address) as bus:
        await bus.register(Recorder(), 5)
        (await server.attached()).send(pb.AttachResponse(draining=pb.Draining(seconds=1.5)))
        await until(lambda: bus.session.draining)
        with pytest.raises(mmubus.Draining):
            await bus.register(Recorder(), 5)
    assert "stops within 1.5 s" in caplog.text


async def test_two_registrations_at_once_share_one_stream(server: FakeServer) -> None:
    async with mmubus.connect(server.address) as bus:
        one, two = await asyncio.gather(bus.register(Recorder(), 5), bus.register(Recorder(), 6))
        assert {one.id, two.id} == {1, 2}
        await server.attached()
        assert server.attachments.empty()


async def test_a_protocol_error_of_the_server_ends_the_stream(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with mmubus.connect(server.address) as bus:
        await bus.register(Recorder(), 5)
        first = await server.attached()
        first.send(pb.AttachResponse(welcome=pb.Welcome()))
        await server.attached()
    assert "sent welcome" in caplog.text
