"""The simulated memory manager."""

from mmubusd.mm.errno import MmError
from mmubusd.mm.memory import Memory
from mmubusd.mm.mm import Mapping, Mm

__all__ = ["Mapping", "Memory", "Mm", "MmError"]
