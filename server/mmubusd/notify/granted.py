"""What a device is given when it asks: values, the contract's messages of these names."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NO_PFN = 0xFFFF_FFFF_FFFF_FFFF
"""The pfn of a page without a translation."""


@dataclass(frozen=True, slots=True)
class Translations:
    """Translations of consecutive pages, the contract's message of that name.

    start: address of the first page; pfns: shape (pages,), uint64, NO_PFN where there is none; generations: shape
    (pages,), uint32; rights: shape (pages,), uint8, bits READ and WRITE.
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
class Migrated:
    """The answer of migrate. pages: how many of the range are where they should be; granted: those on the device."""

    pages: int
    granted: Granted


@dataclass(frozen=True, slots=True)
class Looked:
    """The answer of snapshot. states: shape (pages,), uint8: 0 none, 1 present, 2 zero page, 3 in the
    registration's own private memory, 4 in its own coherent memory, 5 in another's, 0xff not readable.
    orders: likewise: one entry of the page table maps 2^order pages."""

    translations: Translations
    states: NDArray[np.uint8]
    orders: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Pinned:
    """The answer of pin: a number to give it back with."""

    pin: int
    translations: Translations


Request = Generator[object, object, Granted]
"""A device's request under way."""
