"""What is asked on a session stream beside acknowledgements, and what is said beside notices: between the contract's
messages and the notifier core's values."""

from __future__ import annotations

from mmu.v1 import session_pb2 as pb
from mmu.v1 import types_pb2

from mmubusd.mm.errno import MmError
from mmubusd.notify import Draining, Hello, Op, PeerError, RequestError, Session, Spec
from mmubusd.notify.errors import FencedError
from mmubusd.notify.finding import Finding
from mmubusd.rpc.driver import Driver
from mmubusd.rpc.errors import Malformed
from mmubusd.rpc.identity import Principal, session_key
from mmubusd.rpc.methods import decode
from mmubusd.rpc.roles import Role

__all__ = ["HEARTBEAT", "answer", "check_name", "decoded", "fenced_bytes", "finding_bytes", "hello_of"]

NAME_MAX = 255
"""Characters of a name that a client chooses."""

HEARTBEAT = pb.AttachResponse(heartbeat=pb.Heartbeat()).SerializeToString()


def decoded(data: bytes) -> pb.AttachRequest:
    try:
        return decode(pb.AttachRequest, data)
    except Malformed as error:
        raise PeerError(str(error)) from error


def check_name(name: str) -> None:
    """Raises: RequestError ENAMETOOLONG."""
    if len(name) > NAME_MAX:
        raise RequestError("ENAMETOOLONG", f"a name has at most {NAME_MAX} characters, not {len(name)}")


def hello_of(message: pb.Hello, who: Principal, key: str, window: bool) -> Hello:
    """A client's first message. Args: key: by which the core knows the token's session; window: it may map the frames.

    Raises: RequestError ENAMETOOLONG.
    """
    check_name(message.name)
    return Hello(
        name=message.name,
        version=message.version,
        features=frozenset(message.features),
        token=key if message.token else "",
        handled_through=message.handled_through,
        ack_budget_s=message.ack_budget_s,
        lease_s=message.lease_s,
        window=window,
        confirms=session_key(who, message.confirms) if message.confirms else "",
    )


def answer(driver: Driver, who: Principal, session: Session, message: pb.AttachRequest, kind: str) -> pb.AttachResponse:
    """Do what Register, RegisterRmap or Unregister asks. Returns: the answer, which may be that it was rejected."""
    said = pb.AttachResponse(request=message.request)
    now = driver.now()
    try:
        if kind == "unregister":
            gone = message.unregister.registration
            was = driver.bus.unregister(session, gone, now)
            said.unregistered.CopyFrom(pb.Unregistered(registration=gone, was_registered=was))
        else:
            spec = _spec(message.register) if kind == "register" else _rmap_spec(message.register_rmap)
            if spec.mm:
                driver.authority.check_mm(who, Role.ATTACH, spec.mm)
            driver.quotas.check_registration(who)
            made = driver.bus.register(session, spec, now)
            said.registered.CopyFrom(
                pb.Registered(registration=made.id, warnings=made.warnings, as_of_seq=made.as_of_seq)
            )
    except (RequestError, MmError) as error:
        said.rejected.error.CopyFrom(types_pb2.CallError(errno=error.errno, message=error.message))
    except Draining as error:
        said.rejected.error.CopyFrom(types_pb2.CallError(errno="ESHUTDOWN", message=error.message))
    return said


def _spec(message: pb.Register) -> Spec:
    if not message.mm:
        raise RequestError("ESRCH", "mm 0: there is no such address space; RegisterRmap is for the rmap list")
    check_name(message.name)
    known = {int(op) for op in Op}
    unknown = [op for op in message.ops if op not in known]
    if unknown:
        raise RequestError("EINVAL", f"ops: {unknown[0]} is no NotifierOp")
    return Spec(
        mm=message.mm,
        ops=frozenset(Op(op) for op in message.ops),
        start=message.start,
        end=message.end,
        only_held=message.only_held,
        ack_budget_s=message.ack_budget_s,
        name=message.name,
        owner=message.owner,
        demotable=message.demotable,
    )


def _rmap_spec(message: pb.RegisterRmap) -> Spec:
    check_name(message.name)
    return Spec(mm=0, ops=frozenset({Op.RMAP_INVALIDATE_PAGE}), ack_budget_s=message.ack_budget_s, name=message.name)


def finding_bytes(finding: Finding) -> bytes:
    return pb.AttachResponse(
        finding=pb.Finding(kind=finding.kind, message=finding.message, lines=finding.lines)
    ).SerializeToString()


def fenced_bytes(error: FencedError) -> bytes:
    return pb.AttachResponse(
        fenced=pb.Fenced(
            seq=error.seq,
            round=error.round,
            waited_s=error.waited_s,
            registrations=error.registrations,
            held_pages=error.held_pages,
            message=error.message,
        )
    ).SerializeToString()
