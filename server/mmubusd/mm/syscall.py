"""The table of all calls, by the name and the argument order of the mm-trace format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm
    from mmubusd.mm.notification import Operation


def call(target: Mm | Memory, op: str, args: Sequence[int]) -> Operation[int]:
    """One call. Files are named by their id (mmap's fd: 0 is none); fork returns the child's id.

    Args: target: an Mm, or for fsync, ftruncate and punch also a Memory; op: mmap munmap mprotect mremap madvise brk msync
        mlock munlock remap_file_pages (3 arguments as in random traces, or 5) fork exit read write execute fsync ftruncate punch.
    Raises: MmError, also ENOSYS for an unknown op and EINVAL for a wrong number of arguments.
    """
    raise NotImplementedError
