"""Breaking the zero page: a frame of its own for a page that only reads what nobody has written.

The zero page is many pages' frame at once, so nobody can be told that it goes from one of them. What is told of by
frame, and not by address, must not begin with it. The page gets a frame of zeros instead, with the mapping's own
rights: a mapping that may only be read keeps that, and no right to write is needed.

Kernel: gup_must_unshare() and do_wp_page() with FAULT_FLAG_UNSHARE, v6.12. XPMEM faults by get_user_pages(), too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SHIFT
from mmubusd.mm.fault import continue_fault
from mmubusd.mm.notification import Operation
from mmubusd.mm.pgtable import PFN_SHIFT, PRESENT

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def unshare_zero(mm: Mm, start: int, end: int) -> Operation[None]:
    """Replace the zero page wherever [start, end) shows it. Requires: start and end are page-aligned.

    What is not present stays so; whoever wants it faults again. Raises: MmError ENOMEM.
    """
    return (yield from mm.locked(_unshare_zero(mm, start, end), (start, end)))


def _unshare_zero(mm: Mm, start: int, end: int) -> Operation[None]:
    for vpn in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        while _is_zero(mm.pgtable.get(vpn)):
            yield from continue_fault(mm, vpn)


def _is_zero(pte: int) -> bool:
    return pte & PRESENT != 0 and not pte >> PFN_SHIFT
