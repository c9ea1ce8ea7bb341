"""What mallory tries: she has a token of her own, and wants what is alice's."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from mmu.v1 import address_space_pb2 as space_pb2
from mmu.v1 import authority_pb2, device_pb2, inspection_pb2, session_pb2
from mmubusd.rpc import EmbeddedServer
from mmubusd.rpc.reload import reload
from patience import LIMIT_S

from .conftest import BASE, PAGE, TOKENS, Caller, metadata, read, reason, refused, token_lines

Code = grpc.StatusCode
UNARY = [
    ("spaces", "Mmap", lambda mm: space_pb2.MmapRequest(mm=mm, length=PAGE, prot=3, flags=0x22)),
    ("spaces", "Munmap", lambda mm: space_pb2.MunmapRequest(mm=mm, addr=BASE, length=PAGE)),
    ("spaces", "Mprotect", lambda mm: space_pb2.MprotectRequest(mm=mm, addr=BASE, length=PAGE, prot=1)),
    ("spaces", "Mremap", lambda mm: space_pb2.MremapRequest(mm=mm, addr=BASE, old_length=PAGE, new_length=2 * PAGE)),
    ("spaces", "Madvise", lambda mm: space_pb2.MadviseRequest(mm=mm, addr=BASE, length=PAGE, advice=4)),
    ("spaces", "Brk", lambda mm: space_pb2.BrkRequest(mm=mm, addr=0)),
    ("spaces", "Fork", lambda mm: space_pb2.ForkRequest(mm=mm)),
    ("spaces", "Exit", lambda mm: space_pb2.ExitRequest(mm=mm)),
    ("spaces", "Load", lambda mm: space_pb2.LoadRequest(mm=mm, addr=BASE, length=6)),
    ("spaces", "Store", lambda mm: space_pb2.StoreRequest(mm=mm, addr=BASE, data=b"overwritten")),
    ("inspection", "ShowMaps", lambda mm: inspection_pb2.ShowMapsRequest(mm=mm)),
    ("inspection", "ShowPagemap", lambda mm: inspection_pb2.ShowPagemapRequest(mm=mm)),
    ("inspection", "ExplainPage", lambda mm: inspection_pb2.ExplainPageRequest(mm=mm, address=BASE)),
    ("inspection", "ListHolders", lambda mm: inspection_pb2.ListHoldersRequest(mm=mm)),
    ("authority", "Grant", lambda mm: authority_pb2.GrantRequest(mm=mm, principal="token:mallory", roles=[4])),
    ("authority", "Revoke", lambda mm: authority_pb2.RevokeRequest(mm=mm, principal="token:alice")),
    ("authority", "ListGrants", lambda mm: authority_pb2.ListGrantsRequest(mm=mm)),
    ("inspection", "DryRun", lambda mm: inspection_pb2.DryRunRequest(mm=mm, start=BASE, end=BASE + PAGE)),
]
ELSEWHERE = {"Snapshot", "Export"}
"""Have tests of their own below: they need a session."""
NOBODYS = 987_654


@pytest.mark.parametrize(("service", "rpc", "request_of"), UNARY, ids=[rpc for _, rpc, _ in UNARY])
async def test_guessed_ids_answer_as_if_there_were_nothing(caller, service, rpc, request_of) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    mm = await alice.space("alices")
    there = await refused(mallory.call(service, rpc, request_of(mm)), Code.NOT_FOUND, "ESRCH")
    nowhere = await refused(mallory.call(service, rpc, request_of(NOBODYS)), Code.NOT_FOUND, "ESRCH")
    assert there.replace(str(mm), "N") == nowhere.replace(str(NOBODYS), "N")
    loaded = await alice.call("spaces", "Load", space_pb2.LoadRequest(mm=mm, addr=BASE, length=6))
    assert loaded.data == b"secret"


def test_every_rpc_on_an_address_space_is_tried() -> None:
    """A new one that nobody has thought of shows up here."""
    found = {
        rpc.name
        for file in (space_pb2, device_pb2, inspection_pb2, session_pb2, authority_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for rpc in service.methods
        if not rpc.client_streaming and "mm" in rpc.input_type.fields_by_name
    }
    assert found == {rpc for _, rpc, _ in UNARY} | ELSEWHERE


FILES = {
    space_pb2.OP_FSYNC, space_pb2.OP_FTRUNCATE, space_pb2.OP_PUNCH, space_pb2.OP_WP_SHARED, space_pb2.OP_CLEAN_RECORD
}  # fmt: skip
"""Calls on files alone."""
MACHINE = {
    space_pb2.OP_KSM_SCAN, space_pb2.OP_UPROBE_REGISTER, space_pb2.OP_UPROBE_UNREGISTER, space_pb2.OP_OFFLINE_PAGE,
    space_pb2.OP_KHUGEPAGED_SCAN,
}  # fmt: skip
"""Calls that are the whole machine's, whatever they name."""


