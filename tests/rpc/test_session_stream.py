"""The session stream: hello, notices and acknowledgements, ends of all kinds, and clients that break the rules."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

import grpc
import grpc.aio
import pytest
from mmu.v1 import address_space_pb2 as spaces_pb
from mmu.v1 import device_pb2, inspection_pb2, session_pb2, types_pb2
from patience import LIMIT_S, until

PAGE = 4096
BASE = 0x7000_0000_0000
SEED_OPS = [
    types_pb2.NOTIFIER_OP_RELEASE,
    types_pb2.NOTIFIER_OP_AGE_PAGE,
    types_pb2.NOTIFIER_OP_INVALIDATE_PAGE,
    types_pb2.NOTIFIER_OP_INVALIDATE_RANGE,
]
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def munmap(peer, mm: int, page: int = 0, pages: int = 1) -> asyncio.Task:
    request = spaces_pb.MunmapRequest(mm=mm, addr=BASE + page * PAGE, length=pages * PAGE)
    return asyncio.ensure_future(peer.spaces.Munmap(request))


async def states(peer) -> dict[str, str]:
    answer = await peer.inspection.ListSessions(inspection_pb2.ListSessionsRequest())
    return {session.name: session.state for session in answer.sessions}


async def until_state(peer, name: str, *wanted: str) -> None:
    async def reached() -> bool:
        return (await states(peer)).get(name) in wanted

    await until(reached)


async def test_welcome_says_what_was_agreed(peer, server) -> None:
    attached = peer.attach()
    welcome = await attached.hello(ack_budget_s=1.5, lease_s=20)
    assert (welcome.ack_budget_s, welcome.lease_s, welcome.grace_s) == (1.5, 20, 5)
    assert welcome.session
    assert welcome.epoch
    assert len(welcome.token) >= 24
    assert not welcome.resumed
    assert os.stat(welcome.frames_path).st_size == server.server.settings.frames_nr * PAGE


async def test_unmap_waits_for_the_acknowledgement(peer) -> None:
    mm = await peer.space(4, touch=True)
    attached = peer.attach()
    await attached.hello()
    registration = await attached.register(mm)
    unmapping = munmap(peer, mm, 1, 2)
    batch = await attached.notices()
    assert batch.first_seq == 1
    assert list(batch.targets) == [registration]
    assert list(batch.target_counts) == [1]
    (notice,) = batch.notices
    assert (notice.op, notice.mm) == (types_pb2.NOTIFIER_OP_INVALIDATE_RANGE, mm)
    assert (notice.start, notice.end) == (BASE + PAGE, BASE + 3 * PAGE)
    assert notice.reason == types_pb2.REASON_UNMAP
    await asyncio.sleep(0.05)
    assert not unmapping.done()
    await attached.ack(1)
    await unmapping


async def test_disjoint_unmaps_overlap_their_waits_and_one_ack_ends_both(peer) -> None:
    mm = await peer.space(8, touch=True)
    attached = peer.attach()
    await attached.hello()
    await attached.register(mm)
    unmapping = [munmap(peer, mm, 0), munmap(peer, mm, 4)]
    seen = 0
    while seen < 2:
        seen += len((await attached.notices()).notices)
    await attached.ack(2)
    await asyncio.gather(*unmapping)


async def test_registered_comes_before_its_notices(peer) -> None:
    mm = await peer.space(8, touch=True)
    attached = peer.attach()
    await attached.hello()
    for n in range(1, 30):
        await attached.send(request=n, register=session_pb2.Register(mm=mm, ops=SEED_OPS))
    known = set()
    for n in range(1, 30):
        got = await attached.receive()
        assert got.request == n
        known.add(got.registered.registration)
    unmapping = munmap(peer, mm)
    batch = await attached.notices()
    assert set(batch.targets) == known
    assert list(batch.targets) == sorted(batch.targets, reverse=True)
    await attached.ack(batch.first_seq)
    await unmapping


async def test_unregister_is_idempotent_and_nothing_comes_after(peer) -> None:
    mm = await peer.space(2, touch=True)
    attached = peer.attach()
    await attached.hello()
    registration = await attached.register(mm)
    for was in (True, False):
        await attached.send(request=3, unregister=session_pb2.Unregister(registration=registration))
        got = await attached.receive()
        assert (got.request, got.unregistered.registration, got.unregistered.was_registered) == (3, registration, was)
    await munmap(peer, mm)


async def test_missing_op_is_a_warning(peer) -> None:
    mm = await peer.space()
    attached = peer.attach()
    await attached.hello()
    await attached.send(request=1, register=session_pb2.Register(mm=mm, ops=[types_pb2.NOTIFIER_OP_RELEASE]))
    assert any("invalidate_range" in warning for warning in (await attached.receive()).registered.warnings)


@pytest.mark.parametrize(
    ("register", "errno"),
    [
        (session_pb2.Register(mm=0), "ESRCH"),
        (session_pb2.Register(mm=1 << 60), "ESRCH"),
        (session_pb2.Register(ops=[99]), "EINVAL"),
        (session_pb2.Register(ops=[0]), "EINVAL"),
        (session_pb2.Register(ops=SEED_OPS, start=2 * PAGE, end=PAGE), "EINVAL"),
        (session_pb2.Register(ops=SEED_OPS, end=1 << 63), "EOVERFLOW"),
        (session_pb2.Register(ops=SEED_OPS, ack_budget_s=-1), "EINVAL"),
        (session_pb2.Register(ops=SEED_OPS, ack_budget_s=float("nan")), "EINVAL"),
        (session_pb2.Register(ops=SEED_OPS, ack_budget_s=float("inf")), "EINVAL"),
        (session_pb2.Register(ops=SEED_OPS, name="n" * 1000), "ENAMETOOLONG"),
    ],
)
async def test_register_refused(peer, register: session_pb2.Register, errno: str) -> None:
    mm = await peer.space()
    attached = peer.attach()
    await attached.hello()
    if register.ops:
        register.mm = mm
    await attached.send(request=5, register=register)
    got = await attached.receive()
    assert (got.request, got.rejected.error.errno) == (5, errno), got
    assert got.rejected.error.message
    await attached.register(mm)  # the stream goes on


# Ends.


async def test_leave_ends_everything_at_once(peer) -> None:
    mm = await peer.space(2, touch=True)
    attached = peer.attach()
    await attached.hello("leaver", ack_budget_s=25)
    await attached.register(mm)
    unmapping = munmap(peer, mm)
    await attached.notices()
    await attached.send(leave=session_pb2.Leave())
    with pytest.raises(EOFError):
        await attached.receive()
    await asyncio.wait_for(unmapping, LIMIT_S)
    assert (await states(peer)).get("leaver", "left") == "left"


@pytest.mark.parametrize("options", [{"grace_s": 0.2}])
@pytest.mark.parametrize("how", ["cancel", "half-close", "channel"])
async def test_lost_session_is_fenced_after_its_grace(peer, server, how: str) -> None:
    mm = await peer.space(2, touch=True)
    channel = grpc.aio.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
    attached = type(peer)(channel).attach()
    await attached.hello("lost")
    await attached.register(mm)
    if how == "cancel":
        attached.call.cancel()
    elif how == "half-close":
        await attached.call.done_writing()
    else:
        await channel.close()
    await until_state(peer, "lost", "lost", "fenced")
    unmapping = munmap(peer, mm)
    await asyncio.wait_for(unmapping, LIMIT_S)
    assert (await states(peer))["lost"] == "fenced"
    await channel.close()


async def test_resume_gets_unacknowledged_notices_again(peer) -> None:
    mm = await peer.space(4, touch=True)
    attached = peer.attach()
    await attached.hello("r")
    await attached.register(mm)
    unmapping = munmap(peer, mm)
    first = await attached.notices()
    attached.call.cancel()
    again = peer.attach()
    welcome = await again.hello("r", token=attached.welcome.token)
    assert welcome.resumed
    assert welcome.session == attached.welcome.session
    batch = await again.notices()
    assert (batch.first_seq, batch.notices[0].round) == (first.first_seq, first.notices[0].round)
    await again.ack(batch.first_seq)
    await unmapping


async def test_resume_while_the_old_stream_stands_supersedes_it(peer, other) -> None:
    attached = peer.attach()
    await attached.hello("s")
    again = other.attach()
    assert (await again.hello("s", token=attached.welcome.token)).resumed
    await attached.ends_with(grpc.StatusCode.ABORTED, "SUPERSEDED")
    assert (await states(peer))["s"] == "live"
    mm = await peer.space()
    await again.register(mm)


@pytest.mark.parametrize("options", [{"ack_budget_s": 0.3}])
async def test_silent_client_is_fenced_and_told(peer) -> None:
    mm = await peer.space(4, touch=True)
    attached = peer.attach()
    await attached.hello("silent")
    registration = await attached.register(mm)
    fault = device_pb2.FaultRequest(registration=registration, start=BASE, end=BASE + 2 * PAGE)
    await peer.devices.Fault(fault, metadata=attached.metadata)
    unmapping = munmap(peer, mm)
    got = await attached.receive()
    assert got.WhichOneof("message") == "notices"
    await asyncio.wait_for(unmapping, LIMIT_S)
    while (got := await attached.receive()).WhichOneof("message") != "fenced":
        assert got.notices.late_seq
    fenced = got.fenced
    assert fenced.seq == 1
    assert fenced.waited_s >= 0.25
    assert list(fenced.registrations) == [registration]
    assert fenced.message
    await attached.ends_with(grpc.StatusCode.FAILED_PRECONDITION, "FENCED")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await peer.devices.Fault(fault, metadata=attached.metadata)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    back = peer.attach()
    await back.send(hello=session_pb2.Hello(version=1, token=attached.welcome.token))
    told = await back.ends_with(grpc.StatusCode.FAILED_PRECONDITION, "FENCED")
    assert told.metadata["lost"] == " ".join(
        f"{number}:{pages}" for number, pages in zip(fenced.registrations, fenced.held_pages, strict=True)
    )


async def test_lease_runs_out_while_the_stream_stands(peer) -> None:
    attached = peer.attach()
    await attached.hello("wedged", lease_s=0.3)
    await until_state(peer, "wedged", "lost")
    await attached.send(heartbeat=session_pb2.Heartbeat())
    await attached.ends_with(grpc.StatusCode.ABORTED, "LEASE_EXPIRED")
    again = peer.attach()
    assert (await again.hello(token=attached.welcome.token)).resumed


async def test_heartbeats_both_ways_keep_the_lease(peer) -> None:
    attached = peer.attach()
    await attached.hello("beating", lease_s=3.0)
    for _ in range(40):
        await attached.send(heartbeat=session_pb2.Heartbeat())
        await asyncio.sleep(0.1)
    assert (await states(peer))["beating"] == "live"
    assert (await attached.call.read()).WhichOneof("message") == "heartbeat"


async def test_killed_process_is_fenced_and_the_operation_ends(peer, server) -> None:
    """A real process, killed after it has seen the notice and before it has acknowledged."""
    mm = await peer.space(2, touch=True)
    script = f"""if True:
        import sys, time, grpc
        from mmu.v1 import session_pb2 as pb, session_pb2_grpc
        requests = [pb.AttachRequest(hello=pb.Hello(version=1, name="victim", ack_budget_s=0.5)),
                    pb.AttachRequest(register=pb.Register(mm={mm}, ops=[1, 2, 3, 4]))]
        def send():
            yield from requests
            time.sleep(60)
        stream = session_pb2_grpc.SessionServiceStub(grpc.insecure_channel(sys.argv[1])).Attach(send())
        for message in stream:
            print(message.WhichOneof("message"), flush=True)
    """
    victim = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, server.address, stdout=asyncio.subprocess.PIPE
    )
    assert [await victim.stdout.readline() for _ in range(2)] == [b"welcome\n", b"registered\n"]
    loop = asyncio.get_running_loop()
    began = loop.time()
    unmapping = munmap(peer, mm)
    assert await victim.stdout.readline() == b"notices\n"
    victim.kill()
    await victim.wait()
    await until_state(peer, "victim", "lost", "fenced")
    await asyncio.wait_for(unmapping, LIMIT_S)
    assert loop.time() - began > 0.4
    assert (await states(peer))["victim"] == "fenced"
    statistics = await peer.inspection.GetStatistics(inspection_pb2.GetStatisticsRequest())
    assert (statistics.freed_before_ack, statistics.fenced) == (0, 1)


async def test_no_hello(peer, monkeypatch) -> None:
    monkeypatch.setattr("mmubusd.rpc.stream.HELLO_S", 0.1)
    attached = peer.attach()
    await attached.ends_with(INVALID, "PROTOCOL_VIOLATION")
    assert await peer.alive()


async def test_a_superseded_stream_counts_for_nothing(peer, other) -> None:
    mm = await peer.space(2, touch=True)
    old = peer.attach()
    await old.hello("s")
    await old.register(mm)
    unmapping = munmap(peer, mm)
    batch = await old.notices()
    new = other.attach()
    await new.hello("s", token=old.welcome.token)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await old.ack(batch.first_seq)
    await asyncio.sleep(0.05)
    assert not unmapping.done()
    await new.ack((await new.notices()).first_seq)
    await unmapping


# Clients that break the protocol: they alone are ended, with a status that says why.


@pytest.mark.parametrize(
    "message",
    [
        session_pb2.AttachRequest(request=1, register=session_pb2.Register(mm=1)),
        session_pb2.AttachRequest(acknowledge=session_pb2.Acknowledge(through=1)),
        session_pb2.AttachRequest(leave=session_pb2.Leave()),
        session_pb2.AttachRequest(),
    ],
    ids=lambda message: message.WhichOneof("message") or "empty",
)
async def test_anything_before_hello(peer, message: session_pb2.AttachRequest) -> None:
    attached = peer.attach()
    await attached.call.write(message)
    await attached.ends_with(INVALID, "PROTOCOL_VIOLATION")
    assert await peer.alive()


@pytest.mark.parametrize(
    "message",
    [
        session_pb2.AttachRequest(hello=session_pb2.Hello(version=1)),
        session_pb2.AttachRequest(),
        session_pb2.AttachRequest(acknowledge=session_pb2.Acknowledge(through=1)),
        session_pb2.AttachRequest(acknowledge=session_pb2.Acknowledge(also=[1])),
        session_pb2.AttachRequest(acknowledge=session_pb2.Acknowledge(through=2**64 - 1)),
        session_pb2.AttachRequest(
            acknowledge=session_pb2.Acknowledge(results=[session_pb2.NoticeResult(seq=5, busy=True)])
        ),
    ],
    ids=["hello twice", "empty", "through unsent", "also unsent", "through max", "result unsent"],
)
async def test_violation_ends_and_fences_the_session_alone(peer, other, message: session_pb2.AttachRequest) -> None:
    mm = await peer.space(2, touch=True)
    good, bad = peer.attach(), other.attach()
    await good.hello("good", ack_budget_s=25)
    await bad.hello("bad", ack_budget_s=25)
    await good.register(mm)
    await bad.register(mm)
    await bad.call.write(message)
    await bad.ends_with(INVALID, "PROTOCOL_VIOLATION")
    assert (await states(peer)) == {"good": "live", "bad": "fenced"}
    unmapping = munmap(peer, mm)
    await good.ack((await good.notices()).first_seq)
    await asyncio.wait_for(unmapping, LIMIT_S)


async def test_garbage_bytes(peer) -> None:
    for after_hello in (False, True):
        call = peer.channel.stream_stream("/mmu.v1.SessionService/Attach")()
        if after_hello:
            hello = session_pb2.AttachRequest(hello=session_pb2.Hello(version=1, name="garbage"))
            await call.write(hello.SerializeToString())
            await call.read()
        await call.write(b"\xff\xff\xff\xff")
        assert await call.code() is INVALID
        assert "not a mmu.v1.AttachRequest" in await call.details()
    assert await peer.alive()


@pytest.mark.parametrize(
    ("hello", "code", "reason"),
    [
        (session_pb2.Hello(version=0), None, None),
        (session_pb2.Hello(version=99), None, None),
        (session_pb2.Hello(version=1, token="no such token"), None, None),
        (session_pb2.Hello(version=1, ack_budget_s=-1), INVALID, "EINVAL"),
        (session_pb2.Hello(version=1, ack_budget_s=float("nan")), INVALID, "EINVAL"),
        (session_pb2.Hello(version=1, lease_s=-1), INVALID, "EINVAL"),
        (session_pb2.Hello(version=1, lease_s=float("nan")), INVALID, "EINVAL"),
        (session_pb2.Hello(version=1, name="x" * 1000), INVALID, "ENAMETOOLONG"),
    ],
)
async def test_hello_refused(peer, hello: session_pb2.Hello, code: grpc.StatusCode | None, reason: str | None) -> None:
    attached = peer.attach()
    await attached.send(hello=hello)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await attached.receive()
    assert caught.value.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
    if code is not None:
        assert caught.value.code() is code
        assert reason in str(caught.value.trailing_metadata())
    assert await peer.alive()


@pytest.mark.parametrize("options", [{"sessions_max": 2}])
async def test_sessions_are_limited(peer) -> None:
    streams = [peer.attach() for _ in range(3)]
    for stream in streams[:2]:
        await stream.hello()
    await streams[2].send(hello=session_pb2.Hello(version=1))
    await streams[2].ends_with(grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED")


async def test_a_client_that_never_reads_its_answers_is_ended(peer, server, monkeypatch) -> None:
    monkeypatch.setattr("mmubusd.rpc.stream.REPLIES_MAX", 100)
    mm = await peer.space()
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    local = ("grpc.use_local_subchannel_pool", 1)
    async with grpc.aio.insecure_channel(server.address, options=[*small_window, local]) as channel:
        attached = type(peer)(channel).attach()
        await attached.hello("deaf")

        async def flood() -> None:
            while True:
                await attached.send(request=1, register=session_pb2.Register(mm=mm))

        flooding = asyncio.ensure_future(flood())
        await until_state(peer, "deaf", "fenced")
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
    assert await peer.alive()
