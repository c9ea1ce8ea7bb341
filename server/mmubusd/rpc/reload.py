"""Changing the configuration of a running server: SIGHUP or files that have changed, and what it reaches.

Tokens and roles are read anew; a session whose principal has lost its rights is fenced, as one that broke the contract.
Limits, the drain time, the lag bound and the log level change at once. Certificates follow their files by themselves,
see `tls`. Whatever else differs needs a restart, and the log says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmubusd.rpc.config import Settings
from mmubusd.rpc.grants import fence_the_dispossessed
from mmubusd.rpc.identity import SecurityFileError, read_tokens
from mmubusd.rpc.roles import Grant, read_grants

if TYPE_CHECKING:
    from mmubusd.rpc.server import Server

__all__ = ["LIVE", "Watch", "read_security", "reload"]

LIVE = frozenset(
    """
    ack_budget_s ack_budget_min_s ack_budget_max_s lease_s grace_s fault_wait_s drain_s sessions_max registrations_max
    address_spaces_max file_bytes_max operations_max touch_pages_max health_lag_s log_level
    metrics_clients_max
    sessions_per_principal_max registrations_per_principal_max address_spaces_per_principal_max files_per_principal_max
    calls_per_principal_max operations_per_principal_max frames_per_principal_max swap_slots_per_principal_max
    """.split()
)
"""Options that a running server takes up. tokens and roles are files: their contents are read again."""


def read_security(settings: Settings) -> tuple[dict[str, str], tuple[Grant, ...]]:
    """Tokens by digest, and grants. Raises: SecurityFileError."""
    tokens = read_tokens(settings.tokens) if settings.tokens is not None else {}
    return tokens, read_grants(settings.roles) if settings.roles is not None else ()


def reload(server: Server, settings: Settings) -> bool:
    """Take up what can be. Returns: whether all of it could be used; if not, everything is as before."""
    try:
        tokens, grants = read_security(settings)
    except SecurityFileError as error:
        server.log.error("the configuration is not read again", because=str(error))
        return False
    changes = {
        name: getattr(settings, name)
        for name in Settings.model_fields
        if getattr(settings, name) != getattr(server.settings, name)
    }
    later = sorted(set(changes) - LIVE)
    server.apply(server.settings.model_copy(update={name: changes[name] for name in changes if name in LIVE}))
    authority = server.driver.authority
    if not authority.open:
        authority.change(tokens, grants)
        fence_the_dispossessed(server.driver)
    server.log.info("configuration read again", changed=sorted(set(changes) & LIVE), needs_a_restart=later)
    return True


class Watch:
    """Looks at files every so often, and tells when one of them has become another.

    What a link leads to is looked at, so that a mounted secret of Kubernetes, which changes by the turn of a link, is
    seen to change. A change counts when the next look finds the same: a copy that is under way is not read in half.
    """

    def __init__(self, paths: Sequence[Path], interval_s: float, changed: Callable[[list[Path]], None]) -> None:
        """Args: interval_s: seconds between looks, above 0; changed: called on the loop with what has changed."""
        self._paths = paths
        self._interval_s = interval_s
        self._changed = changed
        self._known = self._before = self._stamps()
        self._timer = asyncio.get_running_loop().call_later(interval_s, self._look)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _look(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._look)
        now, before, known = self._stamps(), self._before, self._known
        self._before = now
        if now == before and now != known:
            self._known = now
            self._changed([path for path, a, b in zip(self._paths, now, known, strict=True) if a != b])

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes with the file; None while there is none to be read."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
