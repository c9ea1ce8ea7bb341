"""Who may do what: roles that an owner gives on an address space or a file, and takes away again.

    await mm.grant("token:bob", Role.ATTACH, Role.ACCESS)   # bob's drivers may register on it and reach its memory
    await mm.revoke("token:bob")                            # his sessions that stand on it have been fenced

Principals are written `token:NAME`, `cert:NAME` or `unix:USER`; `Bus.whoami` says which one a connection is.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from mmu.v1 import authority_pb2 as pb

from mmubus.channel import unary

if TYPE_CHECKING:
    from mmubus.connection import Bus

__all__ = ["Grant", "Grants", "Owned", "Role", "WhoAmI"]


class Role(enum.StrEnum):
    """What somebody may do with an address space or a file. OWN holds the three above it, ADMINISTER everything."""

    OBSERVE = "observe"
    ATTACH = "attach"
    ACCESS = "access"
    OWN = "own"
    ADMINISTER = "administer"


@dataclass(frozen=True, slots=True)
class Grant:
    """Roles of a principal (or of a pattern, by the server's file), and why it has them."""

    principal: str
    roles: tuple[Role, ...]
    because: str


@dataclass(frozen=True, slots=True)
class WhoAmI:
    """Whom the server takes a connection for."""

    principal: str
    administers: bool


class Grants:
    """The roles on one address space or file."""

    def __init__(self, bus: Bus, *, mm: int = 0, file: int = 0) -> None:
        self._stub = bus.stubs.authority
        self._mm, self._file = mm, file

    async def grant(self, principal: str, roles: Iterable[Role]) -> None:
        """Give roles. Raises: MmError ESRCH, EACCES, EINVAL."""
        request = pb.GrantRequest(mm=self._mm, file=self._file, principal=principal, roles=_numbers(roles))
        await unary(self._stub.Grant(request))

    async def revoke(self, principal: str, roles: Iterable[Role] = ()) -> tuple[Role, ...]:
        """Take roles away, none named: all. Returns: what remains by other grants. Raises: as grant."""
        request = pb.RevokeRequest(mm=self._mm, file=self._file, principal=principal, roles=_numbers(roles))
        return _roles((await unary(self._stub.Revoke(request))).remaining)

    async def list(self) -> list[Grant]:
        """Who has which roles. Raises: as grant."""
        response = await unary(self._stub.ListGrants(pb.ListGrantsRequest(mm=self._mm, file=self._file)))
        return [Grant(one.principal, _roles(one.roles), one.because) for one in response.grants]


class Owned:
    """What has an owner, who gives roles on it and takes them away."""

    _grants: Grants

    async def grant(self, principal: str, *roles: Role) -> None:
        """Give somebody roles on it. Args: principal: `token:NAME`, `cert:NAME` or `unix:USER`. Raises: MmError."""
        await self._grants.grant(principal, roles)

    async def revoke(self, principal: str, *roles: Role) -> tuple[Role, ...]:
        """Take roles away, none named: all. What stood on them has been fenced when this returns.

        Returns: what the principal may do all the same, by the server's file of roles. Raises: MmError.
        """
        return await self._grants.revoke(principal, roles)

    async def grants(self) -> list[Grant]:
        """Who has which roles on it. Raises: MmError."""
        return await self._grants.list()


def _numbers(roles: Iterable[Role]) -> list[pb.Role.ValueType]:
    return [pb.Role.Value(f"ROLE_{Role(role).name}") for role in roles]


def _roles(numbers: Iterable[int]) -> tuple[Role, ...]:
    names = (pb.Role.Name(cast("pb.Role.ValueType", number)) for number in numbers)
    return tuple(Role[name.removeprefix("ROLE_")] for name in names)
