"""Entries of the page table that are not present: they say where the page is.

    bit 0     0, so it is not present
    bits 2-4  the kind
    bit 7     the page is this entry's alone (a swap entry's exclusive bit)
    bit 8     the entry was writable
    from 12   the swap slot, or the frame

A MIGRATION entry stands for a page that is just being moved: who comes to it waits. DEVICE_PRIVATE: the page is in a
device's own memory, which the CPU cannot reach; DEVICE_EXCLUSIVE: it is in ours, and a device wants it for itself.
These two map their frame as a present entry does; the others do not. HWPOISON_ENTRY: the page is lost, its frame has
failed; the entry holds nothing. Kernel: include/linux/swapops.h, v6.12.
"""

from __future__ import annotations

import numpy as np

from mmubusd.mm.free_frames import Pfns
from mmubusd.mm.pgtable import (
    ACCESSED,
    DIRTY,
    KIND_MASK,
    PFN_SHIFT,
    PRESENT,
    SOFT_DIRTY,
    SWAP,
    UFFD_WP,
    WRITE,
    Ptes,
)

__all__ = [
    "DEVICE_EXCLUSIVE",
    "DEVICE_PRIVATE",
    "ENTRY_ALONE",
    "ENTRY_WRITABLE",
    "HWPOISON_ENTRY",
    "MIGRATION",
    "SWAP",
]

MIGRATION, DEVICE_PRIVATE, DEVICE_EXCLUSIVE, HWPOISON_ENTRY = 2 << 2, 3 << 2, 4 << 2, 5 << 2
ENTRY_ALONE = 1 << 7
ENTRY_WRITABLE = 1 << 8


def kind(entry: int) -> int:
    """What a non-zero entry stands for; 0: it is present."""
    return 0 if entry & PRESENT else entry & KIND_MASK


def make(entry_kind: int, value: int, flags: int = 0) -> int:
    """An entry. Args: value: the slot or the frame; flags: ENTRY_ALONE, ENTRY_WRITABLE, and what a PTE keeps."""
    return value << PFN_SHIFT | entry_kind | flags


def restored(entry: int) -> int:
    """The PTE that an exclusive entry came from. Kernel: restore_exclusive_pte()."""
    rights = WRITE | DIRTY if entry & ENTRY_WRITABLE else DIRTY
    return entry >> PFN_SHIFT << PFN_SHIFT | PRESENT | ACCESSED | rights | entry & (SOFT_DIRTY | UFFD_WP)


def maps_frame(entry: int) -> bool:
    """Whether the entry counts as a mapping of its frame. Kernel: what folio_mapped() counts."""
    return entry & PRESENT != 0 or entry & KIND_MASK in (DEVICE_PRIVATE, DEVICE_EXCLUSIVE)


def maps(entry: int, pfn: int) -> bool:
    """Whether the entry maps this frame."""
    return entry >> PFN_SHIFT == pfn and maps_frame(entry)


def mapped_frames(ptes: Ptes) -> Pfns:
    """The frame that each entry maps, 0 where none. ptes: shape (n,); returns shape (n,), int64."""
    kinds = ptes & np.uint64(KIND_MASK | PRESENT)
    maps = (kinds & np.uint64(PRESENT) != 0) | (kinds == DEVICE_PRIVATE) | (kinds == DEVICE_EXCLUSIVE)
    return np.where(maps, ptes >> np.uint64(PFN_SHIFT), np.uint64(0)).view(np.int64)


def swap_slots(ptes: Ptes) -> list[int]:
    """The slots of the swap entries among them."""
    swapped = ptes[ptes & np.uint64(KIND_MASK | PRESENT) == SWAP]
    slots: list[int] = (swapped >> np.uint64(PFN_SHIFT)).tolist()
    return slots
