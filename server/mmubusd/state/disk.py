"""A directory, as far as this room needs one: few operations, each of them a point where the machine may stop.

What counts as kept is what was synced: a file's bytes by its own `sync`, names by the directory's.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Protocol

from mmubusd.state.errors import StateError

__all__ = ["Directory", "Disk", "File"]

LOCK, BESIDE = "lock", "store"
"""Files that are no part of the state: who has it, and where its server's frames are."""


class File(Protocol):
    """A file that is written at its end."""

    def write(self, data: bytes) -> None:
        """Raises: OSError; part of it may have been written."""

    def sync(self) -> None:
        """What was written is kept when it returns. Raises: OSError."""

    def cut(self, size: int) -> None:
        """Nothing is behind so many bytes. Raises: OSError."""

    def close(self) -> None: ...


class Disk(Protocol):
    """Files by name. Everything raises OSError."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes: ...

    def create(self, name: str) -> File:
        """An empty file, in place of any of that name."""

    def open(self, name: str) -> File:
        """One that is there, to write at its end."""

    def rename(self, name: str, to: str) -> None:
        """At once, in place of any of that name."""

    def remove(self, name: str) -> None: ...

    def sync(self) -> None:
        """Names are kept as they are when it returns."""


class Directory:
    """A real directory, this process's own while it is open.

    Raises: StateError when another server has it, OSError when it cannot be used.
    """

    def __init__(self, path: Path, *, locked: bool = True) -> None:
        """Args: locked: keep others out; False for a process that only helps the one that has the lock."""
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock = -1
        if locked:
            try:
                self._lock = self._take_lock()
            except BaseException:
                os.close(self._fd)
                raise

    def _take_lock(self) -> int:
        fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise StateError(f"{self.path} is in use: process {who or 'unknown'} has it") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return fd

    def names(self) -> list[str]:
        return sorted(name for name in os.listdir(self._fd) if name not in (LOCK, BESIDE))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def create(self, name: str) -> File:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        return _Appended(os.open(name, flags, 0o600, dir_fd=self._fd))

    def open(self, name: str) -> File:
        return _Appended(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, dir_fd=self._fd))

    def rename(self, name: str, to: str) -> None:
        os.rename(name, to, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, name: str) -> None:
        os.unlink(name, dir_fd=self._fd)

    def sync(self) -> None:
        os.fsync(self._fd)

    def frames_file(self) -> str:
        """The file that a server before this one had its frames in, and may have left; "" for none."""
        try:
            return (self.path / BESIDE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def note_frames_file(self, path: str) -> None:
        """For the next server."""
        (self.path / BESIDE).write_text(path, encoding="utf-8")

    def close(self) -> None:
        """Let others have it. Idempotent."""
        for fd in (self._lock, self._fd):
            if fd >= 0:
                os.close(fd)
        self._lock = self._fd = -1


class _Appended:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._fd, left) :]

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def cut(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def close(self) -> None:
        os.close(self._fd)