@pytest.mark.parametrize("op", sorted(set(space_pb2.Op.values()) - {0}), ids=space_pb2.Op.Name)
async def test_guessed_ids_on_call_and_operate(caller, op: int) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    mm = await alice.space("alices")
    file = (await alice.call("files", "OpenFile", space_pb2.OpenFileRequest(name="f", kind=1, size=PAGE))).file
    stream = grpc_operate(mallory)
    answers = []
    for target, first in ((mm, file), (NOBODYS, NOBODYS)):
        on_file = op in FILES
        args = [first, PAGE, PAGE] if on_file else [BASE, PAGE, 3, 0x22, 0, 0]
        call = space_pb2.Call(id=1, op=op, mm=0 if on_file else target, args=args, data=b"x")
        single = (await mallory.call("spaces", "Call", space_pb2.CallRequest(call=call))).result
        await stream.write(space_pb2.OperateRequest(calls=[call]))
        (piped,) = (await stream.read()).results
        assert (single.error.errno, single.error.message) == (piped.error.errno, piped.error.message)
        if op in MACHINE:
            assert single.error.errno == "EPERM"
        else:
            assert single.error.errno in ("ESRCH", "EBADF")
        answers.append(single.error.message.replace(str(target), "N").replace(str(first), "N"))
    assert answers[0] == answers[1]
    stream.cancel()


@pytest.mark.parametrize("advice", [100, 101])
async def test_taking_frames_out_of_use_is_for_administrators_on_ones_own_memory_too(caller, advice: int) -> None:
    alice, root = caller("alice"), caller("root")
    mm = await alice.space("alices")
    for number in (advice, advice + (1 << 32)):  # of which an int is the lower half
        call = space_pb2.Call(id=1, op=space_pb2.OP_MADVISE, mm=mm, args=[BASE, PAGE, number])
        assert (await alice.call("spaces", "Call", space_pb2.CallRequest(call=call))).result.error.errno == "EPERM"
    madvise = space_pb2.MadviseRequest(mm=mm, addr=BASE, length=PAGE, advice=advice)
    await refused(alice.call("spaces", "Madvise", madvise), grpc.StatusCode.PERMISSION_DENIED, "EPERM")
    store = space_pb2.StoreRequest(mm=mm, addr=BASE, data=b"x")
    await alice.call("spaces", "Store", store)
    await root.call("spaces", "Madvise", madvise)
    assert (await root.call("inspection", "GetStatistics", inspection_pb2.GetStatisticsRequest())).frames_failed == 1


async def test_moving_what_others_map_too_is_for_administrators_on_ones_own_memory_too(caller) -> None:
    alice, root = caller("alice"), caller("root")
    mm = await alice.space("alices")
    store = space_pb2.StoreRequest(mm=mm, addr=BASE, data=b"x")
    await alice.call("spaces", "Store", store)
    for flags, errno in ((2, ""), (4, "EPERM"), (6, "EPERM")):  # MPOL_MF_MOVE, MPOL_MF_MOVE_ALL
        call = space_pb2.Call(id=1, op=space_pb2.OP_MBIND, mm=mm, args=[BASE, PAGE, 0, 0, flags])
        assert (await alice.call("spaces", "Call", space_pb2.CallRequest(call=call))).result.error.errno == errno
        assert (await root.call("spaces", "Call", space_pb2.CallRequest(call=call))).result.error.errno == ""


def grpc_operate(who: Caller) -> grpc.aio.StreamStreamCall:
    from mmu.v1 import address_space_pb2_grpc

    return address_space_pb2_grpc.AddressSpaceServiceStub(who.channel).Operate(metadata=who.metadata)


