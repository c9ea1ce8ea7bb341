"""Memory regions: parts of an address space that a NIC may reach, each under a key.

Three kinds, and what each promises when the program changes its memory meanwhile:

    pinned      the frames stay, whatever happens to the addresses. No notifier, no retry, and after a munmap the region
                still reaches what used to be there: that is the price.
    on demand   nothing stays. Pages are faulted in when they are used and given up when they are taken (`odp`).
    cached      pinned, and kept for the next time: a registration costs far more than a transfer. Here a notifier
                sees to it that what is kept is still what the address means (`rcache`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntFlag

from mmubus.address_space import AddressSpace
from mmubus.connection import Bus
from mmubus.device import Pin
from mmubus.drivers.dma import alive
from mmubus.errors import MmError, NotFound
from mmubus.linux import PAGE_SIZE
from mmubus.notifier import Answer, Notifier

__all__ = ["Access", "BufferRegion", "MemoryRegion", "PinnedRegion", "ProtectionDomain"]

PIECE_BYTES_MAX = 256 << 10


class Access(IntFlag):
    """What may be done through a region. Reading locally is always allowed. Kernel: enum ib_access_flags."""

    LOCAL_READ = 0
    LOCAL_WRITE = 1
    REMOTE_WRITE = 2
    REMOTE_READ = 4

    @property
    def writable(self) -> bool:
        """Whether anybody may write through it."""
        return bool(self & (Access.LOCAL_WRITE | Access.REMOTE_WRITE))


class MemoryRegion(ABC):
    """[address, address + length) of a program, as a NIC reaches it. Attributes: key: set by the protection domain."""

    def __init__(self, address: int, length: int, access: Access) -> None:
        self.address = address
        self.length = length
        self.access = access
        self.key = 0

    @abstractmethod
    async def read(self, address: int, length: int) -> bytes:
        """The bytes there. Raises: MmError (EFAULT: unmapped), Fenced, ..."""

    @abstractmethod
    async def write(self, address: int, data: bytes) -> None:
        """Change the bytes there. Raises: as read."""

    @abstractmethod
    async def deregister(self) -> None:
        """Give up everything that it holds."""

    def check(self, address: int, length: int, needed: Access) -> None:
        """Raises: MmError: EFAULT outside of the region, EPERM when it may not be used so."""
        if not self.address <= address <= address + length <= self.address + self.length:
            raise MmError("EFAULT", f"[{address:#x}, +{length}) is not in the region at {self.address:#x}")
        if needed & ~self.access:
            raise MmError("EPERM", f"region {self.key} does not allow {needed & ~self.access!r}")


class BufferRegion(MemoryRegion):
    """Bytes of this process itself, which nobody takes away: the near side of a transfer. Attributes: buffer."""

    def __init__(self, length: int, access: Access = Access.LOCAL_WRITE) -> None:
        super().__init__(0, length, access)
        self.buffer = bytearray(length)

    async def read(self, address: int, length: int) -> bytes:
        return bytes(self.buffer[address : address + length])

    async def write(self, address: int, data: bytes) -> None:
        self.buffer[address : address + len(data)] = data

    async def deregister(self) -> None:
        """It holds nothing."""


class PinnedRegion(MemoryRegion):
    """A region whose frames are pinned. Kernel: ib_umem_get(), drivers/infiniband/core/umem.c."""

    def __init__(self, pin: Pin, address: int, length: int, access: Access) -> None:
        super().__init__(address, length, access)
        self._pin: Pin | None = pin

    async def read(self, address: int, length: int) -> bytes:
        pin, offset = self._pinned(address)
        pieces = range(offset, offset + length, PIECE_BYTES_MAX)
        return b"".join([await pin.read(at, min(PIECE_BYTES_MAX, offset + length - at)) for at in pieces])

    async def write(self, address: int, data: bytes) -> None:
        pin, offset = self._pinned(address)
        for at in range(0, len(data), PIECE_BYTES_MAX):
            await pin.write(offset + at, data[at : at + PIECE_BYTES_MAX])

    async def deregister(self) -> None:
        """Give the frames back; those of a writable region as dirty, since nobody noted what was written."""
        if (pin := self._pin) is not None:
            self._pin = None
            await pin.unpin(dirty=self.access.writable)

    def _pinned(self, address: int) -> tuple[Pin, int]:
        if self._pin is None:
            raise NotFound("NO_SUCH_REGION", "the region has been deregistered")
        return self._pin, address - self._pin.translations.start


class ProtectionDomain(Notifier):
    """The regions of one address space, by key. Made by `open`. Kernel: struct ib_pd.

    It is a notifier because pins are taken in a registration's name; it never holds a translation, so it is told
    nothing.
    """

    def __init__(self, bus: Bus, mm: AddressSpace | int) -> None:
        self.bus = bus
        self.mm = mm.__index__()
        self.regions: dict[int, MemoryRegion] = {}
        self._last_key = 0

    @classmethod
    async def open(cls, bus: Bus, mm: AddressSpace | int) -> ProtectionDomain:
        """Raises: MmError, ConnectionLost."""
        self = cls(bus, mm)
        await bus.register(self, mm, only_held=True, name="rdma")
        return self

    async def pin(self, address: int, length: int, access: Access = Access.LOCAL_WRITE) -> PinnedRegion:
        """Register a pinned region. Kernel: ib_reg_user_mr(). Raises: MmError."""
        region = await pinned(self, address, length, access)
        self.add(region)
        return region

    def add(self, region: MemoryRegion) -> int:
        """Make a region reachable. Returns: its key, to be told to the other side."""
        self._last_key += 1
        region.key = self._last_key
        self.regions[region.key] = region
        return region.key

    async def remove(self, region: MemoryRegion) -> None:
        """Nobody reaches the region any more. Kernel: ib_dereg_mr()."""
        self.regions.pop(region.key, None)
        await region.deregister()

    def region(self, key: int) -> MemoryRegion:
        """Raises: NotFound: no region has that key."""
        region = self.regions.get(key)
        if region is None:
            raise NotFound("NO_SUCH_REGION", f"no memory region has the key {key}")
        return region

    async def close(self) -> None:
        """Deregister everything."""
        for region in list(self.regions.values()):
            await self.remove(region)
        if self.registration is not None:
            await self.registration.unregister()

    def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> Answer:
        return None  # pins stay

    def release(self, mm: int) -> Answer:
        return None

    def age_page(self, mm: int, address: int) -> Answer:
        return None


async def pinned(notifier: Notifier, address: int, length: int, access: Access) -> PinnedRegion:
    """Pin the pages of [address, address + length) in the name of a notifier. Raises: MmError."""
    start, end = address & -PAGE_SIZE, -(-(address + length) // PAGE_SIZE) * PAGE_SIZE
    return PinnedRegion(await alive(notifier).pin(start, end, access.writable), address, length, access)
