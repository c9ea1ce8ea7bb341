"""mmubus as a contender: a server, and drivers in up to four processes, one session each."""

from __future__ import annotations

from mmubus.bench.system import System

__all__ = ["SYSTEM", "SYSTEM_TCP"]

_OWNER, _RESPONDERS = "mmubus.bench.served:owner", "mmubus.bench.clients:responders"

SYSTEM = System("mmubus", _OWNER, _RESPONDERS)
SYSTEM_TCP = System("mmubus, TCP", _OWNER, _RESPONDERS, transport="tcp")
