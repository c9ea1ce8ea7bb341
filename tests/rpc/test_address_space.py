"""The CPU's side: typed calls, Call, the Operate stream; what each does with bad input."""

from __future__ import annotations

import asyncio
import itertools

import grpc
import grpc.aio
import pytest
from mmu.v1 import address_space_pb2 as pb
from mmu.v1 import inspection_pb2, types_pb2
from patience import LIMIT_S

PAGE = 4096
BASE = 0x7000_0000_0000
FIXED = 0x32
S = grpc.StatusCode


async def test_load_gives_what_store_wrote(peer) -> None:
    mm = await peer.space(3)
    data = bytes(range(256)) * 40
    await peer.spaces.Store(pb.StoreRequest(mm=mm, addr=BASE + 100, data=data))
    assert (await peer.spaces.Load(pb.LoadRequest(mm=mm, addr=BASE + 100, length=len(data)))).data == data
    assert (await peer.spaces.Load(pb.LoadRequest(mm=mm, addr=BASE, length=100))).data == bytes(100)


async def test_every_typed_call(peer) -> None:
    mm = await peer.space(8, touch=True)
    await peer.spaces.Mprotect(pb.MprotectRequest(mm=mm, addr=BASE, length=PAGE, prot=1))
    grow = pb.MremapRequest(mm=mm, addr=BASE + PAGE, old_length=PAGE, new_length=2 * PAGE, flags=1)
    moved = await peer.spaces.Mremap(grow)
    assert moved.addr != BASE + PAGE
    await peer.spaces.Madvise(pb.MadviseRequest(mm=mm, addr=BASE + 4 * PAGE, length=PAGE, advice=4))
    assert (await peer.spaces.Load(pb.LoadRequest(mm=mm, addr=BASE + 4 * PAGE, length=1))).data == b"\0"
    child = (await peer.spaces.Fork(pb.ForkRequest(mm=mm, name="child"))).child
    await peer.spaces.Store(pb.StoreRequest(mm=child, addr=BASE + 5 * PAGE, data=b"c"))
    assert (await peer.spaces.Load(pb.LoadRequest(mm=mm, addr=BASE + 5 * PAGE, length=1))).data == b"\1"
    names = {
        space.mm: space.name
        for space in (await peer.inspection.ListAddressSpaces(inspection_pb2.ListAddressSpacesRequest())).address_spaces
    }
    assert names == {mm: "test", child: "child"}
    await peer.spaces.Munmap(pb.MunmapRequest(mm=mm, addr=BASE, length=8 * PAGE))
    await peer.spaces.Exit(pb.ExitRequest(mm=mm))
    await peer.spaces.Exit(pb.ExitRequest(mm=child))
    statistics = await peer.inspection.GetStatistics(inspection_pb2.GetStatisticsRequest())
    assert statistics.frames_used <= 1  # the zero page
    assert statistics.freed_before_ack == 0


async def test_brk(peer) -> None:
    heap = pb.InitialMapping(mapping=types_pb2.Mapping(start=BASE, end=BASE + PAGE, protection="rw-p", name="[heap]"))
    mm = (await peer.spaces.Create(pb.CreateRequest(initial=[heap], brk=BASE + PAGE))).mm
    assert (await peer.spaces.Brk(pb.BrkRequest(mm=mm))).brk == BASE + PAGE
    assert (await peer.spaces.Brk(pb.BrkRequest(mm=mm, addr=BASE + 3 * PAGE))).brk == BASE + 3 * PAGE


