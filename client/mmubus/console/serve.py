"""The console's process: a web server on one address, a client of one mmubus server."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mmubus.connection import connect
from mmubus.console.pages import Pages
from mmubus.errors import UnsafeConnection
from mmubus.look import Watch
from mmubus.trace.loop import run

__all__ = ["serve"]

# Nothing may be loaded from, or sent to, anybody but this process. NiceGUI's scripts need the two unsafe ones.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; frame-ancestors 'none'; form-action 'self'; base-uri 'none'"
)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def serve(server: str | None, listen: str, *, public: bool = False) -> None:
    """Serve the console until a signal ends it; prints where it is.

    Args: server: as of `connect`. listen: HOST:PORT; port 0: any that is free. public: other machines may reach it.
    Raises: UnsafeConnection, OSError.
    """
    host, port = _parse(listen)
    if not public and not _is_loopback(host):
        raise UnsafeConnection(
            f"{listen}: other machines reach it, and it asks for no password; say --public if that is wanted"
        )
    run(_serve(server, host, port, public))


async def _serve(server: str | None, host: str, port: int, public: bool) -> None:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if not public:  # a page elsewhere whose name is made to mean this machine must not reach us
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host])
    async with connect(server, name="mmubus console") as bus:
        Pages(Watch(bus)).add_to(app)
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            config = uvicorn.Config(_Guarded(app), log_level="warning", access_log=False, server_header=False)
            await _Announcing(config).serve(sockets=[listening])
        finally:
            listening.close()


class _Announcing(uvicorn.Server):
    """Says where it is when it is there."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for one in sockets or ():
            host, port = one.getsockname()[:2]
            print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


class _Guarded:
    """An application whose answers forbid the browser to talk to anybody else."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await self._app(scope, receive, guarded)


def _parse(listen: str) -> tuple[str, int]:
    """Raises: OSError."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise OSError(f"{listen!r} is no address to listen on; write HOST:PORT, as 127.0.0.1:8080")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
