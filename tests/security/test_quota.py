"""Mallory takes as much as she can get. It is hers; what alice wants is there all the same."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from mmu.v1 import address_space_pb2 as space_pb2
from mmu.v1 import device_pb2, device_pb2_grpc, inspection_pb2, session_pb2
from mmubusd.mm.addr import MmId
from mmubusd.mm.check import check_memory
from mmubusd.rpc import EmbeddedServer
from mmubusd.rpc.reload import reload

from .conftest import BASE, PAGE, TOKENS, Caller, metadata, read, reason, refused
from .test_attacker import grpc_operate

Code = grpc.StatusCode
WAIT_S = 60


async def takes_all(who: Caller) -> str:
    """Attach until it is refused. Returns: why."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012 - which one it is, is not known before
        while True:
            await who.attach()
    assert (caught.value.code(), reason(caught.value)) == (Code.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
    who.streams.pop()
    return caught.value.details()


@pytest.mark.parametrize("options", [{"sessions_per_principal_max": 3, "sessions_max": 5}])
async def test_sessions(caller) -> None:
    alice, mallory, root = caller("alice"), caller("mallory"), caller("root")
    assert "3 are allowed (sessions_per_principal_max)" in await takes_all(mallory)
    assert len(mallory.streams) == 3
    other = caller("mallory")  # another connection is not another principal
    assert "sessions_per_principal_max" in await takes_all(other)
    assert (await alice.attach()).session
    assert (await root.attach()).session  # administrators have the server's limit alone
    assert "(sessions_max)" in await takes_all(root)
    # What is given back can be had again.
    await mallory.streams[0].write(session_pb2.AttachRequest(leave=session_pb2.Leave()))
    assert await asyncio.wait_for(mallory.streams[0].code(), WAIT_S) is Code.OK
    await mallory.attach()


@pytest.mark.parametrize("options", [{"sessions_per_principal_max": 2, "grace_s": 30.0}])
async def test_sessions_that_are_lost_count_until_they_are_fenced(server: EmbeddedServer, caller) -> None:
    """Breaking streams off makes no room; resuming one of them takes none."""
    mallory = caller("mallory")
    tokens = [(await mallory.attach()).token for _ in range(2)]
    for stream in mallory.streams:
        stream.cancel()
    async with asyncio.timeout(WAIT_S):
        while any(one.state.value == "live" for one in server.server.bus.sessions.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert "sessions_per_principal_max" in await takes_all(caller("mallory"))
    assert (await mallory.attach(token=tokens[0])).resumed


@pytest.mark.parametrize("options", [{"registrations_per_principal_max": 4}])
async def test_registrations_of_all_sessions_together(caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    hers, alices = await mallory.space("hers"), await alice.space("alices")
    made = []
    for _ in range(2):
        await mallory.attach()
        made += [(await mallory.register(hers)).registered.registration for _ in range(2)]
    error = (await mallory.register(hers)).rejected.error
    assert error.errno == "EMFILE"
    assert "no more than 4 are allowed (registrations_per_principal_max)" in error.message
    await mallory.streams[-1].write(session_pb2.AttachRequest(request=2, register_rmap=session_pb2.RegisterRmap()))
    assert (await read(mallory.streams[-1])).rejected.error.errno == "EMFILE"
    await alice.attach()
    assert (await alice.register(alices)).registered.registration
    gone = session_pb2.Unregister(registration=made[-1])
    await mallory.streams[-1].write(session_pb2.AttachRequest(request=3, unregister=gone))
    assert (await read(mallory.streams[-1])).unregistered.was_registered
    assert (await mallory.register(hers)).registered.registration


@pytest.mark.parametrize("options", [{"address_spaces_per_principal_max": 3}])
async def test_address_spaces_by_every_way_to_make_one(caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    first = await mallory.space("hers")
    child = (await mallory.call("spaces", "Fork", space_pb2.ForkRequest(mm=first))).child
    forking = space_pb2.CallRequest(call=space_pb2.Call(id=1, op=space_pb2.OP_FORK, mm=child))
    assert (await mallory.call("spaces", "Call", forking)).result.ret
    for request in ("Create", "Fork"):
        message = space_pb2.CreateRequest() if request == "Create" else space_pb2.ForkRequest(mm=first)
        text = await refused(mallory.call("spaces", request, message), Code.ABORTED, "EAGAIN")
        assert "token:mallory has 3 address spaces" in text
    assert (await mallory.call("spaces", "Call", forking)).result.error.errno == "EAGAIN"
    stream = grpc_operate(mallory)
    await stream.write(space_pb2.OperateRequest(calls=[forking.call]))
    assert (await stream.read()).results[0].error.errno == "EAGAIN"
    await alice.space("alices")
    await mallory.call("spaces", "Exit", space_pb2.ExitRequest(mm=child))
    await mallory.space("again")
    stream.cancel()


@pytest.mark.parametrize("options", [{"files_per_principal_max": 2}])
async def test_files(caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    files = [
        (await mallory.call("files", "OpenFile", space_pb2.OpenFileRequest(name=name, kind=1, size=PAGE))).file
        for name in ("a", "")
    ]
    one_more = space_pb2.OpenFileRequest(name="c", kind=1)
    assert "files_per_principal_max" in await refused(
        mallory.call("files", "OpenFile", one_more), Code.RESOURCE_EXHAUSTED, "EMFILE"
    )
    again = await mallory.call("files", "OpenFile", space_pb2.OpenFileRequest(name="a", kind=1))
    assert not again.created  # what is there can be opened
    assert (await alice.call("files", "OpenFile", one_more)).created
    await mallory.call("files", "UnlinkFile", space_pb2.UnlinkFileRequest(file=files[1]))
    assert (await mallory.call("files", "OpenFile", one_more)).created


@pytest.mark.parametrize("options", [{"calls_per_principal_max": 4, "ack_budget_s": 20.0, "calls_max": 32}])
async def test_calls_and_streams_in_flight(server: EmbeddedServer, caller) -> None:
    """Calls that wait for a notifier of her own, streams that she leaves idle: the fifth is refused, alice's is not."""
    alice, mallory, root = caller("alice"), caller("mallory"), caller("root")
    hers, alices = await mallory.space("hers"), await alice.space("alices")
    await mallory.attach()  # one
    await mallory.register(hers)
    idle = grpc_operate(mallory)  # two
    await idle.write(space_pb2.OperateRequest())
    unmap = space_pb2.MunmapRequest(mm=hers, addr=BASE, length=PAGE)
    waiting = [asyncio.ensure_future(mallory.call("spaces", "Munmap", unmap)) for _ in range(2)]  # three and four
    await read(mallory.streams[-1])  # the notice of the first
    in_flight = server.server.driver.quotas._calls
    async with asyncio.timeout(WAIT_S):
        while in_flight["token:mallory"] < 4:  # noqa: ASYNC110 - the others are on their way
            await asyncio.sleep(0.01)
    spaces = inspection_pb2.ListAddressSpacesRequest()
    for _ in range(3):
        text = await refused(
            mallory.call("inspection", "ListAddressSpaces", spaces), Code.RESOURCE_EXHAUSTED, "LIMIT_REACHED"
        )
        assert "calls_per_principal_max" in text
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller("mallory").attach()
    assert reason(caught.value) == "LIMIT_REACHED"
    load = space_pb2.LoadRequest(mm=alices, addr=BASE, length=6)
    for who in (alice, root):
        assert (await who.call("spaces", "Load", load)).data == b"secret"
    await mallory.streams[0].write(session_pb2.AttachRequest(acknowledge=session_pb2.Acknowledge(through=1)))
    await waiting[0]
    idle.cancel()
    for one in (*waiting, *mallory.streams):
        one.cancel()
    async with asyncio.timeout(WAIT_S):
        while in_flight["token:mallory"]:  # noqa: ASYNC110 - each is given back, however it ended
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("options", [{"operations_per_principal_max": 3, "ack_budget_s": 20.0}])
async def test_operations_on_pipelined_streams(server: EmbeddedServer, caller) -> None:
    """Three unmaps wait for her own notifier, on two streams; every further one, and every request, is refused."""
    alice, mallory = caller("alice"), caller("mallory")
    hers, alices = await mallory.space("hers"), await alice.space("alices")
    await mallory.attach()
    number = (await mallory.register(hers)).registered.registration
    streams = [grpc_operate(mallory), grpc_operate(mallory)]

    def unmap(page: int) -> space_pb2.Call:
        return space_pb2.Call(
            id=page + 1, thread=page, op=space_pb2.OP_MUNMAP, mm=hers, args=[BASE + page * PAGE, PAGE]
        )

    await streams[0].write(space_pb2.OperateRequest(calls=[unmap(0), unmap(1)]))
    await streams[1].write(space_pb2.OperateRequest(calls=[unmap(2)]))
    in_flight = server.server.driver.quotas._operations
    async with asyncio.timeout(WAIT_S):
        while in_flight["token:mallory"] < 3:  # noqa: ASYNC110 - they are on their way
            await asyncio.sleep(0.01)
    await streams[1].write(space_pb2.OperateRequest(calls=[unmap(3)]))
    error = (await streams[1].read()).results[0].error
    assert (error.errno, "operations_per_principal_max" in error.message) == ("EAGAIN", True)
    access = device_pb2_grpc.DeviceServiceStub(mallory.channel).Access(
        metadata=metadata(TOKENS["mallory"], mallory.session)
    )
    fault = device_pb2.FaultRequest(registration=number, start=BASE + 3 * PAGE, end=BASE + 4 * PAGE)
    await access.write(device_pb2.AccessRequest(id=1, fault=fault))
    answer = await access.read()
    assert (answer.error.code, answer.error.reason) == (Code.RESOURCE_EXHAUSTED.value[0], "LIMIT_REACHED")
    alices_stream = grpc_operate(alice)
    load = space_pb2.Call(id=1, op=space_pb2.OP_LOAD, mm=alices, args=[BASE, 6])
    await alices_stream.write(space_pb2.OperateRequest(calls=[load]))
    assert (await alices_stream.read()).results[0].data == b"secret"
    # The client goes; what it had begun ends all the same, and is counted no longer.
    for stream in streams:
        stream.cancel()
    mallory.streams[-1].cancel()
    server.server.bus.fence(
        next(iter(server.server.bus.sessions.values())), server.server.driver.now(), "the test is over"
    )
    server.server.driver.pump()
    async with asyncio.timeout(WAIT_S):
        while in_flight["token:mallory"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    alices_stream.cancel()
    access.cancel()


async def test_failed_operations_are_given_back(server: EmbeddedServer, caller) -> None:
    mallory = caller("mallory")
    stream = grpc_operate(mallory)
    calls = [space_pb2.Call(id=n, thread=n, op=space_pb2.OP_MUNMAP, mm=987, args=[BASE, PAGE]) for n in range(1, 50)]
    await stream.write(space_pb2.OperateRequest(calls=[*calls, space_pb2.Call(id=50, op=4711, mm=1)]))
    answered = 0
    while answered < 50:
        answered += len((await stream.read()).results)
    assert not server.server.driver.quotas._operations["token:mallory"]
    stream.cancel()


class Memory:
    """What a principal does with memory over the wire."""

    def __init__(self, who: Caller) -> None:
        self.who = who

    async def make(self, pages: int) -> int:
        return await self.who.space(pages=pages)

    async def touch(self, mm: int, first: int, pages: int) -> str:
        """Write to pages. Returns: the errno, "" when all went well."""
        call = space_pb2.Call(id=1, op=space_pb2.OP_WRITE, mm=mm, args=[BASE + first * PAGE, pages * PAGE])
        return str((await self.who.call("spaces", "Call", space_pb2.CallRequest(call=call))).result.error.errno)

    async def group(self) -> inspection_pb2.MemoryGroup:
        request = inspection_pb2.ListMemoryGroupsRequest()
        groups = (await self.who.call("inspection", "ListMemoryGroups", request)).groups
        assert [one.name for one in groups] == [f"token:{self.who.token.split('-')[0]}"], "nobody sees another's"
        return groups[0]


@pytest.mark.parametrize("options", [{"frames_nr": 1024, "frames_per_principal_max": 200}])
async def test_memory_by_every_way_to_take_it(server: EmbeddedServer, caller) -> None:
    """Mallory has all that she may, private, of files, in children; alice and root find what is theirs, and more."""
    alice, mallory, root = Memory(caller("alice")), Memory(caller("mallory")), Memory(caller("root"))
    alices = await alice.make(150)
    assert await alice.touch(alices, 0, 100) == ""
    hers = await mallory.make(1000)
    assert await mallory.touch(hers, 0, 1000) == "ENOMEM"
    another = (await mallory.who.call("spaces", "Create", space_pb2.CreateRequest())).mm
    mapping = space_pb2.MmapRequest(mm=another, addr=BASE, length=100 * PAGE, prot=3, flags=0x32)
    await mallory.who.call("spaces", "Mmap", mapping)
    child = (await mallory.who.call("spaces", "Fork", space_pb2.ForkRequest(mm=another))).child
    for mm in (another, child):
        assert await mallory.touch(mm, 0, 100) == "ENOMEM"
    for kind in (space_pb2.FILE_KIND_SHM, space_pb2.FILE_KIND_XIP, space_pb2.FILE_KIND_DISK):
        cached = space_pb2.OpenFileRequest(kind=kind, size=300 * PAGE, cached=True)
        assert "frames are to be had" in await refused(
            mallory.who.call("files", "OpenFile", cached), Code.RESOURCE_EXHAUSTED, "ENOMEM"
        )
        file = (await mallory.who.call("files", "OpenFile", space_pb2.OpenFileRequest(kind=kind))).file
        write = space_pb2.WriteFileRequest(file=file, data=b"x" * PAGE)
        text = await refused(mallory.who.call("files", "WriteFile", write), Code.RESOURCE_EXHAUSTED, "ENOMEM")
        assert "token:mallory has" in text
    shared = space_pb2.MmapRequest(mm=another, addr=BASE + (1 << 30), length=10 * PAGE, prot=3, flags=0x31)
    await mallory.who.call("spaces", "Mmap", shared)
    assert await mallory.touch(another, 1 << 18, 10) == "ENOMEM"
    initial = space_pb2.InitialMapping(resident=[0, 50, 1])
    initial.mapping.start, initial.mapping.end, initial.mapping.protection = BASE, BASE + 50 * PAGE, "rw-p"
    begun = space_pb2.CreateRequest(initial=[initial])
    await refused(mallory.who.call("spaces", "Create", begun), Code.RESOURCE_EXHAUSTED, "ENOMEM")
    assert await alice.touch(alices, 0, 150) == ""
    assert (
        await alice.who.call("spaces", "Load", space_pb2.LoadRequest(mm=alices, addr=BASE, length=6))
    ).data == b"secret"
    roots = await root.make(400)
    assert await root.touch(roots, 0, 400) == "", "administrators have the server's limit alone"
    group = await mallory.group()
    assert (group.frames <= 200, group.frames_max, group.ooms > 0) == (True, 200, True)
    assert (await alice.group()).frames == 151
    everyone = await root.who.call("inspection", "ListMemoryGroups", inspection_pb2.ListMemoryGroupsRequest())
    assert {one.name for one in everyone.groups} == {"token:alice", "token:mallory"}
    await mallory.who.call("spaces", "Exit", space_pb2.ExitRequest(mm=hers))
    assert await mallory.touch(another, 0, 100) == "", "what is given back can be had again"
    check_memory(server.server.memory)


@pytest.mark.parametrize("options", [{"frames_nr": 1024, "swap_slots_nr": 1024, "frames_per_principal_max": 100}])
async def test_memory_at_the_limit_is_reclaimed_from_who_reached_it(server: EmbeddedServer, caller) -> None:
    alice, mallory = Memory(caller("alice")), Memory(caller("mallory"))
    alices, hers = await alice.make(90), await mallory.make(1000)
    assert await alice.touch(alices, 0, 90) == ""
    assert await mallory.touch(hers, 0, 500) == ""
    assert await mallory.touch(hers, 500, 500) == "ENOMEM", "her half of the swap file is full"
    group = await mallory.group()
    assert (group.frames <= 100, group.swap <= 512, group.swap_max) == (True, True, 512)
    mm = server.server.memory.mm(MmId(alices))
    assert mm.present(BASE, BASE + 90 * PAGE) == [(0, 90)], "nothing of alice's was taken"
    check_memory(server.server.memory)


@pytest.mark.parametrize("options", [{"frames_nr": 1024, "frames_per_principal_max": 100, "ack_budget_s": 20.0}])
async def test_a_notifier_that_does_not_answer_keeps_its_own_memory_from_its_principal(caller) -> None:
    """Frames that wait for a round are charged: silence is no way to have twice as many."""
    alice, mallory = Memory(caller("alice")), Memory(caller("mallory"))
    hers, other = await mallory.make(90), await mallory.make(90)
    assert await mallory.touch(hers, 0, 90) == ""
    await mallory.who.attach()
    await mallory.who.register(hers)
    unmap = space_pb2.MunmapRequest(mm=hers, addr=BASE, length=90 * PAGE)
    waiting = asyncio.ensure_future(mallory.who.call("spaces", "Munmap", unmap))
    await read(mallory.who.streams[-1])  # the notice, which she does not answer
    assert await mallory.touch(other, 0, 90) == "ENOMEM"
    alices = await alice.make(90)
    assert await alice.touch(alices, 0, 90) == ""
    await mallory.who.streams[-1].write(session_pb2.AttachRequest(acknowledge=session_pb2.Acknowledge(through=1)))
    await waiting
    assert await mallory.touch(other, 0, 90) == ""


@pytest.mark.parametrize("options", [{"frames_nr": 1024, "frames_per_principal_max": 100, "watch_s": 0}])
async def test_the_limit_of_memory_changes_while_the_server_runs(server: EmbeddedServer, caller) -> None:
    mallory = Memory(caller("mallory"))
    hers = await mallory.make(300)
    assert await mallory.touch(hers, 0, 200) == "ENOMEM"
    settings = server.server.settings.model_copy(update={"frames_per_principal_max": 250})
    assert reload(server.server, settings)
    assert await mallory.touch(hers, 0, 200) == ""
    assert (await mallory.group()).frames_max == 250


@pytest.mark.parametrize("options", [{"frames_nr": 1024, "frames_per_principal_max": 100}])
async def test_a_child_of_another_s_address_space_is_its_maker_s(server: EmbeddedServer, caller) -> None:
    """Root forks mallory's program: what the child takes from then on is not mallory's to pay."""
    mallory, root = Memory(caller("mallory")), Memory(caller("root"))
    hers = await mallory.make(80)
    assert await mallory.touch(hers, 0, 80) == ""
    child = (await root.who.call("spaces", "Fork", space_pb2.ForkRequest(mm=hers))).child
    assert await root.touch(child, 0, 80) == ""
    assert (await mallory.group()).frames <= 82
    check_memory(server.server.memory)
