"""Who may do what: roles on address spaces and files, owners, and the one place where both are asked for.

| role | may |
|---|---|
| own | every call on it, and everything below; who made it owns it |
| observe | see that it is there, its mappings, its pages' states, its rounds |
| attach | register notifiers on it |
| access | reach its memory as a device: fault, pin, DMA, export; of a file: read, write and map it |
| administer | everything, on everything, and what concerns the server as a whole |

Roles come from a TOML file, read again when it changes:

    [[grant]]
    principal = "cert:gpu-*"         # a pattern, as a shell's
    mm = "training-*"                # of names of address spaces; file = "..." is the same for files
    roles = ["attach", "access"]

What somebody has no role on does not exist for it: unknown and forbidden are answered alike. With no kind of
authentication configured everybody who reaches the server is `local`, and may do everything.
"""

from __future__ import annotations

import enum
import tomllib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mmubusd.mm.addr import FileId, MmId
from mmubusd.mm.errno import MmError
from mmubusd.mm.memory import Memory
from mmubusd.notify import RequestError, Session
from mmubusd.rpc.identity import LOCAL, Identities, Principal, SecurityFileError, read_private
from mmubusd.rpc.methods import Context
from mmubusd.rpc.owners import Owners

__all__ = ["Authority", "Grant", "Role", "read_grants"]


class Role(enum.IntFlag):
    """What may be done. OWN and ADMINISTER hold those below them."""

    NONE = 0
    OBSERVE = 1
    ATTACH = 2
    ACCESS = 4
    OWN = 8 | 7
    ADMINISTER = 16 | 15


ROLES = {
    "own": Role.OWN,
    "observe": Role.OBSERVE,
    "attach": Role.ATTACH,
    "access": Role.ACCESS,
    "administer": Role.ADMINISTER,
}
REMEMBERED_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Grant:
    """Roles of those principals on address spaces and files of those names; patterns, "" for none."""

    principal: str
    mm: str
    file: str
    roles: Role


def read_grants(path: Path) -> tuple[Grant, ...]:
    """Read a file of roles. Raises: SecurityFileError."""
    try:
        tables = tomllib.loads(read_private(path))
    except tomllib.TOMLDecodeError as error:
        raise SecurityFileError(f"roles: {path}: {error}") from error
    grants = tables.pop("grant", [])
    if tables or not isinstance(grants, list):
        raise SecurityFileError(
            f"roles: {path} has [[grant]] tables and nothing else, not {', '.join(tables) or grants}"
        )
    return tuple(_grant(table, f"roles: {path}, grant {number}") for number, table in enumerate(grants, 1))


def _grant(table: Mapping[str, object], where: str) -> Grant:
    unknown = sorted(set(table) - {"principal", "mm", "file", "roles"})
    if unknown:
        raise SecurityFileError(f"{where}: {unknown[0]} is not one of principal, mm, file, roles")
    texts = [table.get(key, "") for key in ("principal", "mm", "file")]
    names = table.get("roles")
    if not all(isinstance(text, str) for text in texts) or not texts[0]:
        raise SecurityFileError(f"{where}: principal, mm and file are patterns, and principal must be there")
    if not isinstance(names, list) or not names or any(name not in ROLES for name in names):
        raise SecurityFileError(f"{where}: roles is a list of some of {', '.join(ROLES)}")
    roles = Role.NONE
    for name in names:
        roles |= ROLES[name]
    principal, mm, file = map(str, texts)
    if roles != Role.ADMINISTER and not (mm or file):
        raise SecurityFileError(f"{where}: mm or file must say on what")
    return Grant(principal, mm, file, roles)


