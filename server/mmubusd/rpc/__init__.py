"""gRPC and asyncio around the cores: the only room with I/O.

`transport` is imported first: it tells grpc how to work, before grpc is imported.
"""

from mmubusd.rpc import transport
from mmubusd.rpc.command import main, serve
from mmubusd.rpc.config import ConfigError, Settings, load
from mmubusd.rpc.embedded import EmbeddedServer
from mmubusd.rpc.server import Server

__all__ = ["ConfigError", "EmbeddedServer", "Server", "Settings", "load", "main", "serve", "transport"]
