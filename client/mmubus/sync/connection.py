"""Connecting without asyncio."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from mmubus import connection as aio
from mmubus.authority import WhoAmI
from mmubus.channel import default_address
from mmubus.errors import Fenced
from mmubus.inspection import InitialMapping
from mmubus.linux import FileKind, HugePages, Op
from mmubus.mirror import Style
from mmubus.notifier import Notifier, RmapNotifier
from mmubus.operations import Result
from mmubus.security import Security
from mmubus.standing import SessionOptions
from mmubus.sync.cpu import AddressSpace, File
from mmubus.sync.device import Mirror, Registration
from mmubus.sync.portal import Portal
from mmubus.sync.worker import InWorker, RmapInWorker
from mmubus.tracing import Tracing

__all__ = ["Bus", "Handlers", "connect"]

Handlers: TypeAlias = Literal["loop", "worker"]
"""Where handlers run; see `mmubus.sync`."""
T = TypeVar("T")


@contextmanager
def connect(
    address: str | None = None,
    *,
    name: str = "",
    ack_budget_s: float = 0.0,
    lease_s: float = 0.0,
    reattach: bool = False,
    on_fenced: Callable[[Fenced], None] | None = None,
    handlers: Handlers = "loop",
    timeout_s: float | None = 60.0,
    tls: bool | None = None,
    ca: str | Path | None = None,
    cert: str | Path | None = None,
    key: str | Path | None = None,
    server_name: str = "",
    token: str = "",
    token_file: str | Path | None = None,
    traces: bool | None = None,
    lane: bool = True,
) -> Iterator[Bus]:
    """Connect to a server; see `mmubus.connect`.

    Args:
        handlers: where handlers run; see `mmubus.sync`. on_fenced always runs in the library's thread.
        timeout_s: seconds that each call may take; None: for ever.
    """
    options = SessionOptions(name, ack_budget_s, lease_s, reattach, on_fenced, lane=lane)
    security = Security.of(
        tls=tls, ca=ca, cert=cert, key=key, server_name=server_name, token=token, token_file=token_file
    )
    tracing = Tracing.of(traces)
    portal = Portal.enter()
    bus = None
    try:
        bus = Bus(portal, _make_bus(address or default_address(), options, security, tracing), handlers, timeout_s)
        yield bus
    finally:
        if bus is not None:
            bus.close()
        portal.leave()


class Bus:
    """A connection; see `mmubus.Bus`. Attributes: aio: the asynchronous one below, for the library's thread only."""

    def __init__(
        self, portal: Portal, making: Coroutine[Any, Any, aio.Bus], handlers: Handlers, timeout_s: float | None
    ) -> None:
        self._portal = portal
        self._timeout_s = timeout_s
        self._handlers = handlers
        self._pool: ThreadPoolExecutor | None = None
        self.aio: aio.Bus = portal.run(making)

    def __repr__(self) -> str:
        return f"<sync {self.aio!r}>"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the asynchronous face in the library's thread, and wait for it."""
        return self._portal.run(work, self._timeout_s)

    def create_mm(
        self,
        name: str = "",
        *,
        initial: Sequence[InitialMapping] = (),
        brk: int = 0,
        huge_pages: HugePages | None = None,
    ) -> AddressSpace:
        """Make an address space."""
        made = self.run(self.aio.create_mm(name, initial=initial, brk=brk, huge_pages=huge_pages))
        return AddressSpace(self.run, made)

    def mm(self, mm: int) -> AddressSpace:
        """An address space that exists already, by its number."""
        return AddressSpace(self.run, self.aio.mm(mm))

    def open_file(self, name: str = "", *, size: int = 0, kind: FileKind = FileKind.DISK, cached: bool = False) -> File:
        """Make a file, or open the one of that name."""
        return File(self.run, self.run(self.aio.open_file(name, size=size, kind=kind, cached=cached)))

    def whoami(self) -> WhoAmI:
        """Whom the server takes this connection for."""
        return self.run(self.aio.whoami())

    def operate(self, calls: Iterable[tuple[Op, *tuple[int, ...]]], *, mm: int = 0, thread: int = 0) -> list[Result]:
        """Many calls, pipelined, in order: each an Op with Linux's arguments. Returns: their results, in order."""
        return self.run(self._operate(list(calls), mm, thread))

    async def _operate(self, calls: list[tuple[Op, *tuple[int, ...]]], mm: int, thread: int) -> list[Result]:
        async with self.aio.operations(mm=mm.__index__()) as operations:
            futures = [await operations.submit(op, *args, thread=thread) for op, *args in calls]
            return [await future for future in futures]

    def register(self, notifier: Notifier, mm: AddressSpace | int, **options: Any) -> Registration:
        """Register a notifier; options as in `mmubus.Bus.register`."""
        placed = notifier if self._handlers == "loop" else InWorker(notifier, self._workers())
        raw = self.run(self.aio.register(placed, mm.__index__(), **options))
        notifier.registration = raw
        return Registration(self.run, raw)

    def register_rmap(self, notifier: RmapNotifier, **options: Any) -> Registration:
        """Register an rmap notifier; options as in `mmubus.Bus.register_rmap`."""
        placed = notifier if self._handlers == "loop" else RmapInWorker(notifier, self._workers())
        raw = self.run(self.aio.register_rmap(placed, **options))
        notifier.registration = raw
        return Registration(self.run, raw)

    def mirror(self, mm: AddressSpace | int, *, style: Style = "seed", **options: Any) -> Mirror:
        """A registered mirror of an address space; options as in `mmubus.Bus.mirror`."""
        return Mirror(self.run, self.run(self.aio.mirror(mm.__index__(), style=style, **options)))

    def close(self) -> None:
        """Say goodbye and close. Idempotent."""
        self._portal.run(self.aio.close())
        if self._pool is not None:
            self._pool.shutdown()

    def _workers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(thread_name_prefix="mmubus handler")
        return self._pool


async def _make_bus(address: str, options: SessionOptions, security: Security, tracing: Tracing | None) -> aio.Bus:
    return aio.Bus(address, options, security, tracing)
