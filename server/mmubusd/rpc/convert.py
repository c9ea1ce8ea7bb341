"""From the cores' values to the contract's messages, where several services need the same."""

from __future__ import annotations

from mmu.v1 import device_pb2, types_pb2

from mmubusd.mm.mm import Mapping, Mm
from mmubusd.notify import Reported, Translations
from mmubusd.rpc.codec import REASONS

__all__ = ["mapping_message", "notification_message", "translations_message"]


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


def notification_message(reported: Reported) -> types_pb2.Notification:
    """A notifier call as the kernel's tracepoints would show it."""
    return types_pb2.Notification(
        call=reported.call,
        start=reported.start,
        end=reported.end,
        reason=REASONS[reported.reason],
        mm=reported.mm,
    )


def translations_message(translations: Translations) -> device_pb2.Translations:
    """Translations as parallel lists; building from a list is far quicker than page by page."""
    return device_pb2.Translations(
        start=translations.start,
        pfns=translations.pfns.tolist(),
        generations=translations.generations.tolist(),
        rights=translations.rights.tobytes(),
    )
