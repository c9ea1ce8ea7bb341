"""Reclaim under pressure: who needs a frame when none is free takes the coldest pages away from others.

    active ──not asked for, or its list is too long──► inactive ──not young──► unmapped, everyone told, written ──► free
       ▲                                                  │  ▲
       └────────────────young, a second time──────────────┘  └─young: once more round

Whether a page is young is asked of every driver, in one message for many pages of an address space: AgePage. Asking
ends with the answer; in the seed's order the question is repeated inside try_to_unmap(), just before the page goes. A
driver that calls all its pages young keeps them as long as anyone else has some that are not: only the last pass over
everything, before memory counts as exhausted, does not ask.

There is no thread: whoever needs a frame reclaims, as direct reclaim does; when little is free, the machine also wants
to run `kswapd` beside everyone. Locked, pinned and refused pages stay.

Kernel: mm/vmscan.c, v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.aging import MESSAGE_PAGES, mappings, page_referenced
from mmubusd.mm.deferred_split import deferred_split_scan
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import ANON, KSM, PINNED, REFERENCED
from mmubusd.mm.free_nodes import Nodes
from mmubusd.mm.notification import BEGIN_SECTION, END_SECTION, RESCHEDULE, LockWait, Operation
from mmubusd.mm.oom import out_of_memory
from mmubusd.mm.reclaim import Victim
from mmubusd.mm.reclaim_large import reclaim_mixed
from mmubusd.mm.vma import VM_EXEC, VM_LOCKED

if TYPE_CHECKING:
    from mmubusd.mm.memcontrol import MemCgroup
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm

DEF_PRIORITY = 12
SWAP_CLUSTER_MAX = 32
BATCH_MAX = 1024
RECLAIM_RETRIES_MAX = 16
"""MAX_RECLAIM_RETRIES: attempts in vain while others reclaim, too; who waits for others counts as one of them."""


def make_room(
    memory: Memory, wanted: int = 1, memcg: MemCgroup | None = None, nodes: Nodes | None = None
) -> Operation[None]:
    """Reclaim until so many frames may be taken. Kernel: __alloc_pages_slowpath(), try_charge_memcg().

    Args: memcg: who pays for them: when it may not have so many, pages of its own go; nodes: only frames there count.
    Raises: MmError ENOMEM: there is nothing left to reclaim, and nobody to kill.
    """
    in_vain = 0
    while (room := memory.room(memcg, nodes)) < wanted:
        full = memcg if memcg is not None and memcg.room < wanted else None
        place = memory.next_reclaimer()
        ticket = memory.reclaimers.acquire((place, place + 1))
        try:
            yield BEGIN_SECTION
            where = nodes if full is None else None
            freed = yield from shrink(memory, max(SWAP_CLUSTER_MAX, wanted - room), where, full)
            yield END_SECTION
        finally:
            memory.reclaimers.release(ticket)
        if freed or memory.room(memcg, nodes) >= wanted:
            memory.kswapd_failures = in_vain = 0
        elif memory.reclaimers and in_vain < RECLAIM_RETRIES_MAX:
            in_vain += 1
            yield from _wait_for_others(memory)
        elif not memory.oom_kill or not (yield from out_of_memory(memory, full)):
            raise _out_of_memory(memory, wanted, full)
        else:
            in_vain = 0


def _out_of_memory(memory: Memory, wanted: int, full: MemCgroup | None) -> MmError:
    if full is None:
        frames = memory.frames
        return MmError("ENOMEM", f"{wanted} frames wanted, {frames.free_nr} of {frames.frames_nr} free")
    full.ooms += 1
    return MmError(
        "ENOMEM",
        f"{full.name} has {full.charged} of its {full.limit} frames in use, page tables included; {wanted} more are "
        "wanted, and none of its pages can be reclaimed",
    )


def make_room_for_tables(mm: Mm, count: int = 1) -> Operation[None]:
    """Before making so many leaf tables. Raises: MmError ENOMEM."""
    if mm.memcg is not None and mm.memcg.room < count:
        yield from make_room(mm.memory, count, mm.memcg)
    mm.pgtable.check_room(count)


def _wait_for_others(memory: Memory) -> Operation[None]:
    """Others are just reclaiming what could be reclaimed. Kernel: too_many_isolated()."""
    ticket = memory.reclaimers.acquire((0, 1 << 62))
    try:
        if not ticket.granted:
            yield LockWait(ticket)
    finally:
        memory.reclaimers.release(ticket)


def kswapd(memory: Memory) -> Operation[int]:
    """Reclaim in the background until enough is free. Kernel: balance_pgdat(). Returns: how many frames it freed."""
    total = 0
    try:
        while memory.frames.free_nr < memory.high_watermark:
            yield BEGIN_SECTION
            freed = yield from shrink(memory, SWAP_CLUSTER_MAX)
            yield END_SECTION
            if not freed:
                memory.kswapd_failures += 1
                break
            total += freed
            yield RESCHEDULE
    finally:
        memory.kswapd_running = False
    return total


def shrink(memory: Memory, wanted: int, nodes: Nodes | None = None, memcg: MemCgroup | None = None) -> Operation[int]:
    """Free so many frames, if that is possible, looking at more and more pages. Kernel: do_try_to_free_pages().

    Args: nodes: of these nodes, None: of any; memcg: only those that this group pays for.
    Returns: how many were freed.
    """
    lists, whose = memory.lru.lists, memcg.id if memcg is not None else 0
    notified_nr = sum(mm.notified for mm in memory.mms.values())
    batch = min(BATCH_MAX, MESSAGE_PAGES * max(1, notified_nr))
    memory.lru.drain()
    freed = yield from deferred_split_scan(memory, wanted, nodes, whose)
    if freed >= wanted:
        return freed
    for priority in range(DEF_PRIORITY, -1, -1):
        inactive, active = lists.sizes(whose)
        if inactive < active:
            yield from shrink_active(memory, batch, nodes, whose)
        left = max(batch, inactive >> priority)
        while left > 0 and freed < wanted:
            folios = lists.isolate(min(left, batch), active=False, nodes=nodes, memcg=whose)
            if not folios:
                break
            left -= len(folios)
            freed += yield from _shrink_inactive(memory, folios, asks=priority > 0)
        if freed >= wanted:
            break
    return freed


def shrink_active(memory: Memory, count: int, nodes: Nodes | None = None, memcg: int = 0) -> Operation[None]:
    """The coldest active pages become inactive, their young marks cleared. Kernel: shrink_active_list()."""
    lists = memory.lru.lists
    folios = lists.isolate(count, active=True, nodes=nodes, memcg=memcg)
    alive = [(pfn, memory.frames.generation_at[pfn]) for pfn in folios]
    lists.tick()
    try:
        referenced = yield from page_referenced(memory, folios)
        for pfn, generation in alive:
            if memory.frames.generation_at[pfn] == generation:
                executable = referenced[pfn] > 0 and _is_executable_file(memory, pfn)
                lists.putback(pfn, active=executable)
    finally:
        lists.isolated.difference_update(folios)


def _shrink_inactive(memory: Memory, folios: list[int], asks: bool) -> Operation[int]:
    """Free those of the isolated folios that nobody needs. Kernel: shrink_folio_list(), folio_check_references()."""
    frames, lists = memory.frames, memory.lru.lists
    victims: list[Victim] = [(pfn, frames.generation_at[pfn]) for pfn in folios]
    lists.tick()
    try:
        yielding = [victim for victim in victims if not _stays(memory, victim[0])]
        kept = set(victims) - set(yielding)
        if asks:
            referenced = yield from page_referenced(memory, [pfn for pfn, _ in yielding])
            for victim in yielding:
                if referenced[victim[0]] and frames.generation_at[victim[0]] == victim[1]:
                    _keep(memory, victim[0], referenced[victim[0]])
                    kept.add(victim)
        freed = yield from reclaim_mixed(memory, [victim for victim in yielding if victim not in kept], asks)
        for pfn, generation in victims:
            if pfn in lists.isolated and frames.generation_at[pfn] == generation:
                lists.putback(pfn, active=True)
    finally:
        lists.isolated.difference_update(folios)
    return freed


def _keep(memory: Memory, pfn: int, referenced: int) -> None:
    """The folio is in use: once more round, or to the active list. Kernel: folio_check_references()."""
    again = memory.frames.flags_at[pfn] & REFERENCED != 0
    active = again or referenced > 1 or _is_executable_file(memory, pfn)
    memory.lru.lists.putback(pfn, active=active, referenced=True)


def _stays(memory: Memory, pfn: int) -> bool:
    """Whether the folio is not to be reclaimed, whoever asks: pinned, merged, locked in memory."""
    return memory.frames.flags_at[pfn] & (PINNED | KSM) != 0 or any(
        vma.flags & VM_LOCKED for vma, _, _ in mappings(memory, pfn)
    )


def _is_executable_file(memory: Memory, pfn: int) -> bool:
    return not memory.frames.flags_at[pfn] & ANON and any(vma.flags & VM_EXEC for vma, _, _ in mappings(memory, pfn))
