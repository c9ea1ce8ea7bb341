"""The same without asyncio.

    with mmubus.sync.connect(name="my-driver") as bus:
        mm = bus.create_mm("program")
        address = mm.mmap(0, 1 << 20)
        mirror = bus.mirror(mm)
        mirror.write(address, b"hello")

Names, arguments and errors are those of the asynchronous face; nothing is awaited. A thread of the library's own runs
the connection, so notices are handled and acknowledged while the program does something else.

Handlers of notifiers run, as `connect(handlers=…)` says,
    "loop":    in that thread: the fast way, for handlers that touch their own tables and return. Calling back into
               the library raises CalledFromHandler there.
    "worker":  in a thread pool: for handlers that take time or call back. Overlapping ranges still run in order.
Either way they run beside the program: what both touch needs a lock.

Every call has the time-out of `connect(timeout_s=…)`. An interrupt (Ctrl-C) ends the call that waits, and leaving the
`with` block says goodbye to the server as always. One thread of a process should connect this way or with asyncio,
not both.
"""

from mmubus.sync.connection import Bus, Handlers, connect
from mmubus.sync.cpu import AddressSpace, File
from mmubus.sync.device import Mirror, Pin, Registration

__all__ = ["AddressSpace", "Bus", "File", "Handlers", "Mirror", "Pin", "Registration", "connect"]
