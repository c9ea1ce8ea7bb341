"""Which file each mapping of a program recording shows, and how large it must be.

A recording names the files of a snapshot ("device:inode") and only the descriptor of a later mmap; closing and opening
are not recorded. So the whole recording is looked through before it is played:

* a snapshot's file is one file object, as large as the farthest mapping of it in any snapshot;
* an mmap of a descriptor is a file object of its own, with one exception: a MAP_FIXED one inside of the last mapping of
  the same descriptor is the loader placing the segments of one file, and shows that same file.

What the kernel notifies does not depend on which file it is, only on where mappings are and what is private.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from mmubus.linux import MAP_ANONYMOUS, MAP_FIXED, PAGE_SIZE, FileKind
from mmubus.trace.format import Operation, Snapshot

__all__ = ["FileKey", "FilePlan", "plan_files"]

FileKey: TypeAlias = "tuple[str, int]"
"""("device:inode", 0), ("fd", number of the operation that mapped it first), ("special", its address)."""


@dataclass(slots=True)
class FilePlan:
    """sizes: bytes; kinds; mapped: operation number -> what its mmap shows."""

    sizes: dict[FileKey, int] = field(default_factory=dict)
    kinds: dict[FileKey, FileKind] = field(default_factory=dict)
    mapped: dict[int, FileKey] = field(default_factory=dict)

    def need(self, key: FileKey, size: int, kind: FileKind) -> None:
        """The file must reach this far."""
        size = (size + PAGE_SIZE - 1) & -PAGE_SIZE
        self.sizes[key] = max(size, self.sizes.get(key, 0))
        self.kinds.setdefault(key, kind)


def plan_files(operations: Sequence[Operation]) -> FilePlan:
    """Look through a recording."""
    plan = FilePlan()
    last: dict[tuple[int, int], tuple[FileKey, int, int]] = {}
    for operation in operations:
        if operation.op == "process":
            for mapping in operation.maps:
                if key := key_of(mapping):
                    plan.need(key, mapping.offset + mapping.end - mapping.start, kind_of(mapping))
        elif operation.op == "mmap" and not operation.args[3] & MAP_ANONYMOUS and operation.ret is not None:
            _, length, _, flags, descriptor, offset = operation.args
            start, end = operation.ret, operation.ret + length
            key = "fd", operation.number
            before = last.get((operation.pid, descriptor))
            if before and flags & MAP_FIXED and before[1] <= start < before[2]:
                key = before[0]
            else:
                last[operation.pid, descriptor] = key, start, end
            plan.need(key, offset + length, FileKind.DISK)
            plan.mapped[operation.number] = key
    return plan


def key_of(mapping: Snapshot) -> FileKey | None:
    """The file of a snapshot's mapping; what has file pages but no file, as the vDSO, is a file of its own."""
    if mapping.file is not None:
        return mapping.file, 0
    if any(kind == "f" for _, _, kind in mapping.resident):
        return "special", mapping.start
    return None


def kind_of(mapping: Snapshot) -> FileKind:
    """Shared memory has a device without a major number; so have some file systems, but not where it matters here."""
    if mapping.file is None or (mapping.file.startswith("00:") and mapping.protection.endswith("s")):
        return FileKind.SHM
    return FileKind.DISK
