"""Who owns what, and what was given to whom, over a restart: kept with the state as plain values."""

from __future__ import annotations

from collections.abc import Container
from typing import cast

from mmubusd.rpc.authority import Authority, Kind
from mmubusd.rpc.identity import Principal
from mmubusd.state import Core

__all__ = ["keep_ownership"]


def keep_ownership(authority: Authority, core: Core) -> None:
    """Give an authority back what a core remembers of it, and have it remembered from now on."""
    remembered = core.remembered
    standing: dict[str, Container[int]] = {"mm": core.memory.mms, "file": core.memory.files, "session": core.sessions}
    owners = {"mm": authority.mms, "file": authority.files, "session": authority.sessions}
    for kind, known in owners.items():
        for thing, (name, credential) in remembered.get(kind, {}).items():
            if thing in standing[kind]:
                known.add(Principal(name, credential), thing, standing[kind])
    for (kind, number, principal), roles in remembered.get("given", {}).items():
        if number in standing[kind]:
            authority.restore_given((cast(Kind, kind), number), principal, roles)
    for session, mms in remembered.get("exported", {}).items():
        if session in core.sessions:
            authority.restore_exported(session, mms)
    authority.keep = core.remember
