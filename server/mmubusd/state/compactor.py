"""`python -m mmubusd.state.compactor DIR SEGMENT`: make the checkpoint that a segment begins with.

A process of its own, so that the server's loop does not stand still meanwhile. It only reads what is finished and
writes a file under another name; the server puts that in place.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.state.disk import Directory
from mmubusd.state.errors import StateError
from mmubusd.state.keeper import compact

__all__ = ["main"]

NICE = 10
FAILED = 1


def main(arguments: Sequence[str]) -> int:
    """Returns: the exit status."""
    path, segment = Path(arguments[0]), int(arguments[1])
    os.nice(NICE)
    directory = Directory(path, locked=False)
    try:
        compact(directory, segment, lambda frames_nr: memoryview(mmap.mmap(-1, frames_nr * PAGE_SIZE)))
    except (OSError, StateError) as error:
        print(f"mmubusd.state.compactor: {path}: {error}", file=sys.stderr)
        return FAILED
    finally:
        directory.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
