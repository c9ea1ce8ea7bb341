"""From the cores' values to the contract's messages, where several services need the same."""

from __future__ import annotations

from collections.abc import Iterator

from mmu.v1 import types_pb2

from mmubusd.mm.mm import Mapping, Mm
from mmubusd.mm.notification import (
    AgePage,
    ClearYoung,
    InvalidatePage,
    InvalidateRange,
    Notification,
    TestYoung,
    ranges,
)
from mmubusd.rpc.codec import REASONS

__all__ = ["mapping_message", "notification_messages"]

PAGE_SIZE = 4096


def mapping_message(mm: Mm, mapping: Mapping) -> types_pb2.Mapping:
    """One line of /proc/PID/maps."""
    resident = sum(last - first for first, last in mm.present(mapping.start, mapping.end))
    return types_pb2.Mapping(
        start=mapping.start,
        end=mapping.end,
        protection=mapping.prot,
        offset=mapping.offset,
        file=mapping.file or 0,
        name=mapping.name,
        resident=resident,
    )


def notification_messages(notification: Notification) -> Iterator[types_pb2.Notification]:
    """A notification as the kernel's tracepoints would show it: one line a range, none for what they don't show."""
    if isinstance(notification, InvalidateRange | InvalidatePage):
        for start, end in ranges(notification):
            yield types_pb2.Notification(
                call="invalidate_range", start=start, end=end, reason=REASONS[notification.reason], mm=notification.mm.id
            )
    elif isinstance(notification, AgePage | ClearYoung | TestYoung):
        call = "test_young" if isinstance(notification, TestYoung) else "clear_young"
        for address in notification.addresses:
            yield types_pb2.Notification(call=call, start=address, end=address + PAGE_SIZE, mm=notification.mm.id)
