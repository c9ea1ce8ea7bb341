"""The device's side: every request as a unary rpc, and the same requests pipelined on Access.

One table says how a request becomes an operation of the bus and how its result becomes a message; both ways use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.message import Message
from mmu.v1 import device_pb2 as pb

from mmubusd.mm.errno import MmError
from mmubusd.notify import Granted, Looked, Migrated, NotifyError, Operation, Pinned, RequestError, Session
from mmubusd.rpc.convert import translations_message
from mmubusd.rpc.driver import Driver
from mmubusd.rpc.errors import look_up
from mmubusd.rpc.identity import Principal, session_key
from mmubusd.rpc.lane import Lanes
from mmubusd.rpc.methods import Context, decode
from mmubusd.rpc.pipeline import Pipeline
from mmubusd.rpc.roles import Role
from mmubusd.rpc.tracing import traceparent_of

__all__ = ["DeviceService", "optional_session", "own_session", "session_of", "within_of"]

TOKEN_KEY = "mmubus-session"
WITHIN_KEY = "mmubus-within"


def optional_session(driver: Driver, context: Context) -> Session | None:
    """The session whose token is in the call's metadata, if there is one. Another principal's does not exist.

    Raises: RequestError NO_SUCH_SESSION, FencedError.
    """
    for key, value in context.invocation_metadata() or ():
        if key == TOKEN_KEY:
            token = value if isinstance(value, str) else value.decode("latin-1")
            return own_session(driver, driver.authority.caller(context), token)
    return None


def own_session(driver: Driver, who: Principal, token: str) -> Session:
    """The session of this principal with this token. Raises: as optional_session."""
    return driver.bus.session_by_token(session_key(who, token))


def within_of(context: Context) -> int:
    """The notice whose handler makes the call; 0: none.

    Raises: RequestError when it is not a number.
    """
    for key, value in context.invocation_metadata() or ():
        if key == WITHIN_KEY:
            text = value if isinstance(value, str) else value.decode("latin-1")
            if not text.isascii() or not text.isdecimal() or len(text) > 20:
                raise RequestError("EINVAL", f"{WITHIN_KEY}: {text[:40]!r} is not the number of a notice")
            return int(text)
    return 0


def session_of(driver: Driver, context: Context) -> Session:
    """The session that a device's request acts for. Raises: as optional_session, and RequestError NO_TOKEN."""
    session = optional_session(driver, context)
    if session is None:
        raise RequestError(
            "EPERM",
            f"the call carries no session: put the token of Welcome into the metadata key {TOKEN_KEY}",
            reason="NO_TOKEN",
        )
    return session


Begin = Callable[..., Operation[Any]]
Answer = Callable[[bytes], None]
Plan = tuple[Begin, tuple[object, ...], dict[str, object]]
"""A method of the bus, its arguments before `now`, and its options."""


