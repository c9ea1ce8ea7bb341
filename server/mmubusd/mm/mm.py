"""An address space: its state, and every call on it.

Calls are operations (see `notification`): `value = yield from mm.munmap(...)`, or driven by notify.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmubusd.mm.addr import FileId, MmId

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.notification import Operation


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps. prot: "rwxp" style, last letter p(rivate) or s(hared); offset: bytes into the file."""

    start: int
    end: int
    prot: str
    offset: int
    file: FileId | None
    name: str = ""


class Mm:
    """One address space.

    Attributes:
        notified: the rooms above set it: someone may want to hear. While it is false nothing is yielded for this mm.
        alive: false once exit has ended.
        brk: the program break in bytes; 0 when it has none.
    """

    id: MmId
    name: str
    memory: Memory
    notified: bool
    alive: bool
    brk_start: int
    brk_end: int

    # Inspection: plain, atomic.

    def mappings(self) -> list[Mapping]:
        """All mappings, ascending."""
        raise NotImplementedError

    def present(self, start: int, end: int) -> list[tuple[int, int]]:
        """Resident pages in [start, end) as [first, end) page numbers counted from start, ascending, maximal."""
        raise NotImplementedError

    def resident_pages(self) -> int:
        raise NotImplementedError

    # A recorded process's start: plain, atomic; nobody may be registered yet.

    def adopt(self, mapping: Mapping, resident: Iterable[tuple[int, int, str]]) -> None:
        """Install a mapping as a snapshot tells it.

        Args: resident: (first page, end page, kind) from the mapping's start; kind "f": page of the file (or of shared
            memory), mapped; "a": anonymous, mapped here alone; "s": anonymous, shared with a process that is not known: a
            sharer is counted that goes with `forget_sharers`.
        """
        raise NotImplementedError

    def adopt_file_page(self, address: int) -> None:
        """A recorded protection fault says that a page was mapped here that the simulation has not: map the file's."""
        raise NotImplementedError

    def forget_sharers(self, start: int, end: int) -> None:
        """The unknown sharers of the anonymous pages in [start, end) are gone."""
        raise NotImplementedError

    # The calls. Arguments are Linux's numbers.

    def mmap(self, addr: int, length: int, prot: int, flags: int, file: int = 0, offset: int = 0) -> Operation[int]:
        """Returns: the address."""
        raise NotImplementedError

    def munmap(self, addr: int, length: int) -> Operation[int]:
        raise NotImplementedError

    def mprotect(self, addr: int, length: int, prot: int) -> Operation[int]:
        raise NotImplementedError

    def mremap(self, addr: int, old_length: int, new_length: int, flags: int, new_addr: int = 0) -> Operation[int]:
        """Returns: the address."""
        raise NotImplementedError

    def madvise(self, addr: int, length: int, advice: int) -> Operation[int]:
        raise NotImplementedError

    def msync(self, addr: int, length: int, flags: int) -> Operation[int]:
        raise NotImplementedError

    def mlock(self, addr: int, length: int) -> Operation[int]:
        raise NotImplementedError

    def munlock(self, addr: int, length: int) -> Operation[int]:
        raise NotImplementedError

    def remap_file_pages(self, addr: int, size: int, prot: int, pgoff: int, flags: int = 0) -> Operation[int]:
        raise NotImplementedError

    def brk(self, addr: int) -> Operation[int]:
        """Returns: the break after the call."""
        raise NotImplementedError

    def fork(self, name: str = "") -> Operation[Mm]:
        raise NotImplementedError

    def exit(self) -> Operation[int]:
        """Yields Release before anything is freed; the mm is gone from `Memory.mms` when it returns."""
        raise NotImplementedError

    def touch(self, addr: int, length: int, access: str) -> Operation[int]:
        """One access a page ("read", "write", "execute"); stops at the first that fails: EFAULT (SIGSEGV), ENXIO (SIGBUS)."""
        raise NotImplementedError

    def load(self, addr: int, length: int) -> Operation[bytes]:
        """Raises: MmError as touch."""
        raise NotImplementedError

    def store(self, addr: int, data: bytes) -> Operation[int]:
        """Raises: MmError as touch; the pages before the failing one are written."""
        raise NotImplementedError
