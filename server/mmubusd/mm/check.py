"""Every invariant, recomputed from first principles. AssertionError where one does not hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm


def check_mm(mm: Mm) -> None:
    """One address space: VMA order and merging, page tables, rights, the reverse map from its side."""
    raise NotImplementedError


def check_memory(memory: Memory) -> None:
    """The machine: reference and mapping counts, free list, quarantine, page caches, both directions of the reverse map."""
    raise NotImplementedError
