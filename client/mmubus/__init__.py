"""mmubus: be a secondary MMU of an address space in another process.

    import asyncio, mmubus

    async def main():
        async with mmubus.connect(name="my-driver") as bus:
            mm = await bus.create_mm("program")
            addr = await mm.mmap(0, 1 << 20)
            mirror = await bus.mirror(mm)
            await mirror.write(addr, b"hello")

`connect` gives a `Bus`: address spaces and files for the CPU's side, `register` and `mirror` for the device's.
`mmubus.sync` has the same without asyncio. Names are imported when they are first used, so that `import mmubus` costs
next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from mmubus.errors import (
    Busy,
    CalledFromHandler,
    CallFailed,
    ConnectionLost,
    Draining,
    Fenced,
    LimitExceeded,
    MirrorVoid,
    MmError,
    MmuBusError,
    NotFound,
    ProtocolError,
    Refuse,
    RetriesExhausted,
    SessionError,
    StaleTranslation,
    Unregistered,
    UnsafeConnection,
)
from mmubus.linux import (
    MADV_COLD,
    MADV_COLLAPSE,
    MADV_DODUMP,
    MADV_DOFORK,
    MADV_DONTDUMP,
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_DONTNEED_LOCKED,
    MADV_FREE,
    MADV_HUGEPAGE,
    MADV_HWPOISON,
    MADV_KEEPONFORK,
    MADV_MERGEABLE,
    MADV_NOHUGEPAGE,
    MADV_NORMAL,
    MADV_PAGEOUT,
    MADV_POPULATE_READ,
    MADV_POPULATE_WRITE,
    MADV_RANDOM,
    MADV_REMOVE,
    MADV_SEQUENTIAL,
    MADV_SOFT_OFFLINE,
    MADV_UNMERGEABLE,
    MADV_WILLNEED,
    MADV_WIPEONFORK,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_GROWSDOWN,
    MAP_HUGETLB,
    MAP_LOCKED,
    MAP_NONBLOCK,
    MAP_NORESERVE,
    MAP_POPULATE,
    MAP_PRIVATE,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    MAP_STACK,
    MPOL_BIND,
    MPOL_DEFAULT,
    MPOL_F_ADDR,
    MPOL_F_MEMS_ALLOWED,
    MPOL_F_NODE,
    MPOL_F_NUMA_BALANCING,
    MPOL_F_RELATIVE_NODES,
    MPOL_F_STATIC_NODES,
    MPOL_INTERLEAVE,
    MPOL_LOCAL,
    MPOL_MF_MOVE,
    MPOL_MF_MOVE_ALL,
    MPOL_MF_STRICT,
    MPOL_PREFERRED,
    MPOL_PREFERRED_MANY,
    MPOL_WEIGHTED_INTERLEAVE,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    MS_ASYNC,
    MS_INVALIDATE,
    MS_SYNC,
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    TASK_SIZE,
    FileKind,
    HugePages,
    MadvFlag,
    MapFlag,
    MremapFlag,
    MsFlag,
    NotifierOp,
    Op,
    ProtFlag,
    Reason,
)

if TYPE_CHECKING:
    from mmubus import sync
    from mmubus.address_space import AddressSpace
    from mmubus.authority import Grant, Role, WhoAmI
    from mmubus.connection import Bus, connect
    from mmubus.device import Pin, Translations
    from mmubus.file import File
    from mmubus.inspection import InitialMapping, Inspection, Mapping, PageRun
    from mmubus.mirror import Mirror
    from mmubus.notifier import Notifier, NotifierRange, RmapNotifier
    from mmubus.operations import Notification, Operations, Result
    from mmubus.registration import Registration
    from mmubus.window import FrameWindow

__all__ = [
    "MADV_COLD",
    "MADV_COLLAPSE",
    "MADV_DODUMP",
    "MADV_DOFORK",
    "MADV_DONTDUMP",
    "MADV_DONTFORK",
    "MADV_DONTNEED",
    "MADV_DONTNEED_LOCKED",
    "MADV_FREE",
    "MADV_HUGEPAGE",
    "MADV_HWPOISON",
    "MADV_KEEPONFORK",
    "MADV_MERGEABLE",
    "MADV_NOHUGEPAGE",
    "MADV_NORMAL",
    "MADV_PAGEOUT",
    "MADV_POPULATE_READ",
    "MADV_POPULATE_WRITE",
    "MADV_RANDOM",
    "MADV_REMOVE",
    "MADV_SEQUENTIAL",
    "MADV_SOFT_OFFLINE",
    "MADV_UNMERGEABLE",
    "MADV_WILLNEED",
    "MADV_WIPEONFORK",
    "MAP_ANONYMOUS",
    "MAP_FIXED",
    "MAP_FIXED_NOREPLACE",
    "MAP_GROWSDOWN",
    "MAP_HUGETLB",
    "MAP_LOCKED",
    "MAP_NONBLOCK",
    "MAP_NORESERVE",
    "MAP_POPULATE",
    "MAP_PRIVATE",
    "MAP_SHARED",
    "MAP_SHARED_VALIDATE",
    "MAP_STACK",
    "MPOL_BIND",
    "MPOL_DEFAULT",
    "MPOL_F_ADDR",
    "MPOL_F_MEMS_ALLOWED",
    "MPOL_F_NODE",
    "MPOL_F_NUMA_BALANCING",
    "MPOL_F_RELATIVE_NODES",
    "MPOL_F_STATIC_NODES",
    "MPOL_INTERLEAVE",
    "MPOL_LOCAL",
    "MPOL_MF_MOVE",
    "MPOL_MF_MOVE_ALL",
    "MPOL_MF_STRICT",
    "MPOL_PREFERRED",
    "MPOL_PREFERRED_MANY",
    "MPOL_WEIGHTED_INTERLEAVE",
    "MREMAP_DONTUNMAP",
    "MREMAP_FIXED",
    "MREMAP_MAYMOVE",
    "MS_ASYNC",
    "MS_INVALIDATE",
    "MS_SYNC",
    "PAGE_MASK",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "PROT_EXEC",
    "PROT_NONE",
    "PROT_READ",
    "PROT_WRITE",
    "TASK_SIZE",
    "AddressSpace",
    "Bus",
    "Busy",
    "CallFailed",
    "CalledFromHandler",
    "ConnectionLost",
    "Draining",
    "Fenced",
    "File",
    "FileKind",
    "FrameWindow",
    "Grant",
    "HugePages",
    "InitialMapping",
    "Inspection",
    "LimitExceeded",
    "MadvFlag",
    "MapFlag",
    "Mapping",
    "Mirror",
    "MirrorVoid",
    "MmError",
    "MmuBusError",
    "MremapFlag",
    "MsFlag",
    "NotFound",
    "Notification",
    "Notifier",
    "NotifierOp",
    "NotifierRange",
    "Op",
    "Operations",
    "PageRun",
    "Pin",
    "ProtFlag",
    "ProtocolError",
    "Reason",
    "Refuse",
    "Registration",
    "Result",
    "RetriesExhausted",
    "RmapNotifier",
    "Role",
    "SessionError",
    "StaleTranslation",
    "Translations",
    "Unregistered",
    "UnsafeConnection",
    "WhoAmI",
    "connect",
    "sync",
]

_HOME = {
    "AddressSpace": "address_space",
    "Bus": "connection",
    "File": "file",
    "FrameWindow": "window",
    "Grant": "authority",
    "InitialMapping": "inspection",
    "Inspection": "inspection",
    "Mapping": "inspection",
    "Mirror": "mirror",
    "Notification": "operations",
    "Notifier": "notifier",
    "NotifierRange": "notifier",
    "Operations": "operations",
    "PageRun": "inspection",
    "Pin": "device",
    "Registration": "registration",
    "Result": "operations",
    "RmapNotifier": "notifier",
    "Role": "authority",
    "Translations": "device",
    "WhoAmI": "authority",
    "connect": "connection",
}
"""Where the names are at home whose modules need grpc or numpy."""


def __getattr__(name: str) -> object:
    """Import a name when it is first used (PEP 562)."""
    if name == "sync":
        return import_module("mmubus.sync")
    if home := _HOME.get(name):
        found: object = getattr(import_module(f"mmubus.{home}"), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
