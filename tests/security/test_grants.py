"""Roles that owners give and take while the server runs, and what mallory makes of them."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import grpc
import mmubus
import pytest
from mmu.v1 import address_space_pb2 as space_pb2
from mmu.v1 import authority_pb2 as pb
from mmu.v1 import device_pb2, inspection_pb2, session_pb2
from mmubus.cli import main
from mmubusd.rpc import EmbeddedServer
from mmubusd.rpc.authority import GIVEN_MAX
from mmubusd.rpc.reload import reload

from .conftest import BASE, PAGE, TOKENS, Caller, read, refused

Code = grpc.StatusCode
OBSERVE, ATTACH, ACCESS, OWN = pb.ROLE_OBSERVE, pb.ROLE_ATTACH, pb.ROLE_ACCESS, pb.ROLE_OWN


async def grant(who: Caller, mm: int, to: str, *roles: int) -> None:
    await who.call("authority", "Grant", pb.GrantRequest(mm=mm, principal=f"token:{to}", roles=roles))


async def revoke(who: Caller, mm: int, of: str, *roles: int) -> pb.RevokeResponse:
    return await who.call("authority", "Revoke", pb.RevokeRequest(mm=mm, principal=f"token:{of}", roles=roles))


def load(mm: int) -> space_pb2.LoadRequest:
    return space_pb2.LoadRequest(mm=mm, addr=BASE, length=6)


async def test_a_role_is_given_used_and_taken(caller) -> None:
    """mallory is let in, one role at a time; when they are taken nothing of what she had is left to her."""
    alice, mallory = caller("alice"), caller("mallory")
    mm = await alice.space("alices")
    maps = inspection_pb2.ShowMapsRequest(mm=mm)
    await grant(alice, mm, "mallory", OBSERVE)
    assert (await mallory.call("inspection", "ShowMaps", maps)).mappings
    await mallory.attach()
    assert (await mallory.register(mm)).rejected.error.errno == "EACCES"
    await grant(alice, mm, "mallory", ATTACH)
    number = (await mallory.register(mm)).registered.registration
    fault = device_pb2.FaultRequest(registration=number, start=BASE, end=BASE + PAGE)
    await refused(mallory.call("devices", "Fault", fault), Code.PERMISSION_DENIED, "EACCES")
    await grant(alice, mm, "mallory", ACCESS)
    held = (await mallory.call("devices", "Fault", fault)).translations
    await refused(mallory.call("spaces", "Load", load(mm)), Code.PERMISSION_DENIED, "EACCES")
    response = await revoke(alice, mm, "mallory", ACCESS)
    assert (list(response.remaining), response.fenced) == ([OBSERVE, ATTACH], 0)
    reading = device_pb2.DmaReadRequest(
        registration=number, addr=BASE, length=6, pfns=held.pfns, generations=held.generations
    )
    await refused(mallory.call("devices", "DmaRead", reading), Code.PERMISSION_DENIED, "EACCES")
    response = await revoke(alice, mm, "mallory")
    assert (list(response.remaining), response.fenced) == ([], 1)
    assert "lost its rights" in (await read(mallory.streams[-1])).fenced.message
    mallory.session = ""
    await refused(mallory.call("inspection", "ShowMaps", maps), Code.NOT_FOUND, "ESRCH")
    await alice.call("spaces", "Munmap", space_pb2.MunmapRequest(mm=mm, addr=BASE, length=PAGE))  # nobody is waited for


async def test_who_has_some_role_cannot_give_itself_more(caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    mm = await alice.space("alices")
    await grant(alice, mm, "mallory", OBSERVE, ATTACH, ACCESS)
    mine = pb.GrantRequest(mm=mm, principal="token:mallory", roles=[OWN])
    others = pb.GrantRequest(mm=mm, principal="token:driver", roles=[OBSERVE])
    for request in (mine, others):
        await refused(mallory.call("authority", "Grant", request), Code.PERMISSION_DENIED, "EACCES")
    look = pb.ListGrantsRequest(mm=mm)
    await refused(mallory.call("authority", "ListGrants", look), Code.PERMISSION_DENIED, "EACCES")
    take = pb.RevokeRequest(mm=mm, principal="token:alice")
    await refused(mallory.call("authority", "Revoke", take), Code.PERMISSION_DENIED, "EACCES")
    await refused(mallory.call("spaces", "Load", load(mm)), Code.PERMISSION_DENIED, "EACCES")


async def test_an_owner_by_grant_cannot_drive_out_who_made_it(caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    mm = await alice.space("alices")
    await grant(alice, mm, "mallory", OWN)
    assert (await mallory.call("spaces", "Load", load(mm))).data == b"secret"
    assert list((await revoke(mallory, mm, "alice")).remaining) == [OWN]
    assert (await alice.call("spaces", "Load", load(mm))).data == b"secret"
    # One of the roles that owning holds cannot be taken out of it; owning itself can.
    assert list((await revoke(alice, mm, "mallory", OBSERVE)).remaining) == [OWN]
    await revoke(alice, mm, "mallory", OWN)
    await refused(mallory.call("spaces", "Load", load(mm)), Code.NOT_FOUND, "ESRCH")


@pytest.mark.parametrize(
    ("fields", "code", "why"),
    [
        ({"principal": "token:*", "roles": [OBSERVE]}, None, ""),  # no pattern: a principal of that very name
        ({"principal": "mallory", "roles": [OBSERVE]}, Code.INVALID_ARGUMENT, "EINVAL"),
        ({"principal": "", "roles": [OBSERVE]}, Code.INVALID_ARGUMENT, "EINVAL"),
        ({"principal": "local", "roles": [OBSERVE]}, Code.INVALID_ARGUMENT, "EINVAL"),
        ({"principal": "token:a\nb", "roles": [OBSERVE]}, Code.INVALID_ARGUMENT, "EINVAL"),
        ({"principal": "token:" + "n" * 256, "roles": [OBSERVE]}, Code.INVALID_ARGUMENT, "EINVAL"),
        ({"principal": "token:mallory", "roles": []}, Code.INVALID_ARGUMENT, "EINVAL"),
        ({"principal": "token:mallory", "roles": [0]}, Code.INVALID_ARGUMENT, "EINVAL"),
        ({"principal": "token:mallory", "roles": [17]}, Code.INVALID_ARGUMENT, "EINVAL"),
        ({"principal": "token:mallory", "roles": [pb.ROLE_ADMINISTER]}, Code.PERMISSION_DENIED, "EPERM"),
        ({"principal": "token:mallory", "roles": [OBSERVE], "file": 1}, Code.INVALID_ARGUMENT, "EINVAL"),
        ({"principal": "token:mallory", "roles": [OBSERVE], "mm": 0}, Code.INVALID_ARGUMENT, "EINVAL"),
    ],
)
async def test_what_cannot_be_granted(caller, fields: dict[str, object], code: Code | None, why: str) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    mm = await alice.space("alices")
    granting = alice.call("authority", "Grant", pb.GrantRequest(**{"mm": mm, **fields}))
    if code is None:
        await granting
    else:
        await refused(granting, code, why)
    await refused(
        mallory.call("inspection", "ShowMaps", inspection_pb2.ShowMapsRequest(mm=mm)), Code.NOT_FOUND, "ESRCH"
    )


async def test_exported_frames_are_given_back_with_the_role(caller) -> None:
    """An export is reached by frame and not by address space: only the fence takes it away."""
    alice, mallory = caller("alice"), caller("mallory")
    mm = await alice.space("alices")
    await grant(alice, mm, "mallory", ACCESS)
    await mallory.attach()
    await mallory.streams[-1].write(session_pb2.AttachRequest(request=1, register_rmap=session_pb2.RegisterRmap()))
    number = (await read(mallory.streams[-1])).registered.registration
    export = device_pb2.ExportRequest(registration=number, mm=mm, start=BASE, end=BASE + PAGE, write=True)
    held = (await mallory.call("devices", "Export", export)).translations
    reading = device_pb2.DmaReadRequest(registration=number, length=6, pfns=held.pfns, generations=held.generations)
    assert (await mallory.call("devices", "DmaRead", reading)).data == b"secret"
    assert (await revoke(alice, mm, "mallory")).fenced == 1
    await refused(mallory.call("devices", "DmaRead", reading), Code.FAILED_PRECONDITION, "FENCED")


async def test_other_sessions_and_other_address_spaces_are_left_alone(caller) -> None:
    """Only what stood on the role is fenced: not another principal's session, and not one that has no part in it."""
    alice, mallory, driver = caller("alice"), caller("mallory"), caller("driver")
    mm, shared = await alice.space("alices"), await alice.space("shared-1")
    hers = await mallory.space("hers")
    for name in ("mallory", "driver"):
        await grant(alice, mm, name, ATTACH)
    other = caller("mallory")
    for who, target in ((mallory, mm), (other, hers), (driver, mm)):
        await who.attach()
        assert (await who.register(target)).registered.registration
    assert (await driver.register(shared)).registered.registration
    assert (await revoke(alice, mm, "mallory")).fenced == 1
    assert (await other.register(hers)).registered.registration
    assert (await driver.register(mm)).registered.registration
    # What the file of roles gives is not taken by Revoke, which says so.
    assert list((await revoke(alice, shared, "driver")).remaining) == [ATTACH, ACCESS]


