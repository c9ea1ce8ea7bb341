"""The machine: page frames, files and the address spaces that share them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mmubusd.mm.addr import FileId, MmId, Pfn

if TYPE_CHECKING:
    from mmubusd.mm.file import File
    from mmubusd.mm.frame import FrameTable
    from mmubusd.mm.mm import Mm
    from mmubusd.mm.notification import Operation
    from mmubusd.mm.range_lock import Ticket


class Memory:
    """One simulated machine.

    Attributes:
        frames: the frame table (`frames.generation[pfn]`, `frames.free_nr`, `frames.quarantine_nr`, `frames.page(pfn)`).
        mms, files: everything that exists, by id.
        granted: range-lock tickets that became granted; the driver of operations drains it after every step.
    """

    frames: FrameTable
    mms: dict[MmId, Mm]
    files: dict[FileId, File]
    granted: list[Ticket]

    def __init__(self, *, frames_nr: int = 1 << 20, store: memoryview | None = None) -> None:
        """
        Args: frames_nr: the number of page frames; store: a writable buffer of frames_nr pages, zero-filled, which holds
            the real bytes (frame n at n * PAGE_SIZE); None: anonymous memory of our own, taken as it is touched.
        """
        raise NotImplementedError

    def create_mm(self, name: str = "") -> Mm:
        """Make an empty address space."""
        raise NotImplementedError

    def create_file(self, name: str, kind: str, pages: int, *, cached: bool = False) -> FileId:
        """Make a zero-filled file of so many pages; kind is "disk", "shm" or "xip".

        cached: every page is in the page cache, as if it had just been written page by page (and, on disk, fsynced).
        """
        raise NotImplementedError

    def mm(self, mm_id: MmId) -> Mm:
        """Raises: MmError ESRCH."""
        raise NotImplementedError

    def file(self, file_id: FileId) -> File:
        """Raises: MmError EBADF."""
        raise NotImplementedError

    def unlink(self, file_id: FileId) -> None:
        """Take the file's name away: no more calls by its id; its contents go with the last mapping."""
        raise NotImplementedError

    def read_file(self, file_id: FileId, offset: int, length: int) -> bytes:
        """pread(2); shorter at the end of the file."""
        raise NotImplementedError

    def write_file(self, file_id: FileId, offset: int, data: bytes) -> Operation[int]:
        """pwrite(2); grows the file as needed."""
        raise NotImplementedError

    def fsync(self, file_id: FileId) -> Operation[int]:
        raise NotImplementedError

    def ftruncate(self, file_id: FileId, size: int) -> Operation[int]:
        """size: bytes."""
        raise NotImplementedError

    def punch(self, file_id: FileId, offset: int, length: int) -> Operation[int]:
        """fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)."""
        raise NotImplementedError

    # What the rooms above hand in about devices. All plain, all atomic.

    def set_dirty(self, pfns: Iterable[int]) -> None:
        """A device wrote to these frames; must be called before its ack counts."""
        raise NotImplementedError

    def export(self, pfn: Pfn, exporter: int) -> None:
        """Mark the frame external-rmap for this exporter and hold a reference for it. Idempotent."""
        raise NotImplementedError

    def unexport(self, pfn: Pfn, exporter: int) -> None:
        """Undo export; no effect if this exporter does not hold the frame."""
        raise NotImplementedError

    def exporters(self, pfn: Pfn) -> frozenset[int]:
        """Who exports the frame."""
        raise NotImplementedError

    def pin(self, pfns: Sequence[int]) -> None:
        """Take a long-term reference on each frame (see device.pin for addresses)."""
        raise NotImplementedError

    def unpin(self, pfns: Sequence[int]) -> None:
        raise NotImplementedError
