"""Queue pairs: two processes, each with memory regions of its own, and bytes that move between them.

    requester                                  responder
    rdma_write(local, key, address)  ──data──► checks key, bounds, rights; into the region; answers
    rdma_read(local, key, address)   ────────► out of the region ──data──► into the local region
    send(local)                      ──data──► into the next receive buffer that was posted; waits for one

Each is over when it returns. It moves in pieces, and each piece goes through the region, which faults what is missing
and repeats what was overtaken: losing a page in the middle of a transfer costs time, and never puts a byte elsewhere.
What cannot be done (unmapped, wrong key) ends the transfer with an error; the pieces before it have been moved.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

from mmubus.drivers.rdma.mr import Access, MemoryRegion, ProtectionDomain
from mmubus.drivers.wire import Handler, Listener, Message, Wire, dial, listen
from mmubus.errors import CallFailed, ConnectionLost, MmError

__all__ = ["QueuePair", "QueuePairs", "RemoteAccessError"]

MTU_BYTES = 64 << 10


class RemoteAccessError(CallFailed):
    """The other side could not do its part: no such key, outside of the region, no such right, or unmapped there."""


class _Receive(NamedTuple):
    region: MemoryRegion
    address: int
    length: int
    done: asyncio.Future[int]


class QueuePair:
    """One end. Made by `QueuePair.connect`, or by `QueuePairs` for each that connects.

    Attributes: domain: whose regions the other side may use.
    """

    def __init__(self, domain: ProtectionDomain) -> None:
        self.domain = domain
        self._wire: Wire | None = None
        self._receives: deque[_Receive] = deque()
        self._posted = asyncio.Event()
        self._receiving = asyncio.Lock()
        self._sending = asyncio.Lock()

    @classmethod
    async def connect(cls, domain: ProtectionDomain, address: str) -> QueuePair:
        """Connect to the other process's QueuePairs. Raises: OSError."""
        self = cls(domain)
        self.carry(await dial(address, self.handlers()))
        return self

    def handlers(self) -> dict[str, Handler]:
        """What the other side may ask."""
        return {"read": self._read, "write": self._write, "send": self._send}

    def carry(self, wire: Wire) -> None:
        """The connection is there."""
        self._wire = wire

    async def close(self) -> None:
        """Disconnect; receives that wait fail with ConnectionLost."""
        await self._carried().close()
        for receive in self._receives:
            receive.done.set_exception(ConnectionLost("the queue pair was closed"))
        self._receives.clear()

    # The requester.

    async def rdma_write(self, local: MemoryRegion, address: int, length: int, key: int, remote: int) -> None:
        """Move local [address, +length) to the other side's region of that key, at the address remote.

        Raises: MmError when it is this side that fails; RemoteAccessError, ConnectionLost.
        """
        local.check(address, length, Access.LOCAL_READ)
        for at in range(0, length, MTU_BYTES):
            data = await local.read(address + at, min(MTU_BYTES, length - at))
            await self._ask("write", data, key=key, address=remote + at)

    async def rdma_read(self, local: MemoryRegion, address: int, length: int, key: int, remote: int) -> None:
        """Move the other side's bytes at remote into local [address, +length). Raises: as rdma_write."""
        local.check(address, length, Access.LOCAL_WRITE)
        for at in range(0, length, MTU_BYTES):
            answer = await self._ask("read", key=key, address=remote + at, length=min(MTU_BYTES, length - at))
            await local.write(address + at, answer.data)

    async def send(self, local: MemoryRegion, address: int, length: int) -> None:
        """Move local bytes into the next buffer that the other side has posted, when it has. Raises: as rdma_write.

        Sends arrive in the order in which they were begun, as on a reliable connection: each waits for the one before.
        """
        local.check(address, length, Access.LOCAL_READ)
        async with self._sending:
            await self._ask("send", await local.read(address, length))

    async def receive(self, local: MemoryRegion, address: int, length: int) -> int:
        """Post a buffer and wait until something was sent into it. Returns: bytes. Raises: MmError, ConnectionLost."""
        local.check(address, length, Access.LOCAL_WRITE)
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._receives.append(_Receive(local, address, length, done))
        self._posted.set()
        return await done

    async def _ask(self, name: str, data: bytes = b"", **fields: int) -> Message:
        try:
            return await self._carried().ask(name, data, commit=None, **fields)
        except CallFailed as error:
            raise RemoteAccessError(error.reason, error.message) from error

    def _carried(self) -> Wire:
        if self._wire is None:
            raise ConnectionLost("the queue pair is not connected")
        return self._wire

    # The responder.

    async def _read(self, message: Message) -> None:
        region = self.domain.region(message["key"])
        region.check(message["address"], message["length"], Access.REMOTE_READ)
        message.reply(await region.read(message["address"], message["length"]))

    async def _write(self, message: Message) -> None:
        region = self.domain.region(message["key"])
        region.check(message["address"], len(message.data), Access.REMOTE_WRITE)
        await region.write(message["address"], message.data)
        message.reply()

    async def _send(self, message: Message) -> None:
        async with self._receiving:  # buffers are filled in the order in which sends came
            while not self._receives:  # receiver not ready
                self._posted.clear()
                await self._posted.wait()
            receive = self._receives.popleft()
            try:
                if len(message.data) > receive.length:
                    raise MmError("EMSGSIZE", f"{len(message.data)} bytes do not fit into {receive.length}")
                await receive.region.write(receive.address, message.data)
            except MmError as error:
                receive.done.set_exception(error)
                raise
            receive.done.set_result(len(message.data))
        message.reply()


class QueuePairs:
    """Where other processes connect to: a queue pair for each. Made by `listen`."""

    def __init__(self, domain: ProtectionDomain) -> None:
        self.domain = domain
        self.pairs: list[QueuePair] = []
        self._listener: Listener | None = None
        self._accepted: asyncio.Queue[QueuePair] = asyncio.Queue()

    @classmethod
    async def listen(cls, domain: ProtectionDomain, address: str) -> QueuePairs:
        """Args: address: unix:/path, or host:port with port 0 for a free one. Raises: OSError."""
        self = cls(domain)
        self._listener = await listen(address, self._connected)
        return self

    @property
    def address(self) -> str:
        """What to connect to."""
        assert self._listener is not None, "made by QueuePairs.listen"
        return self._listener.address

    async def accept(self) -> QueuePair:
        """The next one that connects."""
        return await self._accepted.get()

    async def close(self) -> None:
        """Disconnect everyone."""
        if self._listener is not None:
            self._listener.close()
        for pair in self.pairs:
            await pair.close()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = QueuePair(self.domain)
        pair.carry(Wire(reader, writer, pair.handlers()))
        self.pairs.append(pair)
        self._accepted.put_nowait(pair)
