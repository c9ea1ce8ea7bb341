"""The CPU's side: every call on an address space as a typed rpc, as Call, and on the Operate stream.

Typed calls are made of the same table as Call; they differ in that an error of the memory manager is the call's status.
"""

from __future__ import annotations

from typing import Any

from mmu.v1 import address_space_pb2 as pb

from mmubusd.mm.addr import MmId
from mmubusd.mm.errno import MmError
from mmubusd.mm.huge_memory import Thp
from mmubusd.rpc.calls import Calls, label_of
from mmubusd.rpc.device import optional_session, within_of
from mmubusd.rpc.driver import Driver
from mmubusd.rpc.lane import Lanes
from mmubusd.rpc.methods import Context
from mmubusd.rpc.operate import Operate
from mmubusd.rpc.roles import Role
from mmubusd.rpc.session_requests import check_name
from mmubusd.rpc.snapshot import check_initial, initial_mappings
from mmubusd.rpc.tracing import traceparent_of

__all__ = ["AddressSpaceService"]

HUGE_PAGES = {
    pb.HUGE_PAGES_UNSPECIFIED: None,
    pb.HUGE_PAGES_NEVER: Thp.NEVER,
    pb.HUGE_PAGES_MADVISE: Thp.MADVISE,
    pb.HUGE_PAGES_ALWAYS: Thp.ALWAYS,
}


class AddressSpaceService:
    """Implements mmu.v1.AddressSpaceService."""

    def __init__(self, driver: Driver, lanes: Lanes | None) -> None:
        self._driver = driver
        self._lanes = lanes
        self._memory = driver.memory
        self._bus = driver.bus
        self._authority = driver.authority
        self._calls = Calls(driver)

    async def create(self, request: pb.CreateRequest, context: Context) -> pb.CreateResponse:
        """Everything is checked before the address space exists, so that a refusal leaves nothing behind."""
        who = self._authority.caller(context)
        check_name(request.name)
        self._driver.admit()
        self._calls.may_create(who)
        for initial in request.initial:
            if initial.mapping.file:
                self._authority.check_file(who, Role.ACCESS, initial.mapping.file)
        memcg = self._driver.quotas.memcg(who)
        check_initial(self._memory, request, memcg)
        if request.huge_pages not in HUGE_PAGES:
            raise MmError("EINVAL", f"huge_pages {request.huge_pages}")
        mappings, brk = initial_mappings(request)
        mm = self._bus.create_mm(request.name, HUGE_PAGES[request.huge_pages], mappings, brk, memcg)
        self._authority.mm_created(who, mm.id)
        return pb.CreateResponse(mm=mm.id)

    async def mmap(self, request: pb.MmapRequest, context: Context) -> pb.MmapResponse:
        args = (request.addr, request.length, request.prot, request.flags, request.file, request.offset)
        if request.file:
            self._authority.check_file(self._authority.caller(context), Role.ACCESS, request.file)
        return pb.MmapResponse(addr=await self._call(context, request.mm, "mmap", *args))

    async def munmap(self, request: pb.MunmapRequest, context: Context) -> pb.MunmapResponse:
        await self._call(context, request.mm, "munmap", request.addr, request.length)
        return pb.MunmapResponse()

    async def mprotect(self, request: pb.MprotectRequest, context: Context) -> pb.MprotectResponse:
        await self._call(context, request.mm, "mprotect", request.addr, request.length, request.prot)
        return pb.MprotectResponse()

    async def mremap(self, request: pb.MremapRequest, context: Context) -> pb.MremapResponse:
        args = (request.addr, request.old_length, request.new_length, request.flags, request.new_addr)
        return pb.MremapResponse(addr=await self._call(context, request.mm, "mremap", *args))

    async def madvise(self, request: pb.MadviseRequest, context: Context) -> pb.MadviseResponse:
        if not self._authority.open:
            self._calls.check_advice(self._authority.caller(context), request.advice)
        await self._call(context, request.mm, "madvise", request.addr, request.length, request.advice)
        return pb.MadviseResponse()

    async def brk(self, request: pb.BrkRequest, context: Context) -> pb.BrkResponse:
        return pb.BrkResponse(brk=await self._call(context, request.mm, "brk", request.addr))

    async def fork(self, request: pb.ForkRequest, context: Context) -> pb.ForkResponse:
        check_name(request.name)
        who = self._authority.caller(context)
        self._calls.may_create(who)
        child = await self._call(context, request.mm, "fork")
        if request.name:
            self._bus.rename_mm(child, request.name)
        self._authority.mm_created(who, child)
        self._driver.quotas.forked(who, child)
        return pb.ForkResponse(child=child)

    async def exit(self, request: pb.ExitRequest, context: Context) -> pb.ExitResponse:
        await self._call(context, request.mm, "exit")
        return pb.ExitResponse()

    async def load(self, request: pb.LoadRequest, context: Context) -> pb.LoadResponse:
        self._calls.data_fits(request.length)
        args = (request.addr, request.length)
        return pb.LoadResponse(data=await self._call(context, request.mm, "load", *args))

    async def store(self, request: pb.StoreRequest, context: Context) -> pb.StoreResponse:
        label = label_of("store", request.mm, (request.addr, len(request.data)))
        await self._call(context, request.mm, "store", request.addr, data=request.data, label=label)
        return pb.StoreResponse()

    async def call(self, request: pb.CallRequest, context: Context) -> pb.CallResponse:
        session = optional_session(self._driver, context)
        return pb.CallResponse(result=await self._calls.run(request.call, session, self._authority.caller(context)))

    async def operate(self, context: Context) -> None:
        """Cancellation: calls that were started go on, those that wait for their thread are dropped."""
        session = optional_session(self._driver, context)
        await Operate(self._calls, context, session, self._authority.caller(context), self._lanes).serve()

    async def _call(self, context: Context, mm: int, name: str, *args: int, data: bytes = b"", label: str = "") -> Any:
        """Begin a call and wait for it. Returns: its result. Raises: its error."""
        self._authority.check_mm(self._authority.caller(context), Role.OWN, mm)
        self._memory.mm(MmId(mm))
        session, within, tracing = optional_session(self._driver, context), within_of(context), self._driver.tracing
        label = label or label_of(name, mm, args)
        return await self._driver.run(
            self._bus.call, mm, name, args, data=data, label=label, session=session, within=within,
            wrap=tracing.following(traceparent_of(context), label) if tracing is not None else None,
        )  # fmt: skip
