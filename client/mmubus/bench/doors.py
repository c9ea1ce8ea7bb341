"""What the benchmark takes from the server's own code; together with `mmubus.bench.served` and `mmubus.bench.core`
the only modules here that import it.
"""

from __future__ import annotations

from mmubus.channel import grpc

__all__ = ["server_options"]


def server_options() -> list[tuple[str, int]]:
    """The server's channel options: a floor is one only with the same transport settings."""
    from mmubusd.rpc.transport import server_options as options

    assert grpc  # the switches were set before grpc was first imported, see mmubus.channel
    return options(4 << 20)