async def test_an_address_space_that_has_ended_costs_nobody_its_session(server: EmbeddedServer, caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    mm, other = await alice.space("alices"), await alice.space("alices too")
    for one in (mm, other):
        await grant(alice, one, "mallory", ATTACH, ACCESS)
    await mallory.attach()
    assert (await mallory.register(other)).registered.registration
    await alice.call("spaces", "Exit", space_pb2.ExitRequest(mm=mm))
    await refused(alice.call("authority", "ListGrants", pb.ListGrantsRequest(mm=mm)), Code.NOT_FOUND, "ESRCH")
    assert reload(server.server, server.server.settings)
    assert (await mallory.register(other)).registered.registration


async def test_a_child_of_fork_has_no_grants(caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    mm = await alice.space("alices")
    await grant(alice, mm, "mallory", OBSERVE)
    child = (await alice.call("spaces", "Fork", space_pb2.ForkRequest(mm=mm))).child
    look = inspection_pb2.ShowMapsRequest(mm=child)
    await refused(mallory.call("inspection", "ShowMaps", look), Code.NOT_FOUND, "ESRCH")


async def test_files_are_granted_too(caller) -> None:
    alice, mallory = caller("alice"), caller("mallory")
    file = (await alice.call("files", "OpenFile", space_pb2.OpenFileRequest(name="f", kind=1, size=PAGE))).file
    reading = space_pb2.ReadFileRequest(file=file, length=6)
    await refused(mallory.call("files", "ReadFile", reading), Code.NOT_FOUND, "EBADF")
    for rpc, request in (
        ("Grant", pb.GrantRequest(file=file, principal="token:mallory", roles=[OWN])),
        ("Revoke", pb.RevokeRequest(file=file, principal="token:alice")),
        ("ListGrants", pb.ListGrantsRequest(file=file)),
    ):
        await refused(mallory.call("authority", rpc, request), Code.NOT_FOUND, "EBADF")
    await alice.call("authority", "Grant", pb.GrantRequest(file=file, principal="token:mallory", roles=[OBSERVE]))
    assert (await mallory.call("files", "ReadFile", reading)).data == bytes(6)
    writing = space_pb2.WriteFileRequest(file=file, data=b"x")
    await refused(mallory.call("files", "WriteFile", writing), Code.PERMISSION_DENIED, "EACCES")
    await alice.call("authority", "Revoke", pb.RevokeRequest(file=file, principal="token:mallory"))
    await refused(mallory.call("files", "ReadFile", reading), Code.NOT_FOUND, "EBADF")


async def test_who_may_what_is_listed_for_owners_and_administrators(caller) -> None:
    alice, root = caller("alice"), caller("root")
    mm = await alice.space("shared-1")
    await grant(alice, mm, "mallory", OBSERVE, ATTACH)
    for who in (alice, root):
        found = (await who.call("authority", "ListGrants", pb.ListGrantsRequest(mm=mm))).grants
        assert [(one.principal, list(one.roles), one.because) for one in found] == [
            ("token:alice", [OWN], "made it"),
            ("token:mallory", [OBSERVE, ATTACH], "granted"),
            ("token:driver", [ATTACH, ACCESS], "by the file of roles"),
        ]
    await grant(root, mm, "bob", OWN)  # administrators may give on everything


async def test_there_is_a_bound_on_grants(server: EmbeddedServer, caller) -> None:
    alice = caller("alice")
    mm = await alice.space("alices")
    await asyncio.gather(*(grant(alice, mm, f"n{n}", OBSERVE) for n in range(GIVEN_MAX)))
    one_more = pb.GrantRequest(mm=mm, principal="token:more", roles=[OBSERVE])
    text = await refused(alice.call("authority", "Grant", one_more), Code.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
    assert str(GIVEN_MAX) in text
    await grant(alice, mm, "n7", ACCESS)  # who has one may have more
    await alice.call("spaces", "Exit", space_pb2.ExitRequest(mm=mm))
    other = await alice.space("another")
    await grant(alice, other, "bob", OBSERVE)
    assert len(server.server.driver.authority._given) == 1  # what is gone is forgotten


async def test_grants_are_logged_with_who_did_it(caller, log: io.StringIO) -> None:
    alice = caller("alice")
    mm = await alice.space("alices")
    await grant(alice, mm, "bob", OBSERVE)
    await revoke(alice, mm, "bob")
    assert '"principal": "token:bob", "roles": ["observe"], "by": "token:alice"' in log.getvalue()
    assert '"principal": "token:bob", "roles": "all", "by": "token:alice"' in log.getvalue()


async def test_who_am_i(caller) -> None:
    for name, administers in (("alice", False), ("root", True)):
        found = await caller(name).call("authority", "WhoAmI", pb.WhoAmIRequest())
        assert (found.principal, found.administers) == (f"token:{name}", administers)


async def test_a_server_that_asks_nobody_says_so() -> None:
    async with EmbeddedServer(frames_nr=64) as server, mmubus.connect(server.address) as bus:
        assert await bus.whoami() == mmubus.WhoAmI("local", True)
        mm = await bus.create_mm("x")
        with pytest.raises(mmubus.MmuBusError, match="asks nobody who calls"):
            await mm.grant("token:bob", mmubus.Role.OBSERVE)


async def test_the_library_and_the_command_line(server: EmbeddedServer, tmp_path: Path, capsys, monkeypatch) -> None:
    async with mmubus.connect(server.address, token=TOKENS["alice"]) as bus:
        assert (await bus.whoami()).principal == "token:alice"
        mm = await bus.create_mm("alices")
        await mm.grant("token:bob", mmubus.Role.ATTACH, mmubus.Role.ACCESS)
        bob = mmubus.Grant("token:bob", (mmubus.Role.ATTACH, mmubus.Role.ACCESS), "granted")
        assert (await mm.grants())[1] == bob
        assert await mm.revoke("token:bob", mmubus.Role.ACCESS) == (mmubus.Role.ATTACH,)
        file = await bus.open_file("f", size=PAGE)
        await file.grant("token:bob", mmubus.Role.OBSERVE)
        assert [one.principal for one in await file.grants()] == ["token:alice", "token:bob"]
        assert await file.revoke("token:bob") == ()
        (tmp_path / "alice.token").write_text(TOKENS["alice"])
        monkeypatch.setenv("MMUBUS_TOKEN_FILE", str(tmp_path / "alice.token"))
        for command, says in (
            (["whoami"], "token:alice"),
            (["mm", "grant", str(mm.id), "token:carol", "observe", "attach"], ""),
            (["mm", "grants", str(mm.id)], "token:carol"),
            (["mm", "revoke", str(mm.id), "token:carol"], ""),
        ):
            assert await asyncio.to_thread(main, [*command, "--server", server.address]) == 0
            assert says in capsys.readouterr().out
        assert [one.principal for one in await mm.grants()] == ["token:alice", "token:bob"]
    assert await asyncio.to_thread(synchronously, server.address) == [
        ("token:alice", "made it"),
        ("token:x", "granted"),
    ]


def synchronously(address: str) -> list[tuple[str, str]]:
    with mmubus.sync.connect(address, token=TOKENS["alice"]) as bus:
        assert bus.whoami().principal == "token:alice"
        mm, file = bus.create_mm("more"), bus.open_file("more", size=PAGE)
        for thing in (mm, file):
            thing.grant("token:x", mmubus.Role.OBSERVE)
            assert thing.revoke("token:x") == ()
            thing.grant("token:x", mmubus.Role.OBSERVE)
        assert mm.grants() != []
        return [(one.principal, one.because) for one in file.grants()]
