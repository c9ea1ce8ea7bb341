"""The device's side, as operations: what a driver asks of the bus for one of its registrations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NO_PFN = 0xFFFF_FFFF_FFFF_FFFF
"""The pfn of a page without a translation."""
READ, WRITE = 1, 2
"""Bits of a translation's rights."""


@dataclass(frozen=True, slots=True)
class Translations:
    """Translations of consecutive pages, the contract's message of that name.

    start: address of the first page; pfns: shape (pages,), uint64, NO_PFN where there is none; generations: shape (pages,),
    uint32; rights: shape (pages,), uint8, bits READ and WRITE.
    """

    start: int
    pfns: NDArray[np.uint64]
    generations: NDArray[np.uint32]
    rights: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Granted:
    """The answer of fault and export. retry: nothing was granted (translations is None), the range is still barred."""

    translations: Translations | None
    as_of_seq: int
    retry: bool = False


@dataclass(frozen=True, slots=True)
class Looked:
    """The answer of snapshot. states: shape (pages,), uint8: 0 none, 1 present, 2 zero page, 0xff no mapping or not readable."""

    translations: Translations
    states: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Pinned:
    """The answer of pin: a number to give it back with."""

    pin: int
    translations: Translations
