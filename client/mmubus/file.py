"""In-memory files, which address spaces map."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from mmu.v1 import address_space_pb2 as pb

from mmubus.authority import Grants, Owned
from mmubus.channel import unary
from mmubus.errors import MmError
from mmubus.linux import Op

if TYPE_CHECKING:
    from mmubus.connection import Bus

__all__ = ["File"]

TRANSFER_BYTES_MAX = 1 << 20  # bytes of one message; larger reads and writes are split


class File(Owned):
    """A file object. Made by `Bus.open_file`; goes into `AddressSpace.mmap`.

    Attributes:
        id: the server's number for it.
        name: "" when it has none.
        created: True when opening made it.
    """

    def __init__(self, bus: Bus, file: int, name: str, created: bool = False) -> None:
        self._bus = bus
        self._grants = Grants(bus, file=file)
        self.id = file
        self.name = name
        self.created = created

    def __repr__(self) -> str:
        return f"<File {self.id} {self.name!r}>"

    def __index__(self) -> int:
        return self.id

    __int__ = __index__

    async def pread(self, length: int, offset: int) -> bytes:
        """pread(2). Returns: the bytes, fewer than asked at the end of the file. Raises: MmError."""
        pieces: list[bytes] = []
        left = length
        while True:
            size = min(left, TRANSFER_BYTES_MAX)
            request = pb.ReadFileRequest(file=self.id, offset=offset, length=size)
            data = (await unary(self._bus.stubs.file.ReadFile(request))).data
            pieces.append(data)
            left -= len(data)
            offset += len(data)
            if len(data) < size or left <= 0:
                return b"".join(pieces)

    async def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> int:
        """pwrite(2): all of it. Returns: the number of bytes. Raises: MmError."""
        view = memoryview(data)
        for at in range(0, len(view), TRANSFER_BYTES_MAX) or (0,):
            piece = bytes(view[at : at + TRANSFER_BYTES_MAX])
            request = pb.WriteFileRequest(file=self.id, offset=offset + at, data=piece)
            await unary(self._bus.stubs.file.WriteFile(request))
        return len(view)

    async def truncate(self, size: int) -> None:
        """ftruncate(2). Raises: MmError."""
        await self._call(Op.FTRUNCATE, size)

    async def fsync(self) -> None:
        """fsync(2): dirty pages are written back, their writers write-protected first. Raises: MmError."""
        await self._call(Op.FSYNC)

    async def punch_hole(self, offset: int, length: int) -> None:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE. Raises: MmError."""
        await self._call(Op.PUNCH, offset, length)

    async def wp_shared(self, offset: int, length: int) -> int:
        """Protect pages against writing through shared mappings, so that each write is seen. Raises: MmError.

        Returns: how many page table entries were writable.
        """
        return await self._call(Op.WP_SHARED, offset, length)

    async def clean_record(self, offset: int, length: int) -> int:
        """Collect what has been written to through shared mappings. Raises: MmError.

        Returns: how many page table entries were dirty.
        """
        return await self._call(Op.CLEAN_RECORD, offset, length)

    async def unlink(self) -> None:
        """unlink(2): the name goes; the contents go with the last mapping. Raises: MmError."""
        await unary(self._bus.stubs.file.UnlinkFile(pb.UnlinkFileRequest(file=self.id)))

    async def _call(self, op: Op, *args: int) -> int:
        call = pb.Call(id=1, op=cast("pb.Op.ValueType", op.value), args=(self.id, *args))
        result = (await unary(self._bus.stubs.address_space.Call(pb.CallRequest(call=call)))).result
        if result.HasField("error"):
            raise MmError(result.error.errno, result.error.message)
        return result.ret
