"""A device in another process that is told what it may reach: vfio-user's DMA_MAP and DMA_UNMAP, on top of the bus.

    program          VMM (client of vfio-user, and of the bus)             device (server of vfio-user)
                     ── DMA_MAP(iova, size, rights) ─────────────────────►  may be used from now on
                     ◄──────────────────────────── reply ────────────────
                     ◄── DMA_READ / DMA_WRITE(iova, count) ──────────────   the VMM reaches the program's pages for it
    a page goes ───► invalidate_range_start
                     ── DMA_UNMAP(iova, size) ───────────────────────────►  no new access; those under way are let end
                     ◄──────────────────────────── reply ────────────────   the reply is the guarantee
    frames free ◄─── acknowledged
    it is over  ───► invalidate_range_end: the region is faulted in and mapped again, if the program still has it

The other model, beside a notifier's: the device knows no faults, so all that it may ever touch is mapped beforehand,
and one page that is taken away costs the whole region. What an unanswered DMA_UNMAP means, the protocol leaves open;
here the bus answers: the VMM does not acknowledge, and is fenced when its budget is over.

Messages are those of the vfio-user specification 0.0.1 (QEMU, docs/interop/vfio-user.rst), little-endian.
"""

from mmubus.drivers.vfio_user.channel import Channel, Command
from mmubus.drivers.vfio_user.device import Device
from mmubus.drivers.vfio_user.vmm import Vmm

__all__ = ["Channel", "Command", "Device", "Vmm"]
