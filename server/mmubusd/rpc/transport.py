"""How gRPC is told to carry our streams: environment switches and channel options, in one place.

Import this module before grpc. grpc reads its environment once, when its core starts, so a switch that comes later is
not seen. Nothing here overrides what the user has set.

Measured on two shared cores, grpcio 1.85, one stream, one message each way, p50: 240 us as shipped, 140 us with the
switches below, 131 us when on a Unix socket too.
"""

from __future__ import annotations

import os
import resource

__all__ = ["EXPERIMENTS", "apply_environment", "connections_max", "raise_descriptor_limit", "server_options"]

CONNECTIONS_MAX = 1 << 20
"""Where there is no limit on file descriptors."""

# grpc's own event engine polls sockets on threads of its own and wakes Python's loop through a pipe; the older poller
# does the same with two thread switches fewer. A release that no longer knows a name prints one line on standard error
# and goes on without it, so an upgrade costs speed at worst, never correctness (1.85 has dropped event_engine_dns).
EXPERIMENTS = "-event_engine_listener,-event_engine_client"

# Calls that have arrived and that Python has not taken yet. As shipped, grpc cancels them at random from 1,000 on, and
# all beyond 3,000, with no word why; a burst of unary calls should wait its turn, or be refused by the limit that it
# reached. (A bound on the streams of a connection is no way out: those sent before its client has read the setting are
# reset.)
WAITING_MAX = 1 << 16

# How long they may wait for that. As shipped, grpc cancels them after 30 s, with no word why: a burst on a busy
# machine, or whatever was sent to a server that was stopped meanwhile. How long is too long is the caller's to say, by
# a deadline.
WAITING_MAX_S = 1 << 24


def apply_environment() -> None:
    """Set the switches that grpc reads when it is first imported, unless the user has set them."""
    os.environ.setdefault("GRPC_EXPERIMENTS", EXPERIMENTS)
    # We never fork after grpc has started; with the handlers on, each subprocess that is spawned logs a warning.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


# How long a connection may stand without having begun to speak HTTP/2, or TLS. As shipped: 2 minutes.
HANDSHAKE_MAX_S = 10


def raise_descriptor_limit() -> None:
    """Have as many file descriptors as the system allows; by default it is few, for programs that use select()."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def connections_max() -> int:
    """How many connections gRPC may hold: half of the file descriptors, so that strangers leave some for all else.

    A connection beyond it is closed as soon as it is made.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(most // 2, CONNECTIONS_MAX) if most != resource.RLIM_INFINITY else CONNECTIONS_MAX


def server_options(message_bytes_max: int) -> list[tuple[str, int]]:
    """Channel options of the server.

    Args: message_bytes_max: bytes of one message, in either direction.
    """
    return [
        ("grpc.max_allowed_incoming_connections", connections_max()),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MAX_S * 1000),
        ("grpc.server.max_pending_requests", WAITING_MAX),
        ("grpc.server.max_pending_requests_hard_limit", WAITING_MAX),
        ("grpc.server_max_unrequested_time_in_server", WAITING_MAX_S),
        # Without it a second server binds the same port and silently takes half of the clients.
        ("grpc.so_reuseport", 0),
        # Dead peers: a ping each 10 s, given 5 s. Current grpc honours ping_timeout_ms only; keepalive_timeout_ms also
        # sets TCP_USER_TIMEOUT, which is what notices a broken cable. A stopped process is the lease's business.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        # What a client may send before we read it: bounded, not grown by bandwidth probing.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 65_536),
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.max_send_message_length", message_bytes_max),
    ]


apply_environment()
