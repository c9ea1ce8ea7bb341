"""Health and reflection: for whoever asks, so there is a bound on what they take from those who are known.

Nobody is asked who calls. A watcher that stays, or a request of which only the headers come, would otherwise count
among the server's calls for as long as its sender likes. So each host has few of them at a time, and all hosts a part;
a probe on another host than whoever takes all it can has its answer.

The health service is our own: the one that comes with gRPC tells each watcher under one lock, and a watcher that does
not read kept everybody from hearing of a change, and the server from draining.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2 as pb
from grpc_reflection.v1alpha import reflection, reflection_pb2

from mmubusd.notify import LimitReached
from mmubusd.rpc.methods import Context, decode

__all__ = ["Bystanders", "Health", "Reflection"]

Status = int
"""Of enum ServingStatus, whose type has a name in the stubs only."""

PER_HOST_MAX = 32
"""Calls and streams of one host at a time, from all its ports."""
SHARE = 4
"""All hosts together may have this part of the server's calls."""


class Bystanders:
    """The gate of those who are not asked who they are. Args: calls_max: of the whole server."""

    def __init__(self, calls_max: int) -> None:
        self._most = max(1, calls_max // SHARE)
        self._calls: Counter[str] = Counter()
        self._nr = 0

    def enter(self, context: Context) -> str:
        """A call begins. Returns: the host. Raises: LimitReached."""
        host = _host(context.peer())
        if self._calls[host] >= PER_HOST_MAX:
            raise LimitReached("EAGAIN", "calls of health and reflection from one host", PER_HOST_MAX)
        if self._nr >= self._most:
            raise LimitReached("EAGAIN", "calls of health and reflection", self._most)
        self._calls[host] += 1
        self._nr += 1
        return host

    def leave(self, who: str) -> None:
        """It has ended."""
        self._nr -= 1
        self._calls[who] -= 1
        if not self._calls[who]:
            del self._calls[who]


def _host(peer: str) -> str:
    """`ipv4:10.0.0.1:4711` without the port; a Unix socket's peers are one host."""
    return peer.rpartition(":")[0] if peer.startswith("ip") else "unix"


class Health:
    """Implements grpc.health.v1.Health. A service that is not known is NOT_FOUND, and to a watcher SERVICE_UNKNOWN."""

    def __init__(self) -> None:
        self._statuses: dict[str, Status] = {}
        self._watchers: set[asyncio.Event] = set()

    def set(self, names: Iterable[str], status: Status) -> None:
        """These services have this status from now on; whoever watches is told as soon as it takes what it was told."""
        self._statuses.update(dict.fromkeys(names, status))
        for changed in self._watchers:
            changed.set()

    async def check(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service!r}")
        return pb.HealthCheckResponse(status=status)

    async def list(self, request: Message, context: Context) -> Message:
        statuses = {name: pb.HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        response: Message = pb.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]  # stubs of before
        return response

    async def watch(self, context: Context) -> None:
        """Cancellation: nothing is lost."""
        data = await context.read()
        if not isinstance(data, bytes):
            return  # EOF
        name = decode(pb.HealthCheckRequest, data).service
        changed, told = asyncio.Event(), None
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                status = self._statuses.get(name, pb.HealthCheckResponse.SERVICE_UNKNOWN)
                if status != told:
                    told = status
                    await context.write(pb.HealthCheckResponse(status=status).SerializeToString())
                await changed.wait()
        finally:
            self._watchers.discard(changed)


class Reflection:
    """Implements grpc.reflection.v1alpha.ServerReflection. Args: names: of the services to show."""

    def __init__(self, names: Iterable[str]) -> None:
        self._servicer = reflection.aio.ReflectionServicer(names)

    async def server_reflection_info(self, context: Context) -> None:
        """Cancellation: nothing is lost."""

        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            while isinstance(data := await context.read(), bytes):
                yield decode(reflection_pb2.ServerReflectionRequest, data)

        responses: Any = self._servicer.ServerReflectionInfo(requests(), context)
        async for response in responses:
            await context.write(response.SerializeToString())