class Requests:
    """How each request is put to the bus, by the name of its message's field in AccessRequest."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._bus = driver.bus
        self._authority = driver.authority

    def plan(self, kind: str, session: Session, request: Message, traceparent: str) -> Plan:
        """Raises: MmError, RequestError when the request is wrong in itself, or not for the session's principal."""
        if not self._authority.open:
            self._check(session, request)
        plan: Plan = getattr(self, kind)(session, request)
        tracing = self._driver.tracing
        if tracing is None or not traceparent:
            return plan
        begin, args, options = plan
        label = _label(kind, session, request)
        return begin, args, {**options, "wrap": lambda work: tracing.follow(work, traceparent, label)}

    def _check(self, session: Session, request: Message) -> None:
        who = self._authority.session_owner(session)
        assert who is not None, f"session {session.id} has no principal"
        if isinstance(request, pb.SnapshotRequest):
            self._authority.check_mm(who, Role.OBSERVE, request.mm)
        elif isinstance(request, pb.ExportRequest):
            self._authority.check_mm(who, Role.ACCESS, request.mm)
            self._authority.exports(session, request.mm)
        elif not isinstance(request, pb.UnpinRequest | pb.UnexportRequest):
            registration = session.registrations.get(request.registration)  # type: ignore[attr-defined]
            if registration is not None and registration.mm:
                self._authority.check_mm(who, Role.ACCESS, registration.mm)

    def fault(self, session: Session, request: pb.FaultRequest) -> Plan:
        args = (session, request.registration, request.start, request.end, request.write)
        return self._bus.fault, args, {"wait_s": _wait(request.wait_s)}

    def snapshot(self, session: Session, request: pb.SnapshotRequest) -> Plan:
        args = (session, request.mm, request.start, request.end)
        return self._bus.snapshot, args, {"registration": request.registration}

    def pin(self, session: Session, request: pb.PinRequest) -> Plan:
        return self._bus.pin, (session, request.registration, request.start, request.end, request.write), {}

    def unpin(self, session: Session, request: pb.UnpinRequest) -> Plan:
        return self._bus.unpin, (session, request.pin, request.dirty), {}

    def dma_read(self, session: Session, request: pb.DmaReadRequest) -> Plan:
        args = (
            session,
            request.registration,
            request.addr,
            request.length,
            list(request.pfns),
            list(request.generations),
        )
        return self._bus.dma_read, args, {"pin": request.pin}

    def dma_write(self, session: Session, request: pb.DmaWriteRequest) -> Plan:
        args = (
            session,
            request.registration,
            request.addr,
            request.data,
            list(request.pfns),
            list(request.generations),
        )
        return self._bus.dma_write, args, {"pin": request.pin}

    def export(self, session: Session, request: pb.ExportRequest) -> Plan:
        args = (session, request.registration, request.mm, request.start, request.end, request.write)
        return self._bus.export, args, {"wait_s": _wait(request.wait_s)}

    def unexport(self, session: Session, request: pb.UnexportRequest) -> Plan:
        return self._bus.unexport, (session, request.registration, list(request.pfns), list(request.dirty)), {}

    def migrate(self, session: Session, request: pb.MigrateRequest) -> Plan:
        args = (session, request.registration, request.start, request.end, request.to_system)
        return self._bus.migrate, args, {"wait_s": _wait(request.wait_s), "coherent": request.coherent}

    def exclusive(self, session: Session, request: pb.ExclusiveRequest) -> Plan:
        args = (session, request.registration, request.start, request.end)
        return self._bus.exclusive, args, {"wait_s": _wait(request.wait_s)}


def _label(kind: str, session: Session, request: Message) -> str:
    """How a request is named in a trace: `fault(0x7000, 0x9000) of gpu-0`."""
    names = [name for name in ("start", "end", "addr", "length", "pin") if name in request.DESCRIPTOR.fields_by_name]
    return f"{kind}({', '.join(hex(getattr(request, name)) for name in names)}) of {session.name}"


def _wait(seconds: float) -> float:
    if not seconds >= 0.0:
        raise RequestError("EINVAL", f"wait_s {seconds} is not a number of seconds; 0 is the server's default")
    return seconds


def _granted(
    kind: type[pb.FaultResponse] | type[pb.ExportResponse] | type[pb.ExclusiveResponse], value: Granted
) -> Message:
    if value.translations is None:
        return kind(as_of_seq=value.as_of_seq, retry=True)
    return kind(translations=translations_message(value.translations), as_of_seq=value.as_of_seq)


def _snapshot(value: Looked) -> pb.SnapshotResponse:
    return pb.SnapshotResponse(
        translations=translations_message(value.translations),
        states=value.states.tobytes(),
        orders=value.orders.tobytes(),
    )


def _pin(value: Pinned) -> pb.PinResponse:
    return pb.PinResponse(pin=value.pin, translations=translations_message(value.translations))


def _migrated(value: Migrated) -> pb.MigrateResponse:
    granted = value.granted
    answer = pb.MigrateResponse(pages=value.pages, as_of_seq=granted.as_of_seq, retry=granted.retry)
    if granted.translations is not None:
        answer.translations.CopyFrom(translations_message(granted.translations))
    return answer


RESPONSES: dict[str, Callable[[Any], Message]] = {
    "fault": lambda value: _granted(pb.FaultResponse, value),
    "snapshot": _snapshot,
    "pin": _pin,
    "unpin": lambda _: pb.UnpinResponse(),
    "dma_read": lambda value: pb.DmaReadResponse(data=value),
    "dma_write": lambda _: pb.DmaWriteResponse(),
    "export": lambda value: _granted(pb.ExportResponse, value),
    "unexport": lambda _: pb.UnexportResponse(),
    "migrate": _migrated,
    "exclusive": lambda value: _granted(pb.ExclusiveResponse, value),
}


