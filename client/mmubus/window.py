"""The frames themselves, on the same machine: the server's shared-memory file, mapped.

An access through the window is checked by nobody: it is what DMA is. The rule that keeps it right: look the page up
and copy in one plain stretch of code. A notice is handled only between two awaits, and no frame is given to anybody
else before it is acknowledged. `Mirror` does that; whoever uses a window by hand must do it too.

A server that goes on where another one was killed has its frames in another file. The session has its windows follow
there before anything may be used again. What this process had written to the old file, and the server has not looked
at, is there alone: `Mirror` carries it over, and whoever writes by hand does it with `carries`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from weakref import WeakMethod

from mmubus.linux import PAGE_SHIFT, PAGE_SIZE

__all__ = ["FrameWindow"]


class FrameWindow:
    """A mapping of every frame's bytes.

    Args:
        path: Welcome's frames_path, `Session.frames_path`.
        writable: map it for writing too.
    Raises: OSError when it is not on this machine, or not for us.
    """

    def __init__(self, path: str, *, writable: bool = False) -> None:
        self.writable = writable
        self._carried: list[WeakMethod[Callable[[], Iterable[int]]]] = []
        self._open(path)

    def _open(self, path: str) -> None:
        descriptor = os.open(path, (os.O_RDWR if self.writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
            self._map = mmap.mmap(descriptor, status.st_size, flags=mmap.MAP_SHARED, prot=protection)
        finally:
            os.close(descriptor)
        self._file = (status.st_dev, status.st_ino)
        self.frames_nr = status.st_size >> PAGE_SHIFT
        self._view = memoryview(self._map)

    def carries(self, written: Callable[[], Iterable[int]]) -> None:
        """Carry bytes over when the server's frames are in another file.

        Args: written: a method that tells the frames that its object has written to, and still holds.
        """
        self._carried.append(WeakMethod(written))

    def follow(self, path: str) -> bool:
        """The session goes on with a server whose frames are there. Requires: nothing is being accessed.

        Returns: whether it is another file. Raises: OSError when it cannot be mapped; the window is the old one then.
        """
        status = os.stat(path)
        if (status.st_dev, status.st_ino) == self._file:
            return False
        before = self._view
        self._open(path)
        for method in self._carried:
            written = method()
            for pfn in written() if written is not None and self.writable else ():
                self.page(pfn)[:] = before[pfn << PAGE_SHIFT : (pfn + 1) << PAGE_SHIFT]
        return True

    def page(self, pfn: int) -> memoryview:
        """The bytes of a frame. Raises: IndexError when there is no such frame."""
        if not 0 <= pfn < self.frames_nr:
            raise IndexError(f"pfn {pfn} is outside of the {self.frames_nr} frames")
        return self._view[pfn << PAGE_SHIFT : (pfn << PAGE_SHIFT) + PAGE_SIZE]

    def close(self) -> None:
        """Unmap. Raises: BufferError while somebody holds a page's view."""
        self._view.release()
        self._map.close()
