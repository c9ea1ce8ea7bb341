"""Drivers: the consumers that the mechanism was made for, each a small working one to start your own from.

    kvm         a guest in shadow page tables                       start, end, all three aging ops
    gru         an accelerator's TLB, no page references            start, end; never waits
    xpmem       memory exported to other processes and hosts        rmap invalidate_page, or start
    rdma        memory regions and queue pairs: pinned, on demand, cached   start of an interval
    hmm         a device that mirrors an address space              start
    sva         an IOMMU that shares the CPU's page table           invalidate_range only
    vfio_user   a device that is told by DMA_MAP and DMA_UNMAP      start, and a protocol of its own

Import them by module: `from mmubus.drivers.kvm import Vm`. docs/drivers has a page for each.
"""
