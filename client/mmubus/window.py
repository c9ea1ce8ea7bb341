"""The frames themselves, on the same machine: the server's shared-memory file, mapped.

An access through the window is checked by nobody: it is what DMA is. The rule that keeps it right: look the page up
and copy in one plain stretch of code. A notice is handled only between two awaits, and no frame is given to anybody
else before it is acknowledged. `Mirror` does that; whoever uses a window by hand must do it too.
"""

from __future__ import annotations

import mmap
import os

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
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self._map = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=protection)
        finally:
            os.close(descriptor)
        self.writable = writable
        self.frames_nr = size >> PAGE_SHIFT
        self._view = memoryview(self._map)

    def page(self, pfn: int) -> memoryview:
        """The bytes of a frame. Raises: IndexError when there is no such frame."""
        if not 0 <= pfn < self.frames_nr:
            raise IndexError(f"pfn {pfn} is outside of the {self.frames_nr} frames")
        return self._view[pfn << PAGE_SHIFT : (pfn << PAGE_SHIFT) + PAGE_SIZE]

    def close(self) -> None:
        """Unmap. Raises: BufferError while somebody holds a page's view."""
        self._view.release()
        self._map.close()