async def test_lists_show_nothing_of_others(caller) -> None:
    alice, mallory, root = caller("alice"), caller("mallory"), caller("root")
    mm = await alice.space("alices")
    await alice.call("files", "OpenFile", space_pb2.OpenFileRequest(name="alices file", kind=1, size=PAGE))
    await alice.attach("alices driver")
    assert (await alice.register(mm)).WhichOneof("message") == "registered"
    spaces, sessions = inspection_pb2.ListAddressSpacesRequest(), inspection_pb2.ListSessionsRequest()
    rounds, files = inspection_pb2.ListRoundsRequest(ended=100), space_pb2.ListFilesRequest()
    unmapping = asyncio.ensure_future(
        alice.call("spaces", "Munmap", space_pb2.MunmapRequest(mm=mm, addr=BASE, length=PAGE))
    )
    batch = (await read(alice.streams[-1])).notices
    assert not (await mallory.call("inspection", "ListAddressSpaces", spaces)).address_spaces
    assert not (await mallory.call("inspection", "ListSessions", sessions)).sessions
    assert not (await mallory.call("inspection", "ListRounds", rounds)).rounds
    assert not (await mallory.call("files", "ListFiles", files)).files
    await refused(
        mallory.call("inspection", "GetStatistics", inspection_pb2.GetStatisticsRequest()),
        Code.PERMISSION_DENIED, "EPERM",
    )  # fmt: skip
    for who in (alice, root):
        (seen,) = (await who.call("inspection", "ListAddressSpaces", spaces)).address_spaces
        assert (seen.name, seen.owner) == ("alices", "token:alice")
        assert len((await who.call("inspection", "ListRounds", rounds)).rounds) == 1
        assert len((await who.call("inspection", "ListSessions", sessions)).sessions) == 1
        assert len((await who.call("files", "ListFiles", files)).files) == 1
    number = (await alice.call("inspection", "ListRounds", rounds)).rounds[0].round
    explain = inspection_pb2.ExplainRoundRequest(round=number)
    assert (await alice.call("inspection", "ExplainRound", explain)).story
    await refused(mallory.call("inspection", "ExplainRound", explain), Code.NOT_FOUND, "NO_SUCH_ROUND")
    violations = inspection_pb2.ListViolationsRequest(count=10)
    assert not (await mallory.call("inspection", "ListViolations", violations)).violations
    through = batch.first_seq + len(batch.notices) - 1
    await alice.streams[-1].write(session_pb2.AttachRequest(acknowledge=session_pb2.Acknowledge(through=through)))
    await unmapping


