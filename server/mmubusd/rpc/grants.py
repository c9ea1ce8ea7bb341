"""Giving and taking roles while the server runs: owners on what is theirs, administrators on everything.

    alice owns mm 3              Grant(mm 3, token:bob, [ATTACH, ACCESS])      bob registers, faults, …
                                 Revoke(mm 3, token:bob)                       bob's session is fenced; then the answer

A revocation is over when it is answered: calls that come later are refused, and a session that stood on the role is
fenced, so that no translation of the address space is with somebody who may not have it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from mmu.v1 import authority_pb2 as pb

from mmubusd.notify import RequestError, State
from mmubusd.rpc.authority import Kind, Thing
from mmubusd.rpc.driver import Driver
from mmubusd.rpc.methods import Context
from mmubusd.rpc.roles import Role

__all__ = ["AuthorityService", "fence_the_dispossessed"]

ROLES = {
    pb.ROLE_OBSERVE: Role.OBSERVE,
    pb.ROLE_ATTACH: Role.ATTACH,
    pb.ROLE_ACCESS: Role.ACCESS,
    pb.ROLE_OWN: Role.OWN,
    pb.ROLE_ADMINISTER: Role.ADMINISTER,
}
PRINCIPAL = re.compile(r"(token|cert|unix):.{1,255}", re.DOTALL)

Request = pb.GrantRequest | pb.RevokeRequest | pb.ListGrantsRequest


class AuthorityService:
    """Implements mmu.v1.AuthorityService."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._authority = driver.authority

    async def grant(self, request: pb.GrantRequest, context: Context) -> pb.GrantResponse:
        thing = self._thing(request, context)
        roles = _roles(request.roles)
        if not roles:
            raise RequestError("EINVAL", "roles: which ones?")
        self._authority.give(thing, _principal(request.principal), roles)
        self._tell("roles were granted", thing, request.principal, roles, context)
        return pb.GrantResponse()

    async def revoke(self, request: pb.RevokeRequest, context: Context) -> pb.RevokeResponse:
        thing = self._thing(request, context)
        roles = _roles(request.roles)
        remaining = self._authority.take(thing, _principal(request.principal), roles)
        fenced = fence_the_dispossessed(self._driver)
        self._tell("roles were revoked", thing, request.principal, roles, context)
        return pb.RevokeResponse(remaining=_messages([remaining]), fenced=fenced)

    async def list_grants(self, request: pb.ListGrantsRequest, context: Context) -> pb.ListGrantsResponse:
        thing = self._thing(request, context)
        response = pb.ListGrantsResponse()
        owner = self._authority.owner(thing)
        if owner is not None:
            response.grants.add(principal=owner.name, roles=[pb.ROLE_OWN], because="made it")
        for principal, roles in self._authority.given(thing).items():
            response.grants.add(principal=principal, roles=_messages(roles), because="granted")
        for grant in self._authority.by_file(thing):
            response.grants.add(
                principal=grant.principal, roles=_messages([grant.roles]), because="by the file of roles"
            )
        return response

    async def who_am_i(self, request: pb.WhoAmIRequest, context: Context) -> pb.WhoAmIResponse:
        who = self._authority.caller(context)
        return pb.WhoAmIResponse(principal=who.name, administers=self._authority.administers(who))

    def _thing(self, request: Request, context: Context) -> Thing:
        """On what, after it is certain that the caller may speak of it. Raises: MmError, RequestError."""
        if self._authority.open:
            raise RequestError(
                "EOPNOTSUPP",
                "this server asks nobody who calls: everybody may do everything (tokens, tls_client_ca)",
            )
        if bool(request.mm) == bool(request.file):
            raise RequestError("EINVAL", "one of mm and file says on what, not both or none")
        kind: Kind = "mm" if request.mm else "file"
        thing = (kind, request.mm or request.file)
        self._authority.check(self._authority.caller(context), Role.OWN, thing)
        return thing

    def _tell(self, event: str, thing: Thing, principal: str, roles: Collection[Role], context: Context) -> None:
        kind, number = thing
        self._driver.log.info(
            event, **{kind: number}, principal=principal, roles=[str(role.name).lower() for role in roles] or "all",
            by=self._authority.caller(context).name,
        )  # fmt: skip


def fence_the_dispossessed(driver: Driver) -> int:
    """Fence each session whose principal may no longer do what it stands for. Returns: how many there were."""
    standing = [session for session in driver.bus.sessions.values() if session.state in (State.LIVE, State.LOST)]
    lost = [session for session in standing if driver.authority.lost_rights(session)]
    for session in lost:
        driver.bus.fence(session, driver.now(), "its principal has lost its rights")
    driver.pump()
    return len(lost)


def _principal(text: str) -> str:
    if not PRINCIPAL.fullmatch(text) or not text.isprintable():
        raise RequestError("EINVAL", f"principal {text[:40]!r} is none; write token:NAME, cert:NAME or unix:USER")
    return text


def _roles(numbers: Collection[int]) -> list[Role]:
    for number in numbers:
        if number not in ROLES:
            raise RequestError("EINVAL", f"roles: {number} is no Role")
        if number == pb.ROLE_ADMINISTER:
            raise RequestError("EPERM", "administer is not granted on a thing; the server's file of roles gives it")
    return [ROLES[number] for number in numbers]  # type: ignore[index]


def _messages(roles: Collection[Role]) -> list[pb.Role.ValueType]:
    """The contract's names; a role that another one holds is not named beside it."""
    together = Role.NONE
    for role in roles:
        together |= role
    for message in (pb.ROLE_ADMINISTER, pb.ROLE_OWN):
        if together & ROLES[message] == ROLES[message]:
            return [message]
    return [message for message in (pb.ROLE_OBSERVE, pb.ROLE_ATTACH, pb.ROLE_ACCESS) if together & ROLES[message]]
