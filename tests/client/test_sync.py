"""The synchronous face against a fake server that runs in the library's own thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mmubus
import mmubus.sync
import pytest
from fake_server import Attachment, FakeServer, fake_server
from mmu.v1 import device_pb2 as pb
from mmu.v1 import types_pb2
from mmubus.sync.portal import Portal
from patience import LIMIT_S, until

RANGE = types_pb2.NOTIFIER_OP_INVALIDATE_RANGE


@contextmanager
def server() -> Iterator[tuple[FakeServer, Portal]]:
    """A fake server in the one thread that may use grpc.aio."""
    portal = Portal.enter()
    running = fake_server()
    fake = portal.run(running.__aenter__())
    try:
        yield fake, portal
    finally:
        portal.run(running.__aexit__(None, None, None))
        portal.leave()


def deliver(portal: Portal, attachment: Attachment, seq: int) -> None:
    async def work() -> None:
        attachment.notice(seq, op=RANGE, mm=5, start=0x1000, end=0x2000)
        await attachment.acknowledged_through(seq)

    portal.run(work(), LIMIT_S)


class Recorder(mmubus.Notifier):
    thread = ""

    def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
        self.thread = threading.current_thread().name


@pytest.mark.parametrize(("handlers", "name"), [("loop", "mmubus"), ("worker", "mmubus handler_0")])
def test_handlers_run_where_it_was_said(handlers: mmubus.sync.Handlers, name: str) -> None:
    with server() as (fake, portal), mmubus.sync.connect(fake.address, handlers=handlers) as bus:
        recorder = Recorder()
        registration = bus.register(recorder, 5)
        assert list(fake.registered[0].register.ops) == [RANGE]
        attachment = portal.run(fake.attached())
        deliver(portal, attachment, 1)
        assert recorder.thread == name
        registration.unregister()
        registration.unregister()
        deliver(portal, attachment, 2)
        assert fake.unregistered == [1]


@pytest.mark.parametrize("handlers", ["loop", "worker"])
def test_a_handler_may_call_back_only_from_a_worker(handlers: mmubus.sync.Handlers) -> None:
    class CallingBack(mmubus.Notifier):
        error: Exception | None = None
        done = False

        def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
            try:
                bus.mm(5).munmap(0, 4096)
            except mmubus.CalledFromHandler as error:
                self.error = error
            self.done = True

    with server() as (fake, portal), mmubus.sync.connect(fake.address, handlers=handlers) as bus:
        notifier = CallingBack()
        bus.register(notifier, 5)
        deliver(portal, portal.run(fake.attached()), 1)
        assert notifier.done
        assert (notifier.error is not None) == (handlers == "loop")


def test_errors_are_the_same() -> None:
    with (
        server() as (fake, _),
        mmubus.sync.connect(fake.address) as bus,
        pytest.raises(mmubus.MmError, match="not page-aligned"),
    ):
        bus.mm(1).munmap(1, 4096)


def test_a_mirror() -> None:
    with server() as (fake, _), mmubus.sync.connect(fake.address) as bus:

        async def answer(request: pb.AccessRequest) -> pb.AccessResponse:
            if request.HasField("fault"):
                granted = pb.Translations(start=request.fault.start, pfns=[7], generations=[1], rights=b"\x03")
                return pb.AccessResponse(fault=pb.FaultResponse(translations=granted))
            if request.HasField("dma_read"):
                return pb.AccessResponse(dma_read=pb.DmaReadResponse(data=b"abc"))
            return pb.AccessResponse(dma_write=pb.DmaWriteResponse())

        fake.answer = answer
        mirror = bus.mirror(5)
        assert mirror.read(0x1000, 3) == b"abc"
        mirror.write(0x1000, b"abc")
        assert mirror.valid
        assert list(mirror.held) == [0x1000]
        assert mirror.statistics.faults == 1


def test_operate() -> None:
    with server() as (fake, _), mmubus.sync.connect(fake.address) as bus:
        results = bus.operate([(mmubus.Op.READ, 5, 6), (mmubus.Op.READ, 666)])
        assert [(result.ret, result.errno_name) for result in results] == [(11, ""), (666, "EFAULT")]


def test_a_call_that_is_not_answered_times_out() -> None:
    with server() as (fake, _), mmubus.sync.connect(fake.address, timeout_s=0.2) as bus:
        fake.answer_requests = False
        with pytest.raises(TimeoutError, match=r"0\.2 s"):
            bus.register(Recorder(), 5)


def test_an_interrupt_leaves_cleanly() -> None:
    attachments = []

    def interrupted(fake: FakeServer, portal: Portal) -> None:
        with mmubus.sync.connect(fake.address) as bus:
            bus.register(Recorder(), 5)
            attachments.append(portal.run(fake.attached()))
            raise KeyboardInterrupt

    with server() as (fake, portal):
        with pytest.raises(KeyboardInterrupt):
            interrupted(fake, portal)
        portal.run(until(lambda: attachments[0].left))


def test_the_thread_ends_with_the_last_connection() -> None:
    with server() as (fake, _), mmubus.sync.connect(fake.address), mmubus.sync.connect(fake.address):
        assert [thread.name for thread in threading.enumerate()].count("mmubus") == 1
    assert "mmubus" not in [thread.name for thread in threading.enumerate()]


def test_nobody_there() -> None:
    with mmubus.sync.connect("unix:/nonexistent/socket") as bus, pytest.raises(mmubus.ConnectionLost):
        bus.create_mm("program")