class DeviceService:
    """Implements mmu.v1.DeviceService."""

    def __init__(self, driver: Driver, lanes: Lanes | None) -> None:
        self._driver = driver
        self._lanes = lanes
        self._requests = Requests(driver)

    async def fault(self, request: pb.FaultRequest, context: Context) -> Message:
        return await self._unary("fault", request, context)

    async def snapshot(self, request: pb.SnapshotRequest, context: Context) -> Message:
        return await self._unary("snapshot", request, context)

    async def pin(self, request: pb.PinRequest, context: Context) -> Message:
        return await self._unary("pin", request, context)

    async def unpin(self, request: pb.UnpinRequest, context: Context) -> Message:
        return await self._unary("unpin", request, context)

    async def dma_read(self, request: pb.DmaReadRequest, context: Context) -> Message:
        return await self._unary("dma_read", request, context)

    async def dma_write(self, request: pb.DmaWriteRequest, context: Context) -> Message:
        return await self._unary("dma_write", request, context)

    async def export(self, request: pb.ExportRequest, context: Context) -> Message:
        return await self._unary("export", request, context)

    async def unexport(self, request: pb.UnexportRequest, context: Context) -> Message:
        return await self._unary("unexport", request, context)

    async def migrate(self, request: pb.MigrateRequest, context: Context) -> Message:
        return await self._unary("migrate", request, context)

    async def exclusive(self, request: pb.ExclusiveRequest, context: Context) -> Message:
        return await self._unary("exclusive", request, context)

    async def access(self, context: Context) -> None:
        """Cancellation: requests that were started go on; what they granted is void when the session is."""
        who = self._driver.authority.caller(context)
        session = session_of(self._driver, context)
        await Access(self._driver, self._requests, context, session, who, self._lanes).serve()

    async def _unary(self, kind: str, request: Message, context: Context) -> Message:
        session = session_of(self._driver, context)
        begin, args, options = self._requests.plan(kind, session, request, traceparent_of(context))
        return RESPONSES[kind](await self._driver.run(begin, *args, within=within_of(context), **options))


class Access:
    """One stream of DeviceService.Access."""

    def __init__(
        self, driver: Driver, requests: Requests, context: Context, session: Session, who: Principal, lanes: Lanes |
        None,
    ) -> None:  # fmt: skip
        self._driver = driver
        self._requests = requests
        self._session = session
        self._who = who
        self._pipeline: Pipeline[bytes] = Pipeline(
            context, open_max=driver.settings.operations_max, encode=iter, commits=driver.commits, lanes=lanes
        )

    async def serve(self) -> None:
        """Run until the client has sent its last request and every one is answered."""
        await self._pipeline.serve(self._accept)

    def _accept(self, data: bytes) -> Iterator[None]:
        request = decode(pb.AccessRequest, data)
        number = request.id
        kind = request.WhichOneof("request")
        answer: Answer = self._pipeline.answer
        try:
            answer = self._driver.quotas.operation(self._who, answer)
            if kind is None:
                raise RequestError("EINVAL", "the request is empty or of a kind that this server does not know")
            if request.HasField("handled_through"):
                self._driver.bus.ask_after(self._session, request.handled_through)
            body = getattr(request, kind)
            begin, args, options = self._requests.plan(kind, self._session, body, request.traceparent)
            self._driver.submit(
                begin,
                *args,
                then=lambda operation: self._ended(number, kind, operation, answer),
                within=request.within,
                **options,
            )
        except (NotifyError, MmError) as error:
            self._fail(number, error, answer)
        yield

    def _ended(self, number: int, kind: str, operation: Operation[Any], answer: Answer) -> None:
        if operation.error is not None:
            self._fail(number, operation.error, answer)
            return
        response = pb.AccessResponse(id=number, **{kind: RESPONSES[kind](operation.result)})  # type: ignore[arg-type]
        answer(response.SerializeToString())

    def _fail(self, number: int, error: Exception, answer: Answer) -> None:
        found = look_up(error, self._driver.alarm)
        response = pb.AccessResponse(
            id=number,
            error=pb.AccessError(
                code=found.code.value[0], reason=found.reason, message=found.message, metadata=dict(found.metadata)
            ),
        )
        answer(response.SerializeToString())