@pytest.mark.parametrize(
    ("method", "request_", "code", "errno"),
    [
        ("Mmap", pb.MmapRequest(addr=BASE, length=0, prot=3, flags=FIXED), S.INVALID_ARGUMENT, "EINVAL"),
        ("Mmap", pb.MmapRequest(addr=BASE + 1, length=1, prot=3, flags=FIXED), S.INVALID_ARGUMENT, "EINVAL"),
        ("Mmap", pb.MmapRequest(addr=BASE, length=1, prot=3, flags=0x30), S.INVALID_ARGUMENT, "EINVAL"),
        ("Mmap", pb.MmapRequest(addr=BASE, length=1 << 63, prot=3, flags=FIXED), S.RESOURCE_EXHAUSTED, "ENOMEM"),
        ("Mmap", pb.MmapRequest(addr=BASE, length=2**64 - 1, prot=3, flags=FIXED), S.RESOURCE_EXHAUSTED, "ENOMEM"),
        ("Mmap", pb.MmapRequest(addr=BASE, length=1, prot=3, flags=0x12, file=77), S.NOT_FOUND, "EBADF"),
        ("Munmap", pb.MunmapRequest(addr=BASE + 1, length=PAGE), S.INVALID_ARGUMENT, "EINVAL"),
        ("Munmap", pb.MunmapRequest(addr=BASE, length=0), S.INVALID_ARGUMENT, "EINVAL"),
        ("Munmap", pb.MunmapRequest(addr=2**64 - PAGE, length=PAGE), S.INVALID_ARGUMENT, "EINVAL"),
        ("Mprotect", pb.MprotectRequest(addr=BASE + 1, length=PAGE, prot=1), S.INVALID_ARGUMENT, "EINVAL"),
        ("Mprotect", pb.MprotectRequest(addr=BASE - PAGE, length=PAGE, prot=1), S.RESOURCE_EXHAUSTED, "ENOMEM"),
        ("Mremap", pb.MremapRequest(addr=BASE + 1, old_length=PAGE, new_length=PAGE), S.INVALID_ARGUMENT, "EINVAL"),
        ("Mremap", pb.MremapRequest(addr=BASE, old_length=PAGE, new_length=0), S.INVALID_ARGUMENT, "EINVAL"),
        ("Madvise", pb.MadviseRequest(addr=BASE, length=PAGE, advice=9999), S.INVALID_ARGUMENT, "EINVAL"),
        ("Load", pb.LoadRequest(addr=BASE - PAGE, length=1), S.FAILED_PRECONDITION, "EFAULT"),
        ("Load", pb.LoadRequest(addr=2**64 - 1, length=2), S.FAILED_PRECONDITION, "EFAULT"),
        ("Load", pb.LoadRequest(addr=BASE, length=2**32 - 1), S.INVALID_ARGUMENT, "EMSGSIZE"),
        ("Store", pb.StoreRequest(addr=BASE - PAGE, data=b"x"), S.FAILED_PRECONDITION, "EFAULT"),
        ("Store", pb.StoreRequest(addr=2**64 - 1, data=b"xx"), S.FAILED_PRECONDITION, "EFAULT"),
    ],
)
async def test_bad_arguments(peer, fails, method: str, request_, code: grpc.StatusCode, errno: str) -> None:
    request_.mm = await peer.space(2)  # the first one of each server, so always the same
    await fails(getattr(peer.spaces, method)(request_), code, errno)
    assert await peer.alive()


@pytest.mark.parametrize(
    "method", ["Mmap", "Munmap", "Mprotect", "Mremap", "Madvise", "Brk", "Fork", "Exit", "Load", "Store"]
)
async def test_no_such_address_space(peer, fails, method: str) -> None:
    kind = getattr(pb, f"{method}Request")
    for mm in (0, 1 << 60, 2**64 - 1):
        await fails(getattr(peer.spaces, method)(kind(mm=mm)), S.NOT_FOUND, "ESRCH")


@pytest.mark.parametrize(
    ("method", "service"),
    [
        *(("AddressSpaceService", rpc.name) for rpc in pb.DESCRIPTOR.services_by_name["AddressSpaceService"].methods),
        *(("FileService", rpc.name) for rpc in pb.DESCRIPTOR.services_by_name["FileService"].methods),
        *(
            ("InspectionService", rpc.name)
            for rpc in inspection_pb2.DESCRIPTOR.services_by_name["InspectionService"].methods
        ),
    ],
)
async def test_garbage_bytes_on_every_call(peer, method: str, service: str) -> None:
    path = f"/mmu.v1.{method}/{service}"
    if service == "Operate":
        call = peer.channel.stream_stream(path)()
        await call.write(b"\xff\xff\xff")
        assert await call.code() is S.INVALID_ARGUMENT
        return
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await peer.channel.unary_unary(path)(b"\xff\xff\xff")
    assert caught.value.code() is S.INVALID_ARGUMENT
    assert "not a mmu.v1." in caught.value.details()


async def test_unknown_session_in_the_metadata(peer, fails) -> None:
    mm = await peer.space()
    call = peer.spaces.Exit(pb.ExitRequest(mm=mm), metadata=(("mmubus-session", "guessed"),))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert "NO_SUCH_SESSION" in str(caught.value.trailing_metadata())


@pytest.mark.parametrize("options", [{"message_bytes_max": 1 << 16}])
async def test_message_beyond_the_limit(peer) -> None:
    mm = await peer.space(64)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await peer.spaces.Store(pb.StoreRequest(mm=mm, addr=BASE, data=bytes(1 << 17)))
    assert caught.value.code() is S.RESOURCE_EXHAUSTED
    assert await peer.alive()


