"""Python's cyclic garbage collector, in a process whose business this server is.

Everything that a round needs goes with its last reference; there are no cycles to find. But hundreds of rounds in
flight are tens of thousands of young objects, and as shipped the collector looks at them after every 700: a third of
the server's time. So it looks rarely, and never again at what was there when the server started.
"""

from __future__ import annotations

import gc

__all__ = ["calm_collector"]

YOUNG_MAX = 100_000
"""Containers made, and not gone, before the collector looks at the young ones: some 20 MB of what might be garbage."""


def calm_collector() -> None:
    """Call it once, when the server has started. Not for a server embedded in somebody else's process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_MAX, 20, 50)