async def test_another_ones_address_space_cannot_be_attached_to(caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    mm = await alice.space("alices")
    await mallory.attach("mallory")
    there = (await mallory.register(mm)).rejected.error
    nowhere = (await mallory.register(NOBODYS)).rejected.error
    assert (there.errno, nowhere.errno) == ("ESRCH", "ESRCH")
    assert there.message.replace(str(mm), "N") == nowhere.message.replace(str(NOBODYS), "N")


async def test_another_ones_session_token_is_worth_nothing(caller) -> None:
    """Stolen out of a client's memory, say: the session belongs to its principal."""
    alice, mallory = caller("alice"), caller("mallory")
    mm = await alice.space("alices")
    stolen = (await alice.attach("alice")).token
    number = (await alice.register(mm)).registered.registration
    mallory.session = stolen
    fault = device_pb2.FaultRequest(registration=number, start=BASE, end=BASE + PAGE)
    await refused(mallory.call("devices", "Fault", fault), Code.NOT_FOUND, "NO_SUCH_SESSION")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mallory.attach("mallory", token=stolen)
    assert reason(caught.value) == "NO_SUCH_SESSION"
    assert (await alice.call("devices", "Fault", fault)).translations.pfns  # and it goes on


async def test_anothers_registration_and_pin(caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    mm, hers = await alice.space("alices"), await mallory.space("hers")
    await alice.attach("alice")
    number = (await alice.register(mm)).registered.registration
    pin = device_pb2.PinRequest(registration=number, start=BASE, end=BASE + PAGE)
    pinned = await alice.call("devices", "Pin", pin)
    await mallory.attach("mallory")
    own = (await mallory.register(hers)).registered.registration
    for rpc, request in (
        ("Fault", device_pb2.FaultRequest(registration=number, start=BASE, end=BASE + PAGE)),
        ("Pin", pin),
        (
            "DmaRead",
            device_pb2.DmaReadRequest(
                registration=number, addr=BASE, length=6, pfns=pinned.translations.pfns,
                generations=pinned.translations.generations, pin=pinned.pin,
            ),
        ),
    ):  # fmt: skip
        await refused(mallory.call("devices", rpc, request), Code.NOT_FOUND, "NO_SUCH_REGISTRATION")
    await refused(
        mallory.call("devices", "Unpin", device_pb2.UnpinRequest(pin=pinned.pin)), Code.NOT_FOUND, "NO_SUCH_PIN"
    )
    # Her own registration, with alice's frame: what was not given out to it cannot be reached through it.
    forged = device_pb2.DmaReadRequest(
        registration=own, addr=BASE, length=6, pfns=pinned.translations.pfns,
        generations=pinned.translations.generations,
    )  # fmt: skip
    await refused(mallory.call("devices", "DmaRead", forged), Code.FAILED_PRECONDITION, "STALE_TRANSLATION")
    await mallory.streams[-1].write(
        session_pb2.AttachRequest(request=9, unregister=session_pb2.Unregister(registration=number))
    )
    assert not (await read(mallory.streams[-1])).unregistered.was_registered
    look = device_pb2.SnapshotRequest(mm=mm, start=BASE, end=BASE + PAGE)
    await refused(mallory.call("devices", "Snapshot", look), Code.NOT_FOUND, "ESRCH")


async def test_export_of_anothers_memory(caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    mm = await alice.space("alices")
    await mallory.attach("mallory")
    await mallory.streams[-1].write(session_pb2.AttachRequest(request=1, register_rmap=session_pb2.RegisterRmap()))
    number = (await read(mallory.streams[-1])).registered.registration
    request = device_pb2.ExportRequest(registration=number, mm=mm, start=BASE, end=BASE + PAGE, write=True)
    await refused(mallory.call("devices", "Export", request), Code.NOT_FOUND, "ESRCH")


async def test_files_of_others_cannot_be_read_mapped_cut_or_taken_by_name(caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    opened = await alice.call("files", "OpenFile", space_pb2.OpenFileRequest(name="keys", kind=1, size=2 * PAGE))
    write = space_pb2.WriteFileRequest(file=opened.file, data=b"secret")
    await alice.call("files", "WriteFile", write)
    mm = await mallory.space("hers")
    for service, rpc, request in (
        ("files", "ReadFile", space_pb2.ReadFileRequest(file=opened.file, length=6)),
        ("files", "WriteFile", write),
        ("files", "UnlinkFile", space_pb2.UnlinkFileRequest(file=opened.file)),
        ("spaces", "Mmap", space_pb2.MmapRequest(mm=mm, length=PAGE, prot=3, flags=1, file=opened.file)),
    ):
        await refused(mallory.call(service, rpc, request), Code.NOT_FOUND, "EBADF")
    initial = space_pb2.InitialMapping()
    initial.mapping.start, initial.mapping.end, initial.mapping.protection = BASE, BASE + PAGE, "rw-s"
    initial.mapping.file = opened.file
    await refused(mallory.call("spaces", "Create", space_pb2.CreateRequest(initial=[initial])), Code.NOT_FOUND, "EBADF")
    # The same name is another file: she does not even learn that it is taken.
    again = await mallory.call("files", "OpenFile", space_pb2.OpenFileRequest(name="keys", kind=1, size=PAGE))
    assert again.created
    assert again.file != opened.file
    read_back = await alice.call("files", "ReadFile", space_pb2.ReadFileRequest(file=opened.file, length=6))
    assert read_back.data == b"secret"


async def test_a_role_is_what_it_says_and_no_more(caller) -> None:
    """driver may attach to and access shared-*; it may not look, change or end it."""
    alice, driver = caller("alice"), caller("driver")
    mm, private = await alice.space("shared-1"), await alice.space("private")
    await driver.attach("driver")
    number = (await driver.register(mm)).registered.registration
    assert number
    assert (await driver.register(private)).rejected.error.errno == "ESRCH"
    fault = device_pb2.FaultRequest(registration=number, start=BASE, end=BASE + PAGE)
    assert (await driver.call("devices", "Fault", fault)).translations.pfns
    for rpc, request in (
        ("Munmap", space_pb2.MunmapRequest(mm=mm, addr=BASE, length=PAGE)),
        ("Exit", space_pb2.ExitRequest(mm=mm)),
        ("Load", space_pb2.LoadRequest(mm=mm, addr=BASE, length=6)),
    ):
        await refused(driver.call("spaces", rpc, request), Code.PERMISSION_DENIED, "EACCES")
    maps = inspection_pb2.ShowMapsRequest(mm=mm)
    await refused(driver.call("inspection", "ShowMaps", maps), Code.PERMISSION_DENIED, "EACCES")


async def test_a_child_belongs_to_who_forked(caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    mm = await alice.space("alices")
    child = (await alice.call("spaces", "Fork", space_pb2.ForkRequest(mm=mm, name="child"))).child
    call = space_pb2.Call(id=1, op=space_pb2.OP_FORK, mm=child)
    grandchild = (await alice.call("spaces", "Call", space_pb2.CallRequest(call=call))).result.ret
    for one in (child, grandchild):
        load = space_pb2.LoadRequest(mm=one, addr=BASE, length=6)
        assert (await alice.call("spaces", "Load", load)).data == b"secret"
        await refused(mallory.call("spaces", "Load", load), Code.NOT_FOUND, "ESRCH")


@pytest.mark.parametrize(
    "header",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer "),),
        (("authorization", "Bearer wrong"),),
        (("authorization", f"Basic {TOKENS['alice']}"),),
        (("authorization", f"Bearer {TOKENS['alice']}x"),),
        (("authorization", f"Bearer {TOKENS['alice'][:-1]}"),),
        (("authorization", "Bearer wrong"), ("authorization", f"Bearer {TOKENS['alice']}")),
        (("mmubus-session", "guessed"),),
    ],
)
async def test_without_the_token_there_is_no_way_in(server: EmbeddedServer, caller, header) -> None:
    """Every rpc of every service; the implementation is not reached. Health says its word to anybody."""
    stranger = caller(token="-")
    for file in (space_pb2, device_pb2, inspection_pb2, session_pb2, authority_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for rpc in service.methods:
                path = f"/{service.full_name}/{rpc.name}"
                if rpc.client_streaming:
                    call = stranger.channel.stream_stream(path)(metadata=header)
                    assert await asyncio.wait_for(call.code(), LIMIT_S) is Code.UNAUTHENTICATED, path
                    continue
                call = stranger.channel.unary_unary(path)(b"", metadata=header)
                await refused(call, Code.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert server.server.driver.tally.unauthenticated >= 30


async def test_tokens_that_were_taken_away_end_everything(server: EmbeddedServer, caller, secrets: Path) -> None:
    """Old streams, old sessions, old calls: nothing of what the token had begun goes on."""
    alice = caller("alice")
    mm = await alice.space("alices")
    await alice.attach("alice")
    assert (await alice.register(mm)).registered.registration
    stream = grpc_operate(alice)
    call = space_pb2.Call(id=1, op=space_pb2.OP_LOAD, mm=mm, args=[BASE, 6])
    await stream.write(space_pb2.OperateRequest(calls=[call]))
    assert (await stream.read()).results[0].data == b"secret"
    fresh = {**TOKENS, "alice": "another-0123456789abcdef0123456789abcdef"}
    (secrets / "tokens").write_text(token_lines(fresh))
    assert reload(server.server, server.server.settings)
    assert (await read(alice.streams[-1])).WhichOneof("message") == "fenced"
    await stream.write(space_pb2.OperateRequest(calls=[call]))
    (result,) = (await stream.read()).results
    assert (result.error.errno, result.data) == ("ESRCH", b"")
    load = space_pb2.LoadRequest(mm=mm, addr=BASE, length=6)
    await refused(alice.call("spaces", "Load", load), Code.UNAUTHENTICATED, "UNAUTHENTICATED")
    alice.token, alice.session = fresh["alice"], ""
    assert (await alice.call("spaces", "Load", load)).data == b"secret"  # hers, under whichever token
    stream.cancel()


async def test_a_role_that_was_taken_away_ends_its_registrations(server, caller, secrets: Path) -> None:
    alice, driver = caller("alice"), caller("driver")
    mm = await alice.space("shared-1")
    await driver.attach("driver")
    assert (await driver.register(mm)).registered.registration
    (secrets / "roles.toml").write_text("")
    assert reload(server.server, server.server.settings)
    assert (await read(driver.streams[-1])).fenced.message.count("lost its rights")
    await alice.call("spaces", "Munmap", space_pb2.MunmapRequest(mm=mm, addr=BASE, length=PAGE))  # nobody is waited for


async def test_files_that_cannot_be_read_change_nothing(server, caller, secrets: Path, log: io.StringIO) -> None:
    alice = caller("alice")
    (secrets / "tokens").write_text("alice:nonsense\n")
    assert not reload(server.server, server.server.settings)
    await alice.space("still hers")
    (secrets / "tokens").write_text(token_lines(TOKENS))
    (secrets / "tokens").chmod(0o666)
    assert not reload(server.server, server.server.settings)
    assert "can be written by others" in log.getvalue()
    assert "nonsense" not in log.getvalue()


async def test_the_frame_window_is_for_administrators(caller) -> None:
    alice, root = caller("alice"), caller("root")
    assert (await alice.attach("alice")).frames_path == ""
    assert (await root.attach("root")).frames_path != ""


async def test_a_flood_of_answers_that_nobody_reads_and_oversized_messages(server, caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    mm = await alice.space("alices")
    big = space_pb2.StoreRequest(mm=mm, addr=BASE, data=b"x" * (8 << 20))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mallory.call("spaces", "Store", big)
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    huge = space_pb2.CreateRequest(name="n" * 100_000)
    await refused(mallory.call("spaces", "Create", huge), Code.INVALID_ARGUMENT, "ENAMETOOLONG")
    header = (*metadata(TOKENS["mallory"]), ("x-junk", "j" * 100_000))
    with pytest.raises(grpc.aio.AioRpcError):
        await mallory.channel.unary_unary("/mmu.v1.InspectionService/ListSessions")(b"", metadata=header)
    load = space_pb2.LoadRequest(mm=mm, addr=BASE, length=6)
    assert (await alice.call("spaces", "Load", load)).data == b"secret"


async def test_reflection_shows_the_contract_only(caller) -> None:
    stranger = caller(token="-")
    call = reflection_pb2_grpc.ServerReflectionStub(stranger.channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert all(name.startswith(("mmu.v1.", "grpc.")) for name in names)
    await call.done_writing()


@pytest.mark.parametrize("options", [{"reflection": False}])
async def test_reflection_can_be_turned_off(caller) -> None:
    call = reflection_pb2_grpc.ServerReflectionStub(caller(token="-").channel).ServerReflectionInfo()
    assert await asyncio.wait_for(call.code(), LIMIT_S) is Code.UNIMPLEMENTED


@pytest.mark.parametrize("name", ["../../etc/passwd", "/dev/mem", "a\0b", "\x1b[2J", "..", "shared-*"])
async def test_names_are_names_and_never_paths(caller, tmp_path: Path, name: str, log: io.StringIO) -> None:
    mallory = caller("mallory")
    opened = await mallory.call("files", "OpenFile", space_pb2.OpenFileRequest(name=name, kind=1, size=PAGE))
    content = await mallory.call("files", "ReadFile", space_pb2.ReadFileRequest(file=opened.file, length=16))
    assert content.data == bytes(16)
    await mallory.attach(name)
    assert "\x1b" not in log.getvalue()
    assert len(log.getvalue().splitlines()) == log.getvalue().count("{")  # one line an event, whatever the name


async def test_secrets_are_never_in_the_log(server, caller, secrets: Path, log: io.StringIO) -> None:
    alice, stranger = caller("alice"), caller(token="wrong-token-of-a-stranger")
    session = (await alice.attach("alice")).token
    mm = await alice.space("alices")
    await alice.register(mm)
    with pytest.raises(grpc.aio.AioRpcError):
        await stranger.space()
    reload(server.server, server.server.settings)
    alice.streams[-1].cancel()
    await asyncio.sleep(0.05)
    await server.server.drain()
    text = log.getvalue()
    assert "session attached" in text
    lines = (secrets / "tokens").read_text().splitlines()
    for secret in (session, TOKENS["alice"], "wrong-token-of-a-stranger", *(line.split(":")[1] for line in lines)):
        assert secret not in text


async def test_session_tokens_cannot_be_guessed(caller) -> None:
    alice = caller("alice")
    tokens = {(await alice.attach(f"n{n}")).token for n in range(8)}
    assert len(tokens) == 8
    assert min(map(len, tokens)) >= 43  # 256 bits
    alice.session = ""