@pytest.mark.parametrize("options", [{"address_spaces_max": 2}])
async def test_address_spaces_are_limited(peer, fails) -> None:
    mm = await peer.space()
    await peer.space()
    await fails(peer.spaces.Create(pb.CreateRequest()), S.ABORTED, "EAGAIN")
    await fails(peer.spaces.Fork(pb.ForkRequest(mm=mm)), S.ABORTED, "EAGAIN")
    call = pb.Call(id=1, op=pb.OP_FORK, mm=mm)
    assert (await peer.spaces.Call(pb.CallRequest(call=call))).result.error.errno == "EAGAIN"


async def test_names_are_limited(peer, fails) -> None:
    await fails(peer.spaces.Create(pb.CreateRequest(name="n" * 1000)), S.INVALID_ARGUMENT, "ENAMETOOLONG")


# A recording's start.


def initial(start: int = BASE, end: int = BASE + 4 * PAGE, protection: str = "rw-p", resident=(), **rest):
    mapping = types_pb2.Mapping(start=start, end=end, protection=protection, **rest)
    return pb.InitialMapping(mapping=mapping, resident=resident)


@pytest.mark.parametrize(("huge_pages", "resident"), [(pb.HUGE_PAGES_ALWAYS, 512), (pb.HUGE_PAGES_NEVER, 1), (0, 1)])
async def test_an_address_space_with_huge_pages_of_its_own_choice(peer, huge_pages: int, resident: int) -> None:
    mm = (await peer.spaces.Create(pb.CreateRequest(huge_pages=huge_pages))).mm
    await peer.spaces.Mmap(pb.MmapRequest(mm=mm, addr=BASE, length=2 << 20, prot=3, flags=FIXED))
    await peer.spaces.Store(pb.StoreRequest(mm=mm, addr=BASE, data=b"x"))
    listed = await peer.inspection.ListAddressSpaces(inspection_pb2.ListAddressSpacesRequest())
    assert {space.mm: space.resident_pages for space in listed.address_spaces}[mm] == resident


async def test_no_such_choice_of_huge_pages(peer, fails) -> None:
    await fails(peer.spaces.Create(pb.CreateRequest(huge_pages=4)), S.INVALID_ARGUMENT, "EINVAL")


async def test_create_with_a_snapshot(peer) -> None:
    big = initial(BASE + (1 << 30), BASE + (2 << 30))
    request = pb.CreateRequest(initial=[initial(resident=[0, 1, 1, 2, 4, 2]), big])
    mm = (await peer.spaces.Create(request)).mm
    maps = (await peer.inspection.ShowMaps(inspection_pb2.ShowMapsRequest(mm=mm))).mappings
    assert [(each.start, each.end, each.protection, each.resident) for each in maps] == [
        (BASE, BASE + 4 * PAGE, "rw-p", 3),
        (BASE + (1 << 30), BASE + (2 << 30), "rw-p", 0),
    ]


