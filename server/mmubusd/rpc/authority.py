"""Who may do what: owners, roles that were given, roles by the file, and the one place where all are asked for.

Roles are in `roles`. They come from three sides: who made an address space or a file owns it; its owner or an
administrator gives more, while the server runs (AuthorityService); and the file of roles has patterns of names.

What somebody has no role on does not exist for it: unknown and forbidden are answered alike. With no kind of
authentication configured everybody who reaches the server is `local`, and may do everything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from mmubusd.mm.addr import FileId, MmId
from mmubusd.mm.errno import MmError
from mmubusd.mm.memory import Memory
from mmubusd.notify import LimitReached, RequestError, Session
from mmubusd.rpc.identity import LOCAL, Identities, Principal
from mmubusd.rpc.methods import Context
from mmubusd.rpc.owners import Owners
from mmubusd.rpc.roles import Grant, Role

__all__ = ["Authority"]

REMEMBERED_MAX = 1 << 16
GIVEN_MAX = 1024
"""Principals who are given roles on one address space or file."""

Kind = Literal["mm", "file"]
Thing = tuple[Kind, int]


class Authority:
    """Decides.

    Attributes:
        open: nothing is configured; everybody is `local` and may do everything.
        mms, files, sessions: whose they are.
        keep: is told what changes about that and about roles that are given, by kind and key (see `ownership`).
    """

    def __init__(self, memory: Memory, identities: Identities | None = None, grants: Sequence[Grant] = ()) -> None:
        """Args: identities: None when no kind of authentication is configured."""
        self._memory = memory
        self._identities = identities
        self._grants = tuple(grants)
        self.open = identities is None
        self.mms, self.files, self.sessions = Owners(), Owners(), Owners()
        self._given: dict[Thing, dict[str, frozenset[Role]]] = {}
        self._exported: dict[int, set[int]] = {}
        self._decided: dict[tuple[Principal, int], Role] = {}
        self.keep: Callable[[str, object, object], None] | None = None

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
            self._keep("mm", mm, (who.name, who.credential))

    def file_created(self, who: Principal, file: int) -> None:
        """Who made it owns it."""
        if not self.open:
            self.files.add(who, file, self._memory.files)
            self._keep("file", file, (who.name, who.credential))

    def session_opened(self, who: Principal, session: Session, standing: Container[int]) -> None:
        """A session is its principal's alone. Args: standing: ids of all sessions that are remembered."""
        if not self.open:
            self.sessions.add(who, session.id, standing)
            self._keep("session", session.id, (who.name, who.credential))
            for gone in [one for one in self._exported if one not in standing]:
                del self._exported[gone]

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
        if MmId(mm) not in self._memory.mms:
            return Role.NONE
        known = self._decided.get((who, mm))
        if known is not None:
            return known
        if len(self._decided) >= REMEMBERED_MAX:
            self._decided.clear()
        roles = self._roles(who, ("mm", mm))
        self._decided[who, mm] = roles
        return roles

    def roles_on_file(self, who: Principal, file: int) -> Role:
        """What it may do with a file; NONE also when there is none of that number."""
        if self.open:
            return Role.ADMINISTER
        if FileId(file) not in self._memory.files:
            return Role.NONE
        return self._roles(who, ("file", file))

    def _roles(self, who: Principal, thing: Thing) -> Role:
        assert self._identities is not None
        if not self._identities.stands(who):
            return Role.NONE
        if self.administers(who):
            return Role.ADMINISTER
        owner = self.owner(thing)
        roles = Role.OWN if owner is not None and owner.name == who.name else Role.NONE
        for role in self._given.get(thing, {}).get(who.name, ()):
            roles |= role
        for grant in self.by_file(thing):
            if fnmatchcase(who.name, grant.principal):
                roles |= grant.roles
        return roles

    # Roles that are given while the server runs.

    def owner(self, thing: Thing) -> Principal | None:
        """Who made it; None when nobody is known."""
        kind, number = thing
        return (self.mms if kind == "mm" else self.files).of(number)

    def by_file(self, thing: Thing) -> list[Grant]:
        """What the file of roles gives on it, whomever."""
        kind, number = thing
        found = self._memory.mms.get(MmId(number)) if kind == "mm" else self._memory.files.get(FileId(number))
        name = found.name if found is not None else ""
        patterns = ((grant, grant.mm if kind == "mm" else grant.file) for grant in self._grants)
        return [grant for grant, pattern in patterns if pattern and fnmatchcase(name, pattern)]

    def given(self, thing: Thing) -> Mapping[str, frozenset[Role]]:
        """What was given on it, by principal."""
        return self._given.get(thing, {})

    def give(self, thing: Thing, principal: str, roles: Collection[Role]) -> None:
        """Give roles on something that is there. Raises: LimitReached."""
        given = self._given.get(thing, {})
        if principal not in given and len(given) >= GIVEN_MAX:
            raise LimitReached("ENOSPC", "principals with roles on it", GIVEN_MAX)
        for gone in [one for one in self._given if not self._stands(one)]:
            del self._given[gone]
        self._given.setdefault(thing, {})[principal] = given.get(principal, frozenset()) | frozenset(roles)
        self._decided.clear()
        self._keep_given(thing, principal)

    def take(self, thing: Thing, principal: str, roles: Collection[Role]) -> Role:
        """Take given roles away; none: all of them. Returns: what the principal may do all the same."""
        given = self._given.get(thing, {})
        left = given.get(principal, frozenset()) - frozenset(roles) if roles else frozenset()
        if left:
            given[principal] = left
        else:
            given.pop(principal, None)
        self._decided.clear()
        self._keep_given(thing, principal)
        return self._roles(Principal(principal), thing)

    def _stands(self, thing: Thing) -> bool:
        kind, number = thing
        return MmId(number) in self._memory.mms if kind == "mm" else FileId(number) in self._memory.files

    def check(self, who: Principal, role: Role, thing: Thing) -> None:
        """As check_mm and check_file."""
        kind, number = thing
        (self.check_mm if kind == "mm" else self.check_file)(who, role, number)

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
        attached = {registration.mm for registration in session.registrations.values() if registration.mm}
        exported = self._exported.get(session.id, set()) if session.holding else set()
        return self._lost(owner, Role.ATTACH, attached) or self._lost(owner, Role.ACCESS, exported)

    def exports(self, session: Session, mm: int) -> None:
        """A session exports pages of an address space: what it gets, it reaches by frame, and not by address space."""
        if not self.open:
            exported = self._exported.setdefault(session.id, set())
            if mm not in exported:
                exported.add(mm)
                self._keep("exported", session.id, tuple(sorted(exported)))

    # Over a restart.

    def _keep(self, kind: str, key: object, value: object) -> None:
        if self.keep is not None:
            self.keep(kind, key, value)

    def _keep_given(self, thing: Thing, principal: str) -> None:
        roles = self._given.get(thing, {}).get(principal)
        self._keep("given", (*thing, principal), tuple(sorted(int(role) for role in roles)) if roles else None)

    def restore_given(self, thing: Thing, principal: str, roles: Iterable[int]) -> None:
        """As it was given before the server was started again."""
        self._given.setdefault(thing, {})[principal] = frozenset(map(Role, roles))

    def restore_exported(self, session: int, mms: Iterable[int]) -> None:
        """As it was exported before the server was started again."""
        self._exported[session] = set(mms)

    def _lost(self, who: Principal, role: Role, mms: Collection[int]) -> bool:
        """Whether it has not the role on one of those that are still there."""
        return any(MmId(mm) in self._memory.mms and not self.roles_on_mm(who, mm) & role for mm in mms)
