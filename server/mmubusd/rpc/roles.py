"""What may be done with an address space or a file, and the file that says who may.

| role | may |
|---|---|
| own | every call on it, everything below, and granting; who made it owns it |
| observe | see that it is there, its mappings, its pages' states, its rounds |
| attach | register notifiers on it |
| access | reach its memory as a device: fault, pin, DMA, export; of a file: read, write and map it |
| administer | everything, on everything, and what concerns the server as a whole |

    [[grant]]
    principal = "cert:gpu-*"         # a pattern, as a shell's
    mm = "training-*"                # of names of address spaces; file = "..." is the same for files
    roles = ["attach", "access"]
"""

from __future__ import annotations

import enum
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmubusd.rpc.identity import SecurityFileError, read_private

__all__ = ["ROLES", "Grant", "Role", "read_grants"]


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