@pytest.mark.parametrize(
    ("mappings", "errno"),
    [
        ([initial(start=BASE + 1)], "EINVAL"),
        ([initial(start=BASE + 8 * PAGE)], "EINVAL"),
        ([initial(end=1 << 63)], "EINVAL"),
        ([initial(protection="rwx")], "EINVAL"),
        ([initial(protection="rwxz")], "EINVAL"),
        ([initial(resident=[0, 1])], "EINVAL"),
        ([initial(resident=[0, 5, 1])], "EINVAL"),
        ([initial(resident=[2, 1, 1])], "EINVAL"),
        ([initial(resident=[0, 1, 3])], "EINVAL"),
        ([initial(resident=[2, 3, 1, 0, 1, 1])], "EINVAL"),
        ([initial(offset=5)], "EINVAL"),
        ([initial(offset=(1 << 63) - PAGE, file=1)], "EOVERFLOW"),
        ([initial(file=99)], "EBADF"),
        ([initial(), initial(start=BASE + PAGE)], "EEXIST"),
        ([initial(end=BASE + (1 << 40), resident=[0, 1 << 28, 1])], "ENOMEM"),
    ],
)
async def test_bad_snapshot_leaves_nothing_behind(peer, mappings: list[pb.InitialMapping], errno: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await peer.spaces.Create(pb.CreateRequest(initial=mappings))
    assert errno in str(caught.value.trailing_metadata())
    listed = await peer.inspection.ListAddressSpaces(inspection_pb2.ListAddressSpacesRequest())
    assert not listed.address_spaces


# Call.


async def test_call_reports_what_it_was_asked_to(peer) -> None:
    mm = await peer.space(4, touch=True)
    attached = peer.attach()
    await attached.hello()
    await attached.register(mm)
    report = pb.Report(notifications=True, window_start=BASE, window_end=BASE + 4 * PAGE)
    call = pb.Call(id=9, op=pb.OP_MUNMAP, mm=mm, args=[BASE + PAGE, PAGE], report=report)
    calling = asyncio.ensure_future(peer.spaces.Call(pb.CallRequest(call=call)))
    await attached.ack((await attached.notices()).first_seq)
    result = (await calling).result
    assert (result.id, result.ret, result.error.errno) == (9, 0, "")
    (told,) = result.notifications
    assert (told.call, told.start, told.end, told.mm) == ("invalidate_range", BASE + PAGE, BASE + 2 * PAGE, mm)
    assert told.reason == types_pb2.REASON_UNMAP
    assert [(each.start, each.end) for each in result.mappings] == [
        (BASE, BASE + PAGE),
        (BASE + 2 * PAGE, BASE + 4 * PAGE),
    ]
    assert list(result.present) == [0, 1, 2, 4]


async def test_call_reports_without_anyone_registered(peer) -> None:
    mm = await peer.space(1, touch=True)
    call = pb.Call(op=pb.OP_MUNMAP, mm=mm, args=[BASE, PAGE], report=pb.Report(notifications=True))
    result = (await peer.spaces.Call(pb.CallRequest(call=call))).result
    assert [(each.start, each.end) for each in result.notifications] == [(BASE, BASE + PAGE)]


@pytest.mark.parametrize(
    ("call", "errno"),
    [
        (pb.Call(), "ENOSYS"),
        (pb.Call(op=999), "ENOSYS"),
        (pb.Call(op=pb.OP_MUNMAP, mm=1 << 60), "ESRCH"),
        (pb.Call(op=pb.OP_MUNMAP), "ESRCH"),
        (pb.Call(op=pb.OP_MUNMAP, args=[1]), "EINVAL"),
        (pb.Call(op=pb.OP_MUNMAP, args=[1] * 100), "EINVAL"),
        (pb.Call(op=pb.OP_MMAP, args=[2**64 - 1] * 6), None),
        (pb.Call(op=pb.OP_LOAD, args=[BASE]), "EINVAL"),
        (pb.Call(op=pb.OP_LOAD, args=[BASE, 2**64 - 1]), "EMSGSIZE"),
        (pb.Call(op=pb.OP_STORE, args=[0, 0]), "EINVAL"),
        (pb.Call(op=pb.OP_STORE, args=[0], data=b"x"), "EFAULT"),
        (pb.Call(op=pb.OP_READ, args=[2**64 - PAGE, 2**64 - 1]), None),
        (pb.Call(op=pb.OP_READ, args=[BASE, 1 << 46]), "E2BIG"),
        (pb.Call(op=pb.OP_FSYNC, args=[99]), "EBADF"),
        (pb.Call(op=pb.OP_FTRUNCATE, args=[99, 2**64 - 1]), None),
        (pb.Call(op=pb.OP_PUNCH, args=[99, 0, 1]), "EBADF"),
    ],
)
async def test_bad_call_is_an_answer(peer, call: pb.Call, errno: str | None) -> None:
    call = pb.Call(id=4, op=call.op, mm=call.mm, args=call.args, data=call.data)
    if not call.mm and call.args and call.op < pb.OP_FSYNC:
        call.mm = await peer.space(1)
    result = (await peer.spaces.Call(pb.CallRequest(call=call))).result
    assert result.id == 4
    assert result.error.message
    if errno:
        assert result.error.errno == errno
    assert await peer.alive()


# Operate.


async def operate(peer, batches: list[list[pb.Call]]) -> list[pb.CallResult]:
    """Send all, half-close, read to the end."""
    call = peer.spaces.Operate()
    results: list[pb.CallResult] = []

    async def read() -> None:
        while (got := await call.read()) is not grpc.aio.EOF:
            results.extend(got.results)

    reading = asyncio.ensure_future(read())
    for batch in batches:
        await call.write(pb.OperateRequest(calls=batch))
    await call.done_writing()
    await asyncio.wait_for(reading, LIMIT_S)
    assert await call.code() is S.OK
    return results


def map_touch_unmap(mm: int, count: int, threads: int = 1) -> list[pb.Call]:
    calls = []
    for n in range(count):
        addr = BASE + (n % threads) * (1 << 30)
        three = [
            (pb.OP_MMAP, [addr, 4 * PAGE, 3, FIXED, 0, 0]),
            (pb.OP_WRITE, [addr, 4 * PAGE]),
            (pb.OP_MUNMAP, [addr, 4 * PAGE]),
        ]
        for op, args in three:
            calls.append(pb.Call(id=len(calls) + 1, thread=n % threads, op=op, mm=mm, args=args))
    return calls


async def test_operate_answers_each_call_once(peer) -> None:
    mm = await peer.space()
    calls = map_touch_unmap(mm, 500, threads=7)
    results = await operate(peer, [calls[n : n + 100] for n in range(0, len(calls), 100)])
    assert sorted(result.id for result in results) == [call.id for call in calls]
    assert not [result for result in results if result.HasField("error")]


@pytest.mark.parametrize("options", [{"operations_max": 3}])
async def test_operate_with_a_small_bound(peer) -> None:
    mm = await peer.space()
    calls = map_touch_unmap(mm, 50, threads=4)
    assert len(await operate(peer, [calls])) == len(calls)


async def test_threads_overlap_and_each_keeps_its_order(peer) -> None:
    mm = await peer.space(8, touch=True)
    attached = peer.attach()
    await attached.hello()
    await attached.register(mm)
    call = peer.spaces.Operate()
    ids = itertools.count(1)
    blocked = [pb.Call(id=next(ids), thread=1, op=pb.OP_MUNMAP, mm=mm, args=[BASE, PAGE])]
    # Long enough that recursion would not do.
    blocked += [pb.Call(id=next(ids), thread=1, op=pb.OP_READ, mm=mm, args=[BASE, PAGE]) for _ in range(400)]
    blocked += [pb.Call(id=next(ids), thread=1, op=pb.OP_READ, mm=99, args=[BASE, PAGE]) for _ in range(400)]
    free = pb.Call(id=next(ids), thread=2, op=pb.OP_READ, mm=mm, args=[BASE + 4 * PAGE, PAGE])
    await call.write(pb.OperateRequest(calls=[*blocked, free]))
    first = await call.read()
    assert [result.id for result in first.results] == [free.id]
    await attached.ack((await attached.notices()).first_seq)
    order: list[pb.CallResult] = []
    while len(order) < len(blocked):
        order.extend((await call.read()).results)
    assert [result.id for result in order] == [each.id for each in blocked]
    assert order[0].error.errno == ""
    assert {result.error.errno for result in order[1:401]} == {"EFAULT"}  # after the munmap, so it is gone
    assert {result.error.errno for result in order[401:]} == {"ESRCH"}
    await call.done_writing()
    assert await call.code() is S.OK


@pytest.mark.parametrize("options", [{"message_bytes_max": 1 << 16}])
async def test_results_are_split_at_the_message_limit(peer) -> None:
    mm = await peer.space(12, touch=False)
    loads = [pb.Call(id=n, thread=n, op=pb.OP_LOAD, mm=mm, args=[BASE, 12 * PAGE]) for n in range(1, 9)]
    results = await operate(peer, [loads])
    assert [len(result.data) for result in results] == [12 * PAGE] * 8


async def test_client_that_goes_leaves_the_server_well(peer, other) -> None:
    mm = await peer.space(4, touch=True)
    attached = peer.attach()
    await attached.hello()
    await attached.register(mm)
    call = other.spaces.Operate()
    await call.write(pb.OperateRequest(calls=[pb.Call(id=1, op=pb.OP_MUNMAP, mm=mm, args=[BASE, PAGE])] * 3))
    batch = await attached.notices()
    call.cancel()
    await attached.ack(batch.first_seq)
    assert await peer.alive()


async def test_a_program_s_choices_are_adopted(peer) -> None:
    """As a snapshot tells them; letters that follow from the rest say nothing."""
    heap = types_pb2.Mapping(start=BASE, end=BASE + PAGE, protection="rw-p", flags=["rd", "wr", "hg", "wf", "zz"])
    mm = (await peer.spaces.Create(pb.CreateRequest(initial=[pb.InitialMapping(mapping=heap)]))).mm
    await peer.spaces.Store(pb.StoreRequest(mm=mm, addr=BASE, data=b"heap"))
    child = (await peer.spaces.Fork(pb.ForkRequest(mm=mm))).child
    assert (await peer.spaces.Load(pb.LoadRequest(mm=child, addr=BASE, length=4))).data == bytes(4), "wiped on fork"
