"""The bytes of all page frames: one sparse file in memory, mapped here and by clients on the same machine.

A memfd has no name, so nobody finds it who is not told; a client of the same user opens it through /proc/PID/fd/N.
A named file under /dev/shm serves where /proc is not shared, as between two containers with a common volume. Either
way only the frames that are used cost memory.

Who shortened the file would end the server at the next frame that it looks at (SIGBUS). The memfd is sealed against
that; a file with a name cannot be.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

__all__ = ["FrameStore"]

PAGE_SIZE = 4096


class FrameStore:
    """A sparse file of frames_nr pages, mapped into this process.

    A context manager: leaving it unmaps, closes and, when it has a name, unlinks.
    """

    def __init__(self, frames_nr: int, path: Path | None = None) -> None:
        """Make the file.

        Args:
            frames_nr: size in pages.
            path: where to make a named file, with mode 0600; None: a memfd.
        Raises: OSError when the file exists already or cannot be made.
        """
        self.named = path
        if path is None:
            self._fd = os.memfd_create("mmubus-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        else:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(self._fd, frames_nr * PAGE_SIZE)
            if path is None:
                fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.map = mmap.mmap(self._fd, frames_nr * PAGE_SIZE)
        except BaseException:
            os.close(self._fd)
            if path is not None:
                path.unlink()
            raise
        # Untouched pages of the file stay holes.
        self.map.madvise(mmap.MADV_DONTDUMP)

    @property
    def path(self) -> str:
        """Where a client on the same machine opens the frames."""
        return str(self.named) if self.named is not None else f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        if self.named is not None:
            self.named.unlink(missing_ok=True)
        try:
            self.map.close()
        except BufferError:
            # numpy arrays still look at it; the mapping goes with the last of them.
            return

    def __enter__(self) -> FrameStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
