"""Connecting, and what a connection offers.

    async with mmubus.connect("unix:/run/mmubus.sock", name="my-driver") as bus:
        ...

Nothing is sent by connecting itself. The session, one stream for all the notifiers of this connection, is opened when
the first one registers; see `mmubus.session` for what happens when it breaks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

from mmu.v1 import (
    address_space_pb2,
    address_space_pb2_grpc,
    authority_pb2,
    authority_pb2_grpc,
    device_pb2_grpc,
    inspection_pb2_grpc,
    session_pb2_grpc,
)

from mmubus.access import Access
from mmubus.address_space import AddressSpace
from mmubus.authority import WhoAmI
from mmubus.channel import default_address, grpc, open_channel, unary
from mmubus.errors import Fenced
from mmubus.file import File
from mmubus.inspection import InitialMapping, Inspection, initial_of
from mmubus.linux import FileKind, HugePages
from mmubus.mirror import Mirror, Style
from mmubus.notifier import Notifier, RmapNotifier
from mmubus.operations import Operations
from mmubus.registration import Registration, Spec
from mmubus.security import Security
from mmubus.session import Session
from mmubus.standing import SessionOptions
from mmubus.tracing import Tracing
from mmubus.window import FrameWindow

__all__ = ["Bus", "Stubs", "connect"]


class Stubs:
    """The services of one server."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.address_space: address_space_pb2_grpc.AddressSpaceServiceAsyncStub = (
            address_space_pb2_grpc.AddressSpaceServiceStub(channel)
        )
        self.file: address_space_pb2_grpc.FileServiceAsyncStub = address_space_pb2_grpc.FileServiceStub(channel)
        self.session: session_pb2_grpc.SessionServiceAsyncStub = session_pb2_grpc.SessionServiceStub(channel)
        self.device: device_pb2_grpc.DeviceServiceAsyncStub = device_pb2_grpc.DeviceServiceStub(channel)
        self.inspection: inspection_pb2_grpc.InspectionServiceAsyncStub = inspection_pb2_grpc.InspectionServiceStub(
            channel
        )
        self.authority: authority_pb2_grpc.AuthorityServiceAsyncStub = authority_pb2_grpc.AuthorityServiceStub(channel)


@asynccontextmanager
async def connect(
    address: str | None = None,
    *,
    name: str = "",
    ack_budget_s: float = 0.0,
    lease_s: float = 0.0,
    reattach: bool = False,
    on_fenced: Callable[[Fenced], None] | None = None,
    tls: bool | None = None,
    ca: str | Path | None = None,
    cert: str | Path | None = None,
    key: str | Path | None = None,
    server_name: str = "",
    token: str = "",
    token_file: str | Path | None = None,
    traces: bool | None = None,
    chaos: str = "",
    lane: bool = True,
) -> AsyncIterator[Bus]:
    """Connect to a server; leaving the block says goodbye, so that nobody waits for this client any more.

    Args:
        address: "unix:/path" or "host:port"; None: the environment's MMUBUS_ADDRESS, or this user's own Unix socket.
        name: who this is, for people: shown wherever somebody waits for it.
        ack_budget_s: seconds that a handler may take before the session is fenced; 0: the server's default.
        lease_s: seconds without a sign of life after which the session counts as lost; 0: the server's default.
        reattach: after a fence or a restart of the server, register everything again, with nothing held.
        on_fenced: called with what was lost, after every notifier's `invalidated_everything`.
        tls, ca, cert, key, server_name, token, token_file: see `mmubus.security`; what is not given is taken from the
            environment.
        chaos: for a server started with --chaos, what this session is to bear, for soak tests of a driver:
            "seed=7 delay_s=0.02 duplicate=0.3 flush=0.1 evict=0.1 nonblock=0.1 drop=0.02".
        traces: record OpenTelemetry spans; None: what MMUBUS_TRACES says.
        lane: go by the server's lanes where it offers them and they can be reached; see `mmubus.lane`.
    Raises: UnsafeConnection; else nothing by itself: the first call raises ConnectionLost when nobody is there.
    """
    security = Security.of(
        tls=tls, ca=ca, cert=cert, key=key, server_name=server_name, token=token, token_file=token_file
    )
    options = SessionOptions(name, ack_budget_s, lease_s, reattach, on_fenced, chaos, lane)
    bus = Bus(address or default_address(), options, security, Tracing.of(traces))
    try:
        yield bus
    finally:
        await bus.close()