class Authority:
    """Decides.

    Attributes:
        open: nothing is configured; everybody is `local` and may do everything.
        mms, files, sessions: whose they are.
    """

    def __init__(self, memory: Memory, identities: Identities | None = None, grants: Sequence[Grant] = ()) -> None:
        """Args: identities: None when no kind of authentication is configured."""
        self._memory = memory
        self._identities = identities
        self._grants = tuple(grants)
        self.open = identities is None
        self.mms, self.files, self.sessions = Owners(), Owners(), Owners()
        self._decided: dict[tuple[Principal, int], Role] = {}

    def change(self, tokens: Mapping[str, str], grants: Sequence[Grant]) -> None:
        """Tokens and roles have been read again."""
        assert self._identities is not None
        self._identities.tokens = tokens
        self._grants = tuple(grants)
        self._decided.clear()

    def caller(self, context: Context) -> Principal:
        """Raises: Unauthenticated."""
        return LOCAL if self._identities is None else self._identities.of(context)

    # Ownership.

    def mm_created(self, who: Principal, mm: int) -> None:
        """Who made it owns it."""
        if not self.open:
            self._decided.pop((who, mm), None)
            self.mms.add(who, mm, self._memory.mms)

    def file_created(self, who: Principal, file: int) -> None:
        """Who made it owns it."""
        if not self.open:
            self.files.add(who, file, self._memory.files)

    def session_opened(self, who: Principal, session: Session, standing: Container[int]) -> None:
        """A session is its principal's alone. Args: standing: ids of all sessions that are remembered."""
        if not self.open:
            self.sessions.add(who, session.id, standing)

    def mm_owner(self, mm: int) -> str:
        """The principal's name; "" when nobody is known."""
        owner = self.mms.of(mm)
        return owner.name if owner is not None else ""

    def session_owner(self, session: Session) -> Principal | None:
        """Who opened it."""
        return self.sessions.of(session.id)

    # Decisions.

    def administers(self, who: Principal) -> bool:
        """Whether it may do everything."""
        if self._identities is None:
            return True
        if not self._identities.stands(who):
            return False
        return who.name == self._identities.own or any(
            grant.roles & Role.ADMINISTER == Role.ADMINISTER and fnmatchcase(who.name, grant.principal)
            for grant in self._grants
        )

    def roles_on_mm(self, who: Principal, mm: int) -> Role:
        """What it may do with an address space; NONE also when there is none of that number."""
        if self.open:
            return Role.ADMINISTER
        known = self._decided.get((who, mm))
        if known is not None:
            return known
        space = self._memory.mms.get(MmId(mm))
        if space is None:
            return Role.NONE
        if len(self._decided) >= REMEMBERED_MAX:
            self._decided.clear()
        roles = self._roles(who, space.name, self.mms.of(mm), "mm")
        self._decided[who, mm] = roles
        return roles

    def roles_on_file(self, who: Principal, file: int) -> Role:
        """What it may do with a file; NONE also when there is none of that number."""
        if self.open:
            return Role.ADMINISTER
        found = self._memory.files.get(FileId(file))
        if found is None:
            return Role.NONE
        return self._roles(who, found.name, self.files.of(file), "file")

    def _roles(self, who: Principal, name: str, owner: Principal | None, kind: str) -> Role:
        assert self._identities is not None
        if not self._identities.stands(who):
            return Role.NONE
        if self.administers(who):
            return Role.ADMINISTER
        roles = Role.OWN if owner is not None and owner.name == who.name else Role.NONE
        for grant in self._grants:
            pattern = grant.mm if kind == "mm" else grant.file
            if pattern and fnmatchcase(who.name, grant.principal) and fnmatchcase(name, pattern):
                roles |= grant.roles
        return roles

    def check_mm(self, who: Principal, role: Role, mm: int) -> None:
        """Raises: MmError ESRCH, word for word as for one that does not exist; EACCES when it may see it at least."""
        if self.open:
            return
        roles = self.roles_on_mm(who, mm)
        if roles & role == role:
            return
        if not roles:
            raise MmError("ESRCH", f"there is no address space {mm}")
        raise MmError("EACCES", f"{who.name} has not the role {str(role.name).lower()} on address space {mm}")

    def check_file(self, who: Principal, role: Role, file: int) -> None:
        """Raises: MmError EBADF, word for word as for one that does not exist; EACCES when it may see it at least."""
        if self.open:
            return
        roles = self.roles_on_file(who, file)
        if roles & role == role:
            return
        if not roles:
            raise MmError("EBADF", f"there is no file {file}")
        raise MmError("EACCES", f"{who.name} has not the role {str(role.name).lower()} on file {file}")

    def check_administers(self, who: Principal, what: str) -> None:
        """Raises: RequestError EPERM."""
        if not self.administers(who):
            raise RequestError("EPERM", f"{what} is for administrators", reason="EPERM")

    def may_use(self, who: Principal, session: Session) -> bool:
        """Whether the session is its own."""
        if self.open:
            return True
        owner = self.sessions.of(session.id)
        return owner is not None and owner.name == who.name

    def lost_rights(self, session: Session) -> bool:
        """Whether its principal may no longer do what the session stands for; asked after roles have changed."""
        owner = self.sessions.of(session.id)
        if self._identities is None or owner is None:
            return False
        if not self._identities.stands(owner):
            return True
        return any(
            registration.mm and not self.roles_on_mm(owner, registration.mm) & Role.ATTACH
            for registration in session.registrations.values()
        )
