"""Files, and what inspection shows."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from mmu.v1 import address_space_pb2 as pb
from mmu.v1 import device_pb2, types_pb2
from mmu.v1 import inspection_pb2 as look

PAGE = 4096
BASE = 0x7000_0000_0000
S = grpc.StatusCode
SHM, DISK = pb.FILE_KIND_SHM, pb.FILE_KIND_DISK


async def test_a_file_by_name_and_id(peer) -> None:
    made = await peer.files.OpenFile(pb.OpenFileRequest(name="data", kind=SHM, size=2 * PAGE + 10))
    assert (made.created, made.size) == (True, 2 * PAGE + 10)
    again = await peer.files.OpenFile(pb.OpenFileRequest(name="data"))
    assert (again.file, again.created, again.size) == (made.file, False, 2 * PAGE + 10)
    wrote = await peer.files.WriteFile(pb.WriteFileRequest(file=made.file, offset=PAGE - 2, data=b"data"))
    assert wrote.size == 2 * PAGE + 10
    read = await peer.files.ReadFile(pb.ReadFileRequest(file=made.file, offset=PAGE - 3, length=6))
    assert read.data == b"\0data\0"
    assert (await peer.files.ReadFile(pb.ReadFileRequest(file=made.file, offset=2 * PAGE, length=99))).data == bytes(10)
    assert (await peer.files.ReadFile(pb.ReadFileRequest(file=made.file, offset=1 << 62, length=9))).data == b""
    (listed,) = (await peer.files.ListFiles(pb.ListFilesRequest())).files
    assert (listed.file, listed.name, listed.kind, listed.mappings) == (made.file, "data", SHM, 0)
    await peer.files.UnlinkFile(pb.UnlinkFileRequest(file=made.file))
    assert (await peer.files.OpenFile(pb.OpenFileRequest(name="data", kind=DISK))).created


async def test_mapped_file_is_shared(peer) -> None:
    file = (await peer.files.OpenFile(pb.OpenFileRequest(kind=SHM, size=PAGE))).file
    mms = [await peer.space(), await peer.space()]
    for mm in mms:
        await peer.spaces.Mmap(pb.MmapRequest(mm=mm, addr=BASE, length=PAGE, prot=3, flags=0x11, file=file))
    await peer.spaces.Store(pb.StoreRequest(mm=mms[0], addr=BASE, data=b"shared"))
    assert (await peer.spaces.Load(pb.LoadRequest(mm=mms[1], addr=BASE, length=6))).data == b"shared"
    assert (await peer.files.ReadFile(pb.ReadFileRequest(file=file, length=6))).data == b"shared"


@pytest.mark.parametrize(
    ("method", "request_", "code", "errno"),
    [
        ("OpenFile", pb.OpenFileRequest(name="x"), S.INVALID_ARGUMENT, "EINVAL"),
        ("OpenFile", pb.OpenFileRequest(kind=99), S.INVALID_ARGUMENT, "EINVAL"),
        ("OpenFile", pb.OpenFileRequest(kind=SHM, size=2**64 - 1), S.OUT_OF_RANGE, "EFBIG"),
        ("OpenFile", pb.OpenFileRequest(kind=SHM, size=1 << 35, cached=True), S.RESOURCE_EXHAUSTED, "ENOMEM"),
        ("OpenFile", pb.OpenFileRequest(kind=SHM, name="n" * 1000), S.INVALID_ARGUMENT, "ENAMETOOLONG"),
        ("OpenFile", pb.OpenFileRequest(kind=DISK, name="there"), S.ALREADY_EXISTS, "EEXIST"),
        ("ReadFile", pb.ReadFileRequest(file=99, length=1), S.NOT_FOUND, "EBADF"),
        ("ReadFile", pb.ReadFileRequest(file=1, length=2**32 - 1), S.INVALID_ARGUMENT, "EMSGSIZE"),
        ("ReadFile", pb.ReadFileRequest(file=1, offset=1 << 63, length=1), S.INVALID_ARGUMENT, "EINVAL"),
        ("WriteFile", pb.WriteFileRequest(file=99, data=b"x"), S.NOT_FOUND, "EBADF"),
        ("WriteFile", pb.WriteFileRequest(file=1, offset=1 << 62, data=b"x"), S.OUT_OF_RANGE, "EFBIG"),
        ("WriteFile", pb.WriteFileRequest(file=1, offset=1 << 63, data=b"x"), S.INVALID_ARGUMENT, "EINVAL"),
        ("UnlinkFile", pb.UnlinkFileRequest(file=99), S.NOT_FOUND, "EBADF"),
    ],
)
async def test_bad_file_requests(peer, fails, method: str, request_, code: grpc.StatusCode, errno: str) -> None:
    assert (await peer.files.OpenFile(pb.OpenFileRequest(name="there", kind=SHM, size=PAGE))).file == 1
    await fails(getattr(peer.files, method)(request_), code, errno)


async def test_ftruncate_beyond_the_limit(peer) -> None:
    file = (await peer.files.OpenFile(pb.OpenFileRequest(kind=SHM))).file
    call = pb.Call(op=pb.OP_FTRUNCATE, args=[file, 1 << 62])
    assert (await peer.spaces.Call(pb.CallRequest(call=call))).result.error.errno == "EFBIG"


# Inspection.


async def test_maps_and_pagemap(peer) -> None:
    mm = await peer.space(8)
    await peer.spaces.Store(pb.StoreRequest(mm=mm, addr=BASE, data=b"x" * 2 * PAGE))
    await peer.spaces.Load(pb.LoadRequest(mm=mm, addr=BASE + 4 * PAGE, length=2 * PAGE))
    (mapping,) = (await peer.inspection.ShowMaps(look.ShowMapsRequest(mm=mm))).mappings
    assert (mapping.start, mapping.end, mapping.protection, mapping.resident) == (BASE, BASE + 8 * PAGE, "rw-p", 4)
    runs = (await peer.inspection.ShowPagemap(look.ShowPagemapRequest(mm=mm))).runs
    written = [run for run in runs if not run.zero]
    assert sum(run.end - run.start for run in written) == 2 * PAGE
    assert all(run.writable and run.dirty and run.anonymous and run.exclusive for run in written)
    (zero,) = (run for run in runs if run.zero)
    assert (zero.start, zero.end, zero.writable) == (BASE + 4 * PAGE, BASE + 6 * PAGE, False)
    part = look.ShowPagemapRequest(mm=mm, start=BASE + PAGE, end=BASE + 2 * PAGE)
    (run,) = (await peer.inspection.ShowPagemap(part)).runs
    assert (run.start, run.end) == (BASE + PAGE, BASE + 2 * PAGE)


@pytest.mark.parametrize(("start", "end"), [(1, PAGE), (0, 1), (PAGE, PAGE), (2 * PAGE, PAGE), (0, 1 << 63)])
async def test_pagemap_refused(peer, fails, start: int, end: int) -> None:
    mm = await peer.space(1)
    if end:
        call = peer.inspection.ShowPagemap(look.ShowPagemapRequest(mm=mm, start=start, end=end))
        await fails(call, S.INVALID_ARGUMENT, "EINVAL")


async def test_no_such_address_space(peer, fails) -> None:
    await fails(peer.inspection.ShowMaps(look.ShowMapsRequest(mm=9)), S.NOT_FOUND, "ESRCH")
    await fails(peer.inspection.ShowPagemap(look.ShowPagemapRequest(mm=9)), S.NOT_FOUND, "ESRCH")


async def test_who_holds_which_pages_and_what_became_of_one(peer) -> None:
    mm = await peer.space(8, touch=True)
    attached = peer.attach()
    await attached.hello("nic")
    registration = await attached.register(mm)
    for start, end in ((BASE, BASE + 2 * PAGE), (BASE + 4 * PAGE, BASE + 8 * PAGE)):
        fault = device_pb2.FaultRequest(registration=registration, start=start, end=end)
        await peer.devices.Fault(fault, metadata=attached.metadata)
    ask = look.ListHoldersRequest(mm=mm, runs_max=8)
    (holder,) = (await peer.inspection.ListHolders(ask)).holders
    assert list(holder.run_starts) == [BASE, BASE + 4 * PAGE]
    assert list(holder.run_ends) == [BASE + 2 * PAGE, BASE + 8 * PAGE]
    ask.runs_max = 1
    assert list((await peer.inspection.ListHolders(ask)).holders[0].run_ends) == [BASE + 2 * PAGE]

    unmap = asyncio.ensure_future(peer.spaces.Munmap(pb.MunmapRequest(mm=mm, addr=BASE, length=PAGE)))
    (_,) = (await attached.notices()).notices
    await attached.ack(1)
    await unmap
    page = await peer.inspection.ExplainPage(look.ExplainPageRequest(mm=mm, address=BASE + 5))
    (story,) = page.stories
    assert (story.session_name, story.registration, story.holds) == ("nic", registration, False)
    given, taken, acknowledged = story.story
    assert given.startswith("given out at")
    assert "munmap" in taken
    assert acknowledged.startswith("acknowledged at")
    assert page.now_s > 0
    (held,) = (await peer.inspection.ExplainPage(look.ExplainPageRequest(mm=mm, address=BASE + PAGE))).stories
    assert held.holds
    (ended,) = (await peer.inspection.ListRounds(look.ListRoundsRequest(ended=1))).rounds
    assert (ended.last, ended.open) == ("nic", False)
    assert 0 < ended.took_s <= ended.age_s


async def test_pages_in_swap_are_told_when_that_is_asked_for(server, peer) -> None:
    server.server.memory.swap.slots_nr = 16
    mm = await peer.space(8, touch=True)
    await peer.spaces.Madvise(pb.MadviseRequest(mm=mm, addr=BASE + 2 * PAGE, length=3 * PAGE, advice=21))  # PAGEOUT
    runs = (await peer.inspection.ShowPagemap(look.ShowPagemapRequest(mm=mm, swapped=True))).runs
    assert [(run.start, run.end) for run in runs if run.swapped] == [(BASE + 2 * PAGE, BASE + 5 * PAGE)]
    assert [run.start for run in runs] == sorted(run.start for run in runs)
    assert not any(run.swapped for run in (await peer.inspection.ShowPagemap(look.ShowPagemapRequest(mm=mm))).runs)
    counted = await peer.inspection.GetStatistics(look.GetStatisticsRequest())
    assert (counted.swap, counted.swap_used) == (16, 3)


async def test_sessions_and_rounds(peer) -> None:
    mm = await peer.space(2, touch=True)
    attached = peer.attach()
    await attached.hello("watched")
    await attached.register(mm, name="mirror")
    unmapping = asyncio.ensure_future(peer.spaces.Munmap(pb.MunmapRequest(mm=mm, addr=BASE, length=PAGE)))
    batch = await attached.notices()
    (each,) = (await peer.inspection.ListRounds(look.ListRoundsRequest())).rounds
    assert (each.mm, each.start, each.end, each.open) == (mm, BASE, BASE + PAGE, True)
    assert (each.notification, each.reason, each.notices) == ("invalidate_range", types_pb2.REASON_UNMAP, 1)
    assert list(each.waiting_for) == ["watched"]
    assert "munmap(0x700000000000, 0x1000)" in each.operation
    (space,) = (await peer.inspection.ListAddressSpaces(look.ListAddressSpacesRequest())).address_spaces
    assert (space.registrations, space.open_rounds, space.total_pages) == (1, 1, 1)
    await attached.ack(batch.first_seq)
    await unmapping
    (ended,) = (await peer.inspection.ListRounds(look.ListRoundsRequest(ended=5))).rounds
    assert (ended.round, ended.open, list(ended.waiting_for)) == (each.round, False, [])
    (session,) = (await peer.inspection.ListSessions(look.ListSessionsRequest())).sessions
    assert (session.name, session.state, session.notices, session.acknowledged) == ("watched", "live", 1, 1)
    assert session.registrations[0].name == "mirror"
    assert session.ack_us_p50 > 0
    statistics = await peer.inspection.GetStatistics(look.GetStatisticsRequest())
    assert (statistics.rounds, statistics.notices, statistics.acks, statistics.sessions) == (1, 1, 1, 1)
    assert statistics.version
    assert statistics.uptime_s > 0