class Bus:
    """A connection to a server. Made by `connect`."""

    def __init__(
        self,
        address: str,
        options: SessionOptions,
        security: Security | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.address = address
        self.name = options.name
        self.lane = options.lane
        self.tracing = tracing
        self._channel = open_channel(address, security, tracing)
        self.stubs = Stubs(self._channel)
        self.session = Session(self.stubs, options, tracing)
        self.access = Access(self.stubs, self.session, tracing, lane=options.lane)
        self.inspection = Inspection(self.stubs)

    def __repr__(self) -> str:
        return f"<Bus {self.address} {self.name!r} {self.session.state}>"

    async def create_mm(
        self,
        name: str = "",
        *,
        initial: Sequence[InitialMapping] = (),
        brk: int = 0,
        huge_pages: HugePages | None = None,
    ) -> AddressSpace:
        """Make an address space.

        Args:
            name: for people.
            initial: mappings that exist from the start, as a recording's snapshot tells them.
            brk: where the program break is; 0: nowhere.
            huge_pages: which of its memory gets huge pages; None: as the server is set.
        """
        request = address_space_pb2.CreateRequest(
            name=name,
            initial=[initial_of(one) for one in initial],
            brk=brk,
            huge_pages=cast("address_space_pb2.HugePages.ValueType", huge_pages or 0),
        )
        return AddressSpace(self, (await unary(self.stubs.address_space.Create(request))).mm, name)

    def mm(self, mm: int) -> AddressSpace:
        """An address space that exists already, by its number; a wrong one is found by the first call."""
        return AddressSpace(self, mm)

    async def open_file(
        self, name: str = "", *, size: int = 0, kind: FileKind = FileKind.DISK, cached: bool = False
    ) -> File:
        """Make a file, or open the one of that name.

        Args:
            name: "": a file without a name.
            size: bytes of a new file, zero-filled.
            kind: how it behaves.
            cached: put every page into the page cache, as if it had just been written.
        """
        request = address_space_pb2.OpenFileRequest(
            name=name, kind=cast("address_space_pb2.FileKind.ValueType", kind.value), size=size, cached=cached
        )
        response = await unary(self.stubs.file.OpenFile(request))
        return File(self, response.file, name, response.created)

    async def whoami(self) -> WhoAmI:
        """Whom the server takes this connection for. Raises: MmuBusError when for nobody."""
        found = await unary(self.stubs.authority.WhoAmI(authority_pb2.WhoAmIRequest()))
        return WhoAmI(found.principal, found.administers)

    async def list_files(self) -> list[address_space_pb2.File]:
        """Every file with its size and what of it is cached."""
        return await self.inspection.files()

    def operations(self, *, mm: int = 0, in_flight_max: int = 256) -> Operations:
        """A pipelined stream of calls; see `mmubus.operations`."""
        return Operations(self, mm=mm, in_flight_max=in_flight_max)

    async def register(
        self,
        notifier: Notifier,
        mm: AddressSpace | int,
        *,
        start: int = 0,
        end: int = 0,
        only_held: bool = False,
        ack_budget_s: float = 0.0,
        name: str = "",
        owner: int = 0,
        demotable: bool = False,
    ) -> Registration:
        """Put a notifier at the head of an address space's list: it sees every notification from now on.

        Kernel: mmu_notifier_register().
        Args:
            notifier: the ops that its class overrides are the ones that are registered.
            mm: the address space.
            start, end: the interval that it wants to hear of; end 0: everything.
            only_held: only ranges of which it holds translations.
            ack_budget_s: its own budget; 0: the session's.
            name: for people.
            owner: who it is for MIGRATE and EXCLUSIVE; 0: nobody.
            demotable: when it is too slow, it is demoted instead of the session fenced: it is told to drop everything,
                and until it has behaved well for a while its faults fail with "UNCACHED".
        Returns: the registration; what will slip through because an op is missing is also raised as a Python warning.
        Raises: MmError, ConnectionLost.
        """
        name = name or type(notifier).__name__
        spec = Spec(mm.__index__(), start, end, only_held, ack_budget_s, name, owner, demotable)
        return await self.session.register(Registration(self, notifier, spec))

    async def register_rmap(self, notifier: RmapNotifier, *, ack_budget_s: float = 0.0, name: str = "") -> Registration:
        """Put a notifier at the head of the global rmap list: it is told of the pages that it exports.

        Raises: MmError, ConnectionLost.
        """
        spec = Spec(0, 0, 0, False, ack_budget_s, name or type(notifier).__name__, 0)
        return await self.session.register(Registration(self, notifier, spec))

    async def mirror(
        self,
        mm: AddressSpace | int,
        *,
        style: Style = "seed",
        start: int = 0,
        end: int = 0,
        only_held: bool = True,
        ack_budget_s: float = 0.0,
        name: str = "",
        window: FrameWindow | None = None,
    ) -> Mirror:
        """A `Mirror` of an address space, registered; the arguments are those of `Mirror` and of `register`.

        It is told of what it holds and of nothing else, unless only_held is False.
        Raises: MmError, ConnectionLost.
        """
        mirror = Mirror(style=style, window=window)
        await self.register(
            mirror, mm, start=start, end=end, only_held=only_held, ack_budget_s=ack_budget_s, name=name or self.name
        )
        return mirror

    def frame_window(self, *, writable: bool = False) -> FrameWindow:
        """The frames, mapped; for a client on the server's machine, after the first registration.

        Raises: FileNotFoundError when the server does not offer it, OSError when it is not for us.
        """
        path = self.session.frames_path
        if not path:
            raise FileNotFoundError(
                "the server offers no frame window; it is offered on the same machine, to a session"
            )
        window = FrameWindow(path, writable=writable)
        self.session.windows.add(window)
        return window

    async def close(self) -> None:
        """Say goodbye and close the connection. Idempotent."""
        await self.access.close()
        await self.session.close()
        await self._channel.close()
