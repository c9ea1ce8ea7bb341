"""In-memory files by name and by id."""

from __future__ import annotations

import numpy as np
from mmu.v1 import address_space_pb2 as pb

from mmubusd.mm.addr import PAGE_SIZE, PMD_SIZE, FileId, pages
from mmubusd.mm.errno import MmError
from mmubusd.mm.file import File
from mmubusd.mm.frame import DIRTY
from mmubusd.rpc.calls import Calls, label_of
from mmubusd.rpc.driver import Driver
from mmubusd.rpc.identity import Principal
from mmubusd.rpc.methods import Context
from mmubusd.rpc.roles import Role
from mmubusd.rpc.session_requests import check_name

__all__ = ["FileService"]

KINDS = {
    pb.FILE_KIND_DISK: "disk",
    pb.FILE_KIND_SHM: "shm",
    pb.FILE_KIND_XIP: "xip",
    pb.FILE_KIND_HUGETLB: "hugetlb",
}
NUMBERS = {name: number for number, name in KINDS.items()}


class FileService:
    """Implements mmu.v1.FileService."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._memory = driver.memory
        self._bus = driver.bus
        self._calls = Calls(driver)
        self._authority = driver.authority
        # Names are each principal's own, so that nobody learns which names others have taken.
        self._by_name: dict[tuple[str, str], FileId] = driver.bus.remembered.setdefault("name", {})

    async def open_file(self, request: pb.OpenFileRequest, context: Context) -> pb.OpenFileResponse:
        """A name that exists is opened as it is; size and cached are for a new file."""
        check_name(request.name)
        who = self._authority.caller(context)
        known = self._known(who, request.name) if request.name else None
        if known is not None:
            return self._open(known, request.kind)
        self._driver.admit()
        kind = KINDS.get(request.kind)
        if kind is None:
            raise MmError("EINVAL", f"kind {request.kind}: a new file is of FILE_KIND_DISK, _SHM, _XIP or _HUGETLB")
        if kind == "hugetlb" and request.size % PMD_SIZE:
            raise MmError("EINVAL", f"size {request.size}: a file of hugetlbfs has huge pages of {PMD_SIZE} bytes")
        self._calls.file_fits(request.size)
        self._driver.quotas.check_file(who)
        memcg = self._driver.quotas.memcg(who)
        room = self._memory.room(self._memory.memcg(memcg))
        if request.cached and pages(request.size) > room:
            raise MmError("ENOMEM", f"{pages(request.size)} pages to cache, but only {room} frames are to be had")
        file_id = self._bus.create_file(request.name, kind, pages(request.size), request.cached, memcg)
        self._authority.file_created(who, file_id)
        if request.name:
            self._bus.remember("name", (who.name, request.name), file_id)
        if request.size % PAGE_SIZE:
            await self._run("ftruncate", file_id, request.size)
        return pb.OpenFileResponse(file=file_id, created=True, size=request.size)

    def _known(self, who: Principal, name: str) -> File | None:
        """The file that this caller means by a name: its own first, else the oldest of others that it may read."""
        own = self._by_name.get((who.name, name))
        if own is not None or self._authority.open:
            return None if own is None else self._memory.file(own)
        others = (file for (_, known), file in self._by_name.items() if known == name)
        seen = [file for file in others if self._authority.roles_on_file(who, file) & Role.OBSERVE]
        return self._memory.file(seen[0]) if seen else None

    def _open(self, file: File, kind: int) -> pb.OpenFileResponse:
        if kind not in (pb.FILE_KIND_UNSPECIFIED, NUMBERS[file.kind]):
            raise MmError("EEXIST", f"{file.name!r} exists and is of kind {file.kind}")
        return pb.OpenFileResponse(file=file.id, created=False, size=file.size)

    async def read_file(self, request: pb.ReadFileRequest, context: Context) -> pb.ReadFileResponse:
        self._calls.data_fits(request.length)
        self._authority.check_file(self._authority.caller(context), Role.OBSERVE, request.file)
        if request.offset >= 1 << 63:
            raise MmError("EINVAL", f"offset {request.offset} is negative, as a file offset")
        return pb.ReadFileResponse(data=self._bus.read_file(request.file, request.offset, request.length))

    async def write_file(self, request: pb.WriteFileRequest, context: Context) -> pb.WriteFileResponse:
        self._authority.check_file(self._authority.caller(context), Role.ACCESS, request.file)
        file = self._memory.file(FileId(request.file))
        if request.offset >= 1 << 63:
            raise MmError("EINVAL", f"offset {request.offset} is negative, as a file offset")
        self._calls.file_fits(request.offset + len(request.data))
        await self._run("write_file", file.id, request.offset, data=request.data)
        return pb.WriteFileResponse(size=file.size)

    async def unlink_file(self, request: pb.UnlinkFileRequest, context: Context) -> pb.UnlinkFileResponse:
        self._authority.check_file(self._authority.caller(context), Role.OWN, request.file)
        file = self._memory.file(FileId(request.file))
        self._driver.admit()
        self._bus.unlink(file.id)
        for key in [key for key, known in self._by_name.items() if known == file.id]:
            self._bus.remember("name", key, None)
        return pb.UnlinkFileResponse()

    async def list_files(self, request: pb.ListFilesRequest, context: Context) -> pb.ListFilesResponse:
        who = self._authority.caller(context)
        seen = [
            file
            for file in self._memory.files.values()
            if file.linked and self._authority.roles_on_file(who, file.id) & Role.OBSERVE
        ]
        return pb.ListFilesResponse(files=[self._message(file) for file in seen])

    def _message(self, file: File) -> pb.File:
        cached = np.array([pfn for _, pfn in file.cache.items()], np.int64)
        dirty = int(np.count_nonzero(self._memory.frames.flags[cached] & DIRTY)) if len(cached) else 0
        return pb.File(
            file=file.id,
            name=file.name,
            kind=NUMBERS[file.kind],
            size=file.size,
            cached=len(cached),
            dirty=dirty,
            mappings=file.users_nr,
        )

    async def _run(self, name: str, *args: int, data: bytes = b"") -> object:
        label = label_of(name, 0, (*args, len(data)) if data else args)
        return await self._driver.run(self._bus.call, 0, name, args, data=data, label=label)
