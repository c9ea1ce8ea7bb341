"""RDMA: memory regions of three kinds, and queue pairs between two processes that move bytes between them."""

from mmubus.drivers.rdma.mr import Access, BufferRegion, MemoryRegion, PinnedRegion, ProtectionDomain
from mmubus.drivers.rdma.odp import OnDemandRegion
from mmubus.drivers.rdma.qp import QueuePair, QueuePairs, RemoteAccessError
from mmubus.drivers.rdma.rcache import CachedRegion, RegistrationCache

__all__ = [
    "Access",
    "BufferRegion",
    "CachedRegion",
    "MemoryRegion",
    "OnDemandRegion",
    "PinnedRegion",
    "ProtectionDomain",
    "QueuePair",
    "QueuePairs",
    "RegistrationCache",
    "RemoteAccessError",
]
