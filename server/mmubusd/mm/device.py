"""The device's side: faulting, looking and pinning by address.

Entries are uint64, as hmm_range_fault gives them: VALID and WRITE in the top bits, the pfn in the low ones; 0 where
nothing is mapped, ERROR where nothing may be. The frame's generation is `memory.frames.generation[pfn]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm
    from mmubusd.mm.notification import Operation

VALID = 1 << 63
WRITE = 1 << 62
ERROR = 1 << 61
PFN_MASK = (1 << 52) - 1


def fault(mm: Mm, start: int, end: int, write: bool) -> Operation[NDArray[np.uint64]]:
    """Fault the pages in and return their entries. Kernel: hmm_range_fault() with HMM_PFN_REQ_FAULT (and _WRITE).

    The entries are the state at the moment of return: hand them out before anything else runs.
    Raises: MmError EFAULT (no mapping, or past the end of the file), EPERM (the mapping forbids the access).
    """
    raise NotImplementedError


def snapshot(mm: Mm, start: int, end: int) -> NDArray[np.uint64]:
    """The same array without faulting; changes nothing."""
    raise NotImplementedError


def pin(mm: Mm, start: int, end: int, write: bool) -> Operation[NDArray[np.uint64]]:
    """Fault in and take a long-term reference on each page. Kernel: pin_user_pages(FOLL_LONGTERM).

    Returns: the pfns; give them back with unpin. Raises: MmError EFAULT.
    """
    raise NotImplementedError


def unpin(mm: Mm, pfns: NDArray[np.uint64], dirty: bool = False) -> None:
    """Give the references of pin back; with dirty the frames become dirty."""
    raise NotImplementedError
