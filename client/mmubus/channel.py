"""The gRPC channel: switches that must be set before grpc is imported, tuned options, and errors in our own terms.

Import grpc through this module only.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

# grpc's "event engine" transport adds about 100 µs to each round trip of an asyncio client; the older poller is as
# reliable. grpc reads the switch once, at import. A user's own setting wins.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener,-event_engine_client")
# A process that uses grpc.aio must not fork without exec anyway. With fork support on, each subprocess that is started
# logs "skipping fork() handlers" and pays for the attempt.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

from mmubus.errors import MmuBusError, error_from
from mmubus.security import Security, is_unix
from mmubus.tracing import Tracing

__all__ = ["ADDRESS_VARIABLE", "default_address", "error_of_rpc", "grpc", "open_channel", "session_metadata", "unary"]

ADDRESS_VARIABLE = "MMUBUS_ADDRESS"

_OPTIONS: list[tuple[str, int | str]] = [
    # A dead peer is noticed by pings (grpc.http2.ping_timeout_ms is the one that works; keepalive_timeout sets
    # TCP_USER_TIMEOUT). A peer that is stuck is noticed by heartbeats, see session.py.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Streams are resumed by sequence number; a transparent retry below would send things twice.
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # Each connection is its own: channels of one process with equal options would otherwise share a transport.
    ("grpc.use_local_subchannel_pool", 1),
    # The session reconnects with its own jittered backoff; the channel below must not wait longer than that.
    ("grpc.initial_reconnect_backoff_ms", 50),
    # This is how long an attempt may take (a busy machine answers late), not a pause: a refused attempt ends at once.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 500),
]

T = TypeVar("T")


def default_address() -> str:
    """Where to connect when the user does not say: MMUBUS_ADDRESS, or this user's Unix socket, as the server does."""
    if address := os.environ.get(ADDRESS_VARIABLE):
        return address
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return f"unix:{runtime}/mmubus.sock"
    return f"unix:{tempfile.gettempdir()}/mmubus-{os.getuid()}.sock"


def open_channel(address: str, security: Security | None = None, tracing: Tracing | None = None) -> grpc.aio.Channel:
    """A channel to "unix:/path" or "host:port"; nothing is sent yet.

    Args: security: None: what the environment says. tracing: None: no call is traced.
    Raises: UnsafeConnection.
    """
    security = Security.of() if security is None else security
    security.check(address)
    if security.tls and not is_unix(address):
        credentials = grpc.ssl_channel_credentials(
            security.read(security.ca), security.read(security.key), security.read(security.cert)
        )
        options = [*_OPTIONS]
        if security.server_name:
            options.append(("grpc.ssl_target_name_override", security.server_name))
        channel = grpc.aio.secure_channel(address, credentials, options=options)
    else:
        channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
    return _add_metadata(channel, security, tracing) if security.has_token or tracing is not None else channel


def _add_metadata(channel: grpc.aio.Channel, security: Security, tracing: Tracing | None) -> grpc.aio.Channel:
    """Let every call say who calls and which trace it belongs to. No interceptor: those keep memory on streams."""
    bearer = security.has_token

    def adding(make: Callable[..., Any], unary: bool) -> Callable[..., Any]:
        def multi(path: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
            inner = make(path, *args, **kwargs)

            def call(*given: Any, metadata: Any = None, **named: Any) -> Any:
                added = list(metadata or ())
                if bearer:
                    added.append(("authorization", f"Bearer {security.read_token()}"))
                if tracing is None or not unary:
                    return inner(*given, metadata=added, **named)
                return tracing.call(path, lambda more: inner(*given, metadata=[*added, *more], **named))

            return call

        return multi

    channel.unary_unary = adding(channel.unary_unary, True)  # type: ignore[method-assign]
    channel.stream_stream = adding(channel.stream_stream, False)  # type: ignore[method-assign]
    return channel


def error_of_rpc(error: grpc.aio.AioRpcError) -> MmuBusError:
    """A failed rpc in our own terms, with what its ErrorInfo says."""
    reason, metadata = "", dict[str, str]()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    reason, metadata = info.reason, dict(info.metadata)
    details = (error.details() or "").replace(
        "failed to connect to all addresses; last error:", "no server answers (is one running?):"
    )
    return error_from(error.code().name, reason, details, metadata)


async def unary(call: Awaitable[T]) -> T:
    """Await a unary call; its failure is raised in our own terms."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_of_rpc(error) from None


def session_metadata(token: str, within: int = 0) -> tuple[tuple[str, str], ...]:
    """The metadata that lets a call act for a session. Args: within: the notice whose handler makes it, 0: none."""
    if not token:
        return ()
    acting = ("mmubus-session", token)
    return (acting, ("mmubus-within", str(within))) if within else (acting,)
