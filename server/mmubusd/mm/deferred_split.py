"""Memory is short: large folios that are mapped in part only are split, which frees the rest of them.

Nothing has to be written for that, so it comes before anything goes to swap. Kernel: deferred_split_scan(),
mm/huge_memory.c, v6.18, which is a shrinker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.folio_split import split
from mmubusd.mm.frame import KEPT
from mmubusd.mm.free_nodes import Nodes
from mmubusd.mm.notification import Operation

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory


def deferred_split_scan(memory: Memory, wanted: int, nodes: Nodes | None, memcg: int = 0) -> Operation[int]:
    """Free so many frames, if that is possible. Who maps the rest of such a folio is told, as by every split.

    Args: nodes: of these nodes, None: of any; memcg: of those that this group pays for. Returns: how many became free.
    """
    frames, freed = memory.frames, 0
    for head in list(frames.partial.queue):
        if freed >= wanted:
            break
        if head not in frames.partial.queue or (nodes is not None and frames.node_of(head) not in nodes):
            continue
        if memcg and frames.charges.owner_at[head] != memcg:
            continue
        kept = [(pfn, frames.generation_at[pfn]) for pfn in frames.partial.members(head).tolist()]
        kept = [(pfn, generation) for pfn, generation in kept if frames.flags_at[pfn] & KEPT]
        yield from split(memory, head)
        freed += sum(frames.generation_at[pfn] != generation for pfn, generation in kept)
    return freed
