"""The socket between the two: messages with a header of 16 bytes, commands and replies, in both directions."""

from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import Awaitable, Callable, Mapping
from enum import IntEnum
from typing import TypeAlias

from mmubus.errors import CallFailed, ConnectionLost, MmError, MmuBusError

__all__ = ["ACCESS", "DMA_BYTES_MAX", "MAP", "UNMAP", "Channel", "Command", "Handler"]

HEADER = struct.Struct("<HHIII")  # message id, command, size with header, flags, error
MAP = struct.Struct("<IIQQQ")  # argsz, flags, offset, address, size
UNMAP = struct.Struct("<IIQQ")  # argsz, flags, address, size
ACCESS = struct.Struct("<QQ")  # address, count
REPLY, ERROR = 1, 1 << 5
MESSAGE_BYTES_MAX = 2 << 20
DMA_BYTES_MAX = 256 << 10


class Command(IntEnum):
    """Those that are used here."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DMA_READ = 11
    DMA_WRITE = 12


Handler: TypeAlias = "Callable[[bytes], Awaitable[bytes]]"


class Channel:
    """One end of the socket: commands and their replies, in both directions.

    Args: handlers: what the other side may ask; each gets the payload and gives that of the reply.
    Attributes: commands, bytes_sent: so far.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handlers: Mapping[Command, Handler]
    ) -> None:
        self._reader, self._writer, self._handlers = reader, writer, handlers
        self._replies: dict[int, asyncio.Future[bytes]] = {}
        self._last = 0
        self.commands = self.bytes_sent = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._reading = asyncio.create_task(self._read())

    def command(self, command: Command, payload: bytes) -> asyncio.Future[bytes]:
        """Send a command, now. Returns: its reply's payload, to be awaited. Raises: ConnectionLost."""
        if self._reading.done():
            raise ConnectionLost("the other end of the vfio-user socket has gone")
        self._last = self._last + 1 & 0xFFFF
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._replies[self._last] = reply
        self.commands += 1
        self._send(self._last, command, 0, 0, payload)
        return reply

    async def close(self) -> None:
        """End it; commands without a reply fail with ConnectionLost."""
        self._reading.cancel()
        await asyncio.gather(self._reading, *self._tasks, return_exceptions=True)

    def _send(self, number: int, command: int, flags: int, error: int, payload: bytes) -> None:
        self._writer.write(HEADER.pack(number, command, HEADER.size + len(payload), flags, error) + payload)
        self.bytes_sent += HEADER.size + len(payload)

    async def _read(self) -> None:
        try:
            while True:
                number, command, size, flags, error = HEADER.unpack(await self._reader.readexactly(HEADER.size))
                if not HEADER.size <= size <= MESSAGE_BYTES_MAX:
                    return
                payload = await self._reader.readexactly(size - HEADER.size)
                if flags & 0xF == REPLY:
                    self._replied(number, flags, error, payload)
                else:
                    task = asyncio.create_task(self._handle(number, command, payload))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        except (OSError, EOFError):
            pass  # the other side has gone: the end of every channel
        finally:
            for reply in self._replies.values():
                if not reply.done():
                    reply.set_exception(ConnectionLost("the other end of the vfio-user socket has gone"))
            self._writer.close()

    def _replied(self, number: int, flags: int, error: int, payload: bytes) -> None:
        reply = self._replies.pop(number, None)
        if reply is None or reply.done():
            return
        if flags & ERROR:
            reply.set_exception(MmError(errno.errorcode.get(error, "EIO"), "the other side refused"))
        else:
            reply.set_result(payload)

    async def _handle(self, number: int, command: int, payload: bytes) -> None:
        try:
            answer = await self._handlers[Command(command)](payload)
        except (MmuBusError, ValueError, KeyError, struct.error) as refusal:
            name = refusal.reason if isinstance(refusal, CallFailed) else "EINVAL"
            self._send(number, command, REPLY | ERROR, getattr(errno, name, errno.EIO), b"")
        else:
            self._send(number, command, REPLY, 0, answer)
