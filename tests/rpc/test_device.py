"""The device's side, unary and pipelined: every request, every refusal."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from mmu.v1 import address_space_pb2 as spaces_pb
from mmu.v1 import device_pb2 as pb
from mmu.v1 import session_pb2, types_pb2

PAGE = 4096
BASE = 0x7000_0000_0000
NO_PFN = 2**64 - 1
S = grpc.StatusCode
RMAP = "register_rmap"


async def device(peer, pages: int = 4):
    """An address space, a session and a registration on it."""
    mm = await peer.space(pages, touch=True)
    attached = peer.attach()
    await attached.hello("device")
    return mm, attached, await attached.register(mm)


async def test_fault_read_and_write_through_it(peer) -> None:
    mm, attached, registration = await device(peer)
    fault = pb.FaultRequest(registration=registration, start=BASE, end=BASE + 2 * PAGE, write=True)
    got = await peer.devices.Fault(fault, metadata=attached.metadata)
    assert not got.retry
    assert got.translations.start == BASE
    assert len(set(got.translations.pfns)) == 2
    assert NO_PFN not in got.translations.pfns
    assert list(got.translations.rights) == [3, 3]
    held = {"pfns": got.translations.pfns, "generations": got.translations.generations}
    write = pb.DmaWriteRequest(registration=registration, addr=BASE + PAGE - 2, data=b"dma!", **held)
    await peer.devices.DmaWrite(write, metadata=attached.metadata)
    assert (await peer.spaces.Load(spaces_pb.LoadRequest(mm=mm, addr=BASE + PAGE - 3, length=6))).data == b"\1dma!\1"
    read = pb.DmaReadRequest(registration=registration, addr=BASE + PAGE - 2, length=4, **held)
    assert (await peer.devices.DmaRead(read, metadata=attached.metadata)).data == b"dma!"


async def test_stale_translation_is_refused_and_explained(peer, fails) -> None:
    mm, attached, registration = await device(peer)
    fault = pb.FaultRequest(registration=registration, start=BASE, end=BASE + PAGE)
    got = (await peer.devices.Fault(fault, metadata=attached.metadata)).translations
    unmapping = asyncio.ensure_future(peer.spaces.Munmap(spaces_pb.MunmapRequest(mm=mm, addr=BASE, length=PAGE)))
    await attached.ack((await attached.notices()).first_seq)
    await unmapping
    read = pb.DmaReadRequest(registration=registration, addr=BASE, length=1, pfns=got.pfns, generations=got.generations)
    call = peer.devices.DmaRead(read, metadata=attached.metadata)
    info = await fails(call, S.FAILED_PRECONDITION, "STALE_TRANSLATION")
    assert "munmap" in await call.details()
    assert info.metadata["registration"] == str(registration)


async def test_fault_waits_while_the_range_is_taken_and_then_retries(peer) -> None:
    mm, attached, registration = await device(peer)
    unmapping = asyncio.ensure_future(peer.spaces.Munmap(spaces_pb.MunmapRequest(mm=mm, addr=BASE, length=PAGE)))
    batch = await attached.notices()
    fault = pb.FaultRequest(registration=registration, start=BASE, end=BASE + PAGE, wait_s=0.1)
    got = await peer.devices.Fault(fault, metadata=attached.metadata)
    assert got.retry
    assert not got.translations.pfns
    await attached.ack(batch.first_seq)
    await unmapping


async def test_snapshot_grants_nothing(peer) -> None:
    mm, attached, _ = await device(peer)
    await peer.spaces.Munmap(spaces_pb.MunmapRequest(mm=mm, addr=BASE + 8 * PAGE, length=PAGE))
    got = await peer.devices.Snapshot(
        pb.SnapshotRequest(mm=mm, start=BASE, end=BASE + 6 * PAGE), metadata=attached.metadata
    )
    assert list(got.states) == [1, 1, 1, 1, 0xFF, 0xFF]
    assert list(got.translations.pfns[4:]) == [NO_PFN, NO_PFN]


async def test_pin_outlives_the_mapping(peer, fails) -> None:
    mm, attached, registration = await device(peer)
    pin = pb.PinRequest(registration=registration, start=BASE, end=BASE + PAGE, write=True)
    pinned = await peer.devices.Pin(pin, metadata=attached.metadata)
    unmapping = asyncio.ensure_future(peer.spaces.Munmap(spaces_pb.MunmapRequest(mm=mm, addr=BASE, length=PAGE)))
    await attached.ack((await attached.notices()).first_seq)
    await unmapping
    held = {"pfns": pinned.translations.pfns, "generations": pinned.translations.generations, "pin": pinned.pin}
    read = pb.DmaReadRequest(registration=registration, length=3, **held)
    assert (await peer.devices.DmaRead(read, metadata=attached.metadata)).data == b"\1\1\1"
    unpin = pb.UnpinRequest(pin=pinned.pin, dirty=True)
    await peer.devices.Unpin(unpin, metadata=attached.metadata)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await peer.devices.Unpin(unpin, metadata=attached.metadata)
    assert "NO_SUCH_PIN" in str(caught.value.trailing_metadata())


async def test_export_through_the_rmap_list(peer) -> None:
    mm = await peer.space(2, touch=True)
    attached = peer.attach()
    await attached.hello("exporter")
    await attached.send(request=1, register_rmap=session_pb2.RegisterRmap(name="x"))
    registration = (await attached.receive()).registered.registration
    export = pb.ExportRequest(registration=registration, mm=mm, start=BASE, end=BASE + 2 * PAGE, write=True)
    got = (await peer.devices.Export(export, metadata=attached.metadata)).translations
    assert len(got.pfns) == 2
    unexport = pb.UnexportRequest(registration=registration, pfns=got.pfns[1:], dirty=got.pfns[1:])
    await peer.devices.Unexport(unexport, metadata=attached.metadata)
    unmapping = asyncio.ensure_future(peer.spaces.Munmap(spaces_pb.MunmapRequest(mm=mm, addr=BASE, length=2 * PAGE)))
    batch = await attached.notices()
    (notice,) = batch.notices
    assert (notice.op, list(notice.pages)) == (types_pb2.NOTIFIER_OP_RMAP_INVALIDATE_PAGE, [got.pfns[0]])
    assert notice.must_evict
    await attached.ack(batch.first_seq, results=[session_pb2.NoticeResult(seq=batch.first_seq, dirty=notice.pages)])
    await unmapping


REQUESTS = {
    "Fault": pb.FaultRequest(registration=1, start=BASE, end=BASE + PAGE),
    "Snapshot": pb.SnapshotRequest(mm=1, start=BASE, end=BASE + PAGE),
    "Pin": pb.PinRequest(registration=1, start=BASE, end=BASE + PAGE),
    "Unpin": pb.UnpinRequest(pin=1),
    "DmaRead": pb.DmaReadRequest(registration=1, addr=BASE, length=1, pfns=[1], generations=[1]),
    "DmaWrite": pb.DmaWriteRequest(registration=1, addr=BASE, data=b"x", pfns=[1], generations=[1]),
    "Export": pb.ExportRequest(registration=1, mm=1, start=BASE, end=BASE + PAGE),
    "Unexport": pb.UnexportRequest(registration=1, pfns=[1]),
}


@pytest.mark.parametrize("method", REQUESTS)
async def test_without_a_session(peer, fails, method: str) -> None:
    await fails(getattr(peer.devices, method)(REQUESTS[method]), S.PERMISSION_DENIED, "NO_TOKEN")


@pytest.mark.parametrize("method", REQUESTS)
async def test_with_a_guessed_token(peer, method: str) -> None:
    call = getattr(peer.devices, method)(REQUESTS[method], metadata=(("mmubus-session", "guessed"),))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert "NO_SUCH_SESSION" in str(caught.value.trailing_metadata())


@pytest.mark.parametrize("method", REQUESTS)
async def test_garbage_bytes(peer, method: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await peer.channel.unary_unary(f"/mmu.v1.DeviceService/{method}")(b"\xff\xff\xff")
    assert caught.value.code() is S.INVALID_ARGUMENT


BAD = {
    "no such registration": ("Fault", pb.FaultRequest(registration=99, start=BASE, end=BASE + PAGE)),
    "unaligned": ("Fault", pb.FaultRequest(start=BASE + 1, end=BASE + PAGE)),
    "empty": ("Fault", pb.FaultRequest(start=BASE, end=BASE)),
    "backwards": ("Fault", pb.FaultRequest(start=BASE + PAGE, end=BASE)),
    "beyond": ("Fault", pb.FaultRequest(start=BASE, end=2**64 - PAGE)),
    "too long": ("Fault", pb.FaultRequest(start=BASE, end=BASE + (1 << 40))),
    "not mapped": ("Fault", pb.FaultRequest(start=BASE + (1 << 30), end=BASE + (1 << 30) + PAGE)),
    "wait": ("Fault", pb.FaultRequest(start=BASE, end=BASE + PAGE, wait_s=float("nan"))),
    "negative wait": ("Fault", pb.FaultRequest(start=BASE, end=BASE + PAGE, wait_s=-1)),
    "snapshot of nothing": ("Snapshot", pb.SnapshotRequest(mm=99, start=BASE, end=BASE + PAGE)),
    "snapshot unaligned": ("Snapshot", pb.SnapshotRequest(mm=1, start=BASE + 1, end=BASE + PAGE)),
    "snapshot too long": ("Snapshot", pb.SnapshotRequest(mm=1, start=0, end=1 << 46)),
    "pin unaligned": ("Pin", pb.PinRequest(start=BASE + 1, end=BASE + PAGE)),
    "pin not mapped": ("Pin", pb.PinRequest(start=PAGE, end=2 * PAGE)),
    "unpin": ("Unpin", pb.UnpinRequest(pin=99)),
    "read too long": ("DmaRead", pb.DmaReadRequest(addr=BASE, length=2**32 - 1)),
    "read without pfns": ("DmaRead", pb.DmaReadRequest(addr=BASE, length=1)),
    "read with too many": ("DmaRead", pb.DmaReadRequest(addr=BASE, length=1, pfns=[1, 2], generations=[1, 2])),
    "read unequal": ("DmaRead", pb.DmaReadRequest(addr=BASE, length=1, pfns=[1], generations=[])),
    "read of no such frame": ("DmaRead", pb.DmaReadRequest(addr=BASE, length=1, pfns=[2**63], generations=[0])),
    "read at the end": ("DmaRead", pb.DmaReadRequest(addr=2**64 - 1, length=2, pfns=[1, 1], generations=[1, 1])),
    "write without pfns": ("DmaWrite", pb.DmaWriteRequest(addr=BASE, data=b"x")),
    "write never held": ("DmaWrite", pb.DmaWriteRequest(addr=BASE, data=b"x", pfns=[1], generations=[0])),
    "dma through no pin": ("DmaRead", pb.DmaReadRequest(length=1, pfns=[1], generations=[0], pin=99)),
    "export through a list": ("Export", pb.ExportRequest(mm=1, start=BASE, end=BASE + PAGE)),
    "unexport of nothing": ("Unexport", pb.UnexportRequest(registration=99, pfns=[1])),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_requests_unary_and_pipelined_say_the_same(peer, case: str) -> None:
    method, request = BAD[case]
    mm, attached, registration = await device(peer)
    assert mm == 1
    if "registration" in request.DESCRIPTOR.fields_by_name and not request.registration:
        request.registration = registration
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(peer.devices, method)(request, metadata=attached.metadata)
    unary = caught.value
    assert unary.code() not in (S.UNKNOWN, S.INTERNAL), unary
    assert unary.details()
    field = "".join(f"_{c.lower()}" if c.isupper() else c for c in method).strip("_")
    stream = peer.devices.Access(metadata=attached.metadata)
    await stream.write(pb.AccessRequest(id=5, **{field: request}))
    answer = await stream.read()
    assert answer.id == 5
    assert (answer.error.code, answer.error.message) == (unary.code().value[0], unary.details())
    await stream.done_writing()
    assert await stream.code() is S.OK
    assert await peer.alive()


async def test_access_answers_in_the_order_in_which_they_end(peer) -> None:
    mm, attached, registration = await device(peer)
    stream = peer.devices.Access(metadata=attached.metadata)
    unmapping = asyncio.ensure_future(peer.spaces.Munmap(spaces_pb.MunmapRequest(mm=mm, addr=BASE, length=PAGE)))
    batch = await attached.notices()
    waits = pb.FaultRequest(registration=registration, start=BASE, end=BASE + PAGE, wait_s=5)
    goes = pb.FaultRequest(registration=registration, start=BASE + PAGE, end=BASE + 2 * PAGE)
    await stream.write(pb.AccessRequest(id=1, fault=waits))
    await stream.write(pb.AccessRequest(id=2, fault=goes))
    await stream.write(pb.AccessRequest(id=3))
    answers = [await stream.read(), await stream.read()]
    assert [(each.id, each.error.reason) for each in answers] == [(2, ""), (3, "EINVAL")]
    await attached.ack(batch.first_seq)
    await unmapping
    answer = await stream.read()
    assert (answer.id, answer.error.reason) == (1, "EFAULT")  # it is gone for good by now
    await stream.done_writing()
    assert await stream.code() is S.OK


async def test_access_with_garbage_or_without_a_session(peer) -> None:
    _, attached, _ = await device(peer)
    stream = peer.channel.stream_stream("/mmu.v1.DeviceService/Access")(metadata=attached.metadata)
    await stream.write(b"\xff\xff")
    assert await stream.code() is S.INVALID_ARGUMENT
    assert await peer.devices.Access().code() is S.PERMISSION_DENIED


async def test_session_that_is_fenced_meanwhile(peer, server) -> None:
    _, attached, registration = await device(peer)
    stream = peer.devices.Access(metadata=attached.metadata)
    await stream.write(pb.AccessRequest(id=0))
    assert (await stream.read()).error.reason == "EINVAL"
    await attached.send(hello=session_pb2.Hello(version=1))  # breaks the protocol
    await attached.ends_with(S.INVALID_ARGUMENT, "PROTOCOL_VIOLATION")
    fault = pb.FaultRequest(registration=registration, start=BASE, end=BASE + PAGE)
    await stream.write(pb.AccessRequest(id=1, fault=fault))
    answer = await stream.read()
    assert (answer.error.code, answer.error.reason) == (S.FAILED_PRECONDITION.value[0], "FENCED")
