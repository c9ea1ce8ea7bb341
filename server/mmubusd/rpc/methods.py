"""From a service of the contract to gRPC handlers: decoding, encoding and what happens when something is raised.

An implementation is an object with one coroutine method for each rpc, named as the rpc in snake case. A unary method
takes the request and the call's context and returns the response; a stream method, also where only one side streams,
gets the context alone and reads and writes bytes on it. Neither knows about status codes: whatever it raises is turned
into a status here, once.

grpc.aio by itself would send the text of any exception to the client and go on serving after a broken assertion, and a
CancelledError that leaves a handler would leave the client waiting for ever. All three end here.

gRPC calls the handler of a unary method when the request has come. So to gRPC a unary method is a stream of requests,
and who calls is asked, and counted, when the headers have come: a request that never does is that caller's, and nobody
who is not known holds one of the server's calls.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from mmubusd.rpc.commits import Commits, NoRoom
from mmubusd.rpc.errors import Alarm, Malformed, Stopping, Unauthenticated, abort, failure
from mmubusd.rpc.tally import Tally

__all__ = ["Context", "decode", "handlers"]

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
M = TypeVar("M", bound=Message)
T = TypeVar("T")
Who = TypeVar("Who")


class UnaryMethod(Protocol):
    async def __call__(self, request: Message, context: Context) -> Message: ...


class StreamMethod(Protocol):
    async def __call__(self, context: Context) -> None: ...


class Gate(Protocol[Who]):
    """Who may call at all, and how much at a time."""

    def enter(self, context: Context) -> Who:
        """A call begins. Returns: whose it is. Raises: whatever it is refused with."""

    def leave(self, who: Who) -> None:
        """A call that was let in has ended."""


def handlers(
    service: ServiceDescriptor,
    implementation: object,
    alarm: Alarm,
    gate: Gate[Who],
    tally: Tally,
    commits: Commits | None = None,
) -> grpc.GenericRpcHandler:
    """Bind every rpc of a service to the implementation's method of that name.

    Args:
        gate: asked first about each call.
        tally: where failures are counted.
        commits: what answers wait for; None: nothing is kept.
    Raises: AttributeError when the implementation lacks one: the contract and the server must agree.
    """
    table: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {}
    for rpc in service.methods:
        method = getattr(implementation, re.sub(r"(?<!^)(?=[A-Z])", "_", rpc.name).lower())
        if rpc.client_streaming or rpc.server_streaming:
            table[rpc.name] = grpc.stream_stream_rpc_method_handler(_stream(method, alarm, gate, tally, commits))
        else:
            table[rpc.name] = grpc.stream_unary_rpc_method_handler(
                _unary(method, GetMessageClass(rpc.input_type), alarm, gate, tally, commits)
            )
    return grpc.method_handlers_generic_handler(service.full_name, table)


def decode(kind: type[M], data: bytes) -> M:
    """Parse a message. Raises: Malformed when the bytes are not one."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise Malformed(kind.DESCRIPTOR.full_name) from error


def _unary(
    method: UnaryMethod,
    kind: type[Message],
    alarm: Alarm,
    gate: Gate[Who],
    tally: Tally,
    commits: Commits | None,
) -> Callable[[object, Context], Awaitable[bytes]]:
    async def handle(_: object, context: Context) -> bytes:
        who = None
        try:
            who = gate.enter(context)
            data = await context.read()
            if not isinstance(data, bytes):
                raise Malformed(kind.DESCRIPTOR.full_name)
            work = method(decode(kind, data), context)
            return (await (work if commits is None else _kept(work, commits))).SerializeToString()
        except (Exception, asyncio.CancelledError) as error:
            return await _fail(context, error, alarm, tally)
        finally:
            if who is not None:
                gate.leave(who)

    return handle


def _stream(
    method: StreamMethod, alarm: Alarm, gate: Gate[Who], tally: Tally, commits: Commits | None
) -> Callable[[object, Context], Awaitable[None]]:
    async def handle(_: object, context: Context) -> None:
        who = None
        try:
            who = gate.enter(context)
            await (method(context) if commits is None else _kept(method(context), commits))
        except (Exception, asyncio.CancelledError) as error:
            await _fail(context, error, alarm, tally)
        finally:
            if who is not None:
                gate.leave(who)

    return handle


async def _kept(work: Awaitable[T], commits: Commits) -> T:
    """Wait for a call, and until all that its answer or its refusal can tell of is kept. Raises: NotKept."""
    try:
        result = await work
    except NoRoom:  # it tells of nothing else
        raise
    except BaseException:
        await commits.kept_or_fail()
        raise
    await commits.kept_or_fail()
    return result


async def _fail(context: Context, error: BaseException, alarm: Alarm, tally: Tally) -> bytes:
    """End a call with the status of an error. Never returns normally."""
    causes = list(_leaves(error))
    # A broken invariant of ours counts before whatever else went wrong in the same call.
    error = next((cause for cause in causes if failure(cause) is None), causes[0])
    if isinstance(error, grpc.aio.AbortError):
        raise error
    found = failure(error)
    tally.failed_rpcs[found.code.name if found is not None else "INTERNAL"] += 1
    tally.unauthenticated += isinstance(error, Unauthenticated)
    if isinstance(error, asyncio.CancelledError | grpc.aio.BaseError):
        # The client went: there is nobody to tell, and grpc keeps half a KiB of each status that nobody can be told.
        # gRPC cancels our task then; a cancellation that came from anything we wait for has not asked it to end.
        task = asyncio.current_task()
        if context.done() or (task is not None and task.cancelling()):
            raise error
        try:
            await abort(context, Stopping(), alarm)
        except grpc.aio.InternalError:
            # A message is still being sent to a client that does not read; the connection goes with the server.
            raise error from None
    await abort(context, error, alarm)
    raise AssertionError("abort returned")


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions of a task group's exception group, or the exception itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
