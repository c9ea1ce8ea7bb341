"""The notifier core: who must answer what by when. Pure; time is an argument."""

from mmubusd.notify.bus import Bus
from mmubusd.notify.errors import (
    Draining,
    FencedError,
    LimitReached,
    NotifyError,
    PeerError,
    RequestError,
    StaleTranslation,
)
from mmubusd.notify.granted import NO_PFN, Granted, Looked, Migrated, Pinned, Translations
from mmubusd.notify.limits import Limits
from mmubusd.notify.notice import Ack, Batch, Notice, Op, Result
from mmubusd.notify.operation import Operation, Reported
from mmubusd.notify.registration import Registration, Spec
from mmubusd.notify.session import Hello, Session, State
from mmubusd.notify.translation import READ, WRITE

__all__ = [
    "NO_PFN",
    "READ",
    "WRITE",
    "Ack",
    "Batch",
    "Bus",
    "Draining",
    "FencedError",
    "Granted",
    "Hello",
    "LimitReached",
    "Limits",
    "Looked",
    "Migrated",
    "Notice",
    "NotifyError",
    "Op",
    "Operation",
    "PeerError",
    "Pinned",
    "Registration",
    "Reported",
    "RequestError",
    "Result",
    "Session",
    "Spec",
    "StaleTranslation",
    "State",
    "Translations",
]
