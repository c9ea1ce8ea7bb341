"""A server that does exactly what a test tells it, in any order it likes. Built from the generated servicers.

async with fake_server() as server:
    async with mmubus.connect(server.address) as bus:
        attachment = await server.attached()
        attachment.notices(1, [pb.Notice(...)], targets=[[1]])
        assert (await attachment.acknowledged()).through == 1
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from mmu.v1 import (
    address_space_pb2,
    address_space_pb2_grpc,
    device_pb2,
    device_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    types_pb2,
)
from mmubus.channel import grpc  # first: it sets grpc's switches
from patience import LIMIT_S

END = object()


class Attachment:
    """One session stream, seen from the server."""

    def __init__(self, hello: session_pb2.Hello) -> None:
        self.hello = hello
        self.inbox: asyncio.Queue[session_pb2.AttachRequest] = asyncio.Queue()
        self.outbox: asyncio.Queue[object] = asyncio.Queue()
        self.ended = asyncio.Event()
        self.heartbeats = 0
        self.left = False

    def send(self, response: session_pb2.AttachResponse) -> None:
        self.outbox.put_nowait(response)

    def notices(self, first_seq: int, notices: Sequence[session_pb2.Notice], targets: Sequence[Sequence[int]]) -> None:
        batch = session_pb2.NoticeBatch(
            first_seq=first_seq,
            notices=notices,
            targets=[target for each in targets for target in each],
            target_counts=[len(each) for each in targets],
        )
        self.send(session_pb2.AttachResponse(notices=batch))

    def notice(self, seq: int, target: int = 1, **fields: object) -> None:
        self.notices(seq, [session_pb2.Notice(**fields)], [[target]])  # type: ignore[arg-type]

    def drop(self) -> None:
        """End the stream as if the connection had broken."""
        self.outbox.put_nowait(END)

    async def acknowledged(self) -> session_pb2.Acknowledge:
        """The next acknowledgement."""
        while True:
            message = await asyncio.wait_for(self.inbox.get(), LIMIT_S)
            if message.WhichOneof("message") == "acknowledge":
                return message.acknowledge

    async def acknowledged_through(self, seq: int) -> list[session_pb2.Acknowledge]:
        """Acknowledgements until everything up to seq is done."""
        acks = [await self.acknowledged()]
        while acks[-1].through < seq:
            acks.append(await self.acknowledged())
        return acks


Answer = Callable[[device_pb2.AccessRequest], Awaitable[device_pb2.AccessResponse]]


class FakeServer(
    session_pb2_grpc.SessionServiceServicer,
    device_pb2_grpc.DeviceServiceServicer,
    address_space_pb2_grpc.AddressSpaceServiceServicer,
):
    """Welcomes everybody, registers everything, and otherwise waits for the test's orders.

    Attributes:
        welcome: makes the Welcome of a Hello, or raises what the stream is ended with.
        register: makes the answer of a Register; replace it to reject.
        answer: answers a device request.
    """

    def __init__(self) -> None:
        self.address = ""
        self.epoch = 1
        self.lease_s = 10.0
        self.silent = False
        self.only_unary = False
        self.tokens: list[str] = []
        self.sessions: dict[str, int] = {}
        self.fenced_tokens: set[str] = set()
        self.attachments: asyncio.Queue[Attachment] = asyncio.Queue()
        self.registrations = itertools.count(1)
        self.registered: list[session_pb2.AttachRequest] = []
        self.unregistered: list[int] = []
        self.warnings: list[str] = []
        self.reject: types_pb2.CallError | None = None
        self.answer_requests = True
        self.answer: Answer | None = None
        self.accesses: list[device_pb2.AccessRequest] = []

    async def attached(self) -> Attachment:
        """The next stream that says Hello."""
        return await asyncio.wait_for(self.attachments.get(), LIMIT_S)

    # SessionService

    async def Attach(
        self, requests: AsyncIterator[session_pb2.AttachRequest], context: grpc.aio.ServicerContext
    ) -> None:  # type: ignore[override,type-arg]
        hello = (await context.read()).hello
        if hello.token in self.fenced_tokens:
            await fail(context, grpc.StatusCode.FAILED_PRECONDITION, "FENCED", "it was too slow", {"seq": "7"})
        resumed = hello.token in self.sessions
        token = hello.token if resumed else f"token-{self.epoch}-{len(self.sessions) + 1}"
        self.sessions.setdefault(token, len(self.sessions) + 1)
        attachment = Attachment(hello)
        welcome = session_pb2.Welcome(
            session=self.sessions[token],
            token=token,
            epoch=self.epoch,
            resumed=resumed,
            ack_budget_s=2.0,
            lease_s=self.lease_s,
            grace_s=1.0,
        )
        attachment.send(session_pb2.AttachResponse(welcome=welcome))
        self.attachments.put_nowait(attachment)
        reader = asyncio.create_task(self._read(attachment, context))
        try:
            while (response := await attachment.outbox.get()) is not END:
                await context.write(response)
                if isinstance(response, session_pb2.AttachResponse) and response.HasField("fenced"):
                    await fail(context, grpc.StatusCode.FAILED_PRECONDITION, "FENCED", response.fenced.message)
        finally:
            reader.cancel()
            attachment.ended.set()

    async def _read(self, attachment: Attachment, context: grpc.aio.ServicerContext) -> None:  # type: ignore[type-arg]
        while isinstance(message := await context.read(), session_pb2.AttachRequest):
            kind = message.WhichOneof("message")
            if kind == "heartbeat":
                attachment.heartbeats += 1
                if not self.silent:
                    attachment.send(session_pb2.AttachResponse(heartbeat=session_pb2.Heartbeat()))
            elif kind == "leave":
                attachment.left = True
                attachment.drop()
            elif kind in ("register", "register_rmap", "unregister") and self.answer_requests:
                attachment.send(self._answer(message, kind))
            else:
                attachment.inbox.put_nowait(message)
        attachment.drop()

    def _answer(self, message: session_pb2.AttachRequest, kind: str) -> session_pb2.AttachResponse:
        if kind == "unregister":
            number = message.unregister.registration
            was = number not in self.unregistered
            self.unregistered.append(number)
            gone = session_pb2.Unregistered(registration=number, was_registered=was)
            return session_pb2.AttachResponse(request=message.request, unregistered=gone)
        if self.reject is not None:
            return session_pb2.AttachResponse(request=message.request, rejected=session_pb2.Rejected(error=self.reject))
        self.registered.append(message)
        made = session_pb2.Registered(registration=next(self.registrations), warnings=self.warnings)
        return session_pb2.AttachResponse(request=message.request, registered=made)

    # DeviceService

    async def Access(  # type: ignore[override]
        self,
        requests: AsyncIterator[device_pb2.AccessRequest],
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> None:
        if self.only_unary:
            await fail(context, grpc.StatusCode.UNIMPLEMENTED, "", "no such rpc")
        writing = asyncio.Lock()

        async def one(request: device_pb2.AccessRequest) -> None:
            assert self.answer is not None
            response = await self.answer(request)
            response.id = request.id
            async with writing:
                await context.write(response)

        async with asyncio.TaskGroup() as group:
            while isinstance(request := await context.read(), device_pb2.AccessRequest):
                self.accesses.append(request)
                group.create_task(one(request))

    async def Fault(  # type: ignore[override]
        self,
        request: device_pb2.FaultRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> device_pb2.FaultResponse:
        self.tokens = [value for key, value in context.invocation_metadata() if key == "mmubus-session"]
        assert self.answer is not None
        response = await self.answer(device_pb2.AccessRequest(fault=request))
        if response.HasField("error"):
            await fail(context, grpc.StatusCode.FAILED_PRECONDITION, response.error.reason, response.error.message)
        return response.fault

    # AddressSpaceService: enough to see errors and the pipelined stream.

    async def Munmap(
        self, request: address_space_pb2.MunmapRequest, context: grpc.aio.ServicerContext
    ) -> address_space_pb2.MunmapResponse:  # type: ignore[override,type-arg]
        if request.addr & 0xFFF:
            await fail(context, grpc.StatusCode.INVALID_ARGUMENT, "EINVAL", "addr is not page-aligned", {"addr": "1"})
        return address_space_pb2.MunmapResponse()

    async def Operate(self, requests: object, context: grpc.aio.ServicerContext) -> None:  # type: ignore[override,type-arg]
        while isinstance(request := await context.read(), address_space_pb2.OperateRequest):
            results = [address_space_pb2.CallResult(id=call.id, ret=sum(call.args)) for call in request.calls]
            for call, result in zip(request.calls, results, strict=True):
                if call.args and call.args[0] == 666:
                    result.error.errno, result.error.message = "EFAULT", "no mapping"
            await context.write(address_space_pb2.OperateResponse(results=reversed(results)))


async def fail(
    context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    code: grpc.StatusCode,
    reason: str,
    message: str,
    metadata: dict[str, str] | None = None,
) -> None:
    """End a call with a status that carries an ErrorInfo."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="mmubus", metadata=metadata or {}))
    status = status_pb2.Status(code=code.value[0], message=message, details=[detail])
    await context.abort_with_status(rpc_status.to_status(status))


@asynccontextmanager
async def fake_server(port: int = 0) -> AsyncIterator[FakeServer]:
    """A fake server on a free port of this machine, or on the port given."""
    fake = FakeServer()
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    session_pb2_grpc.add_SessionServiceServicer_to_server(fake, server)
    device_pb2_grpc.add_DeviceServiceServicer_to_server(fake, server)
    address_space_pb2_grpc.add_AddressSpaceServiceServicer_to_server(fake, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    fake.address = f"127.0.0.1:{bound}"
    try:
        yield fake
    finally:
        with suppress(asyncio.CancelledError):
            await server.stop(0)
