"""The address that Prometheus scrapes: a few lines of HTTP on the server's own loop.

On this loop and not on a thread, so that what is read does not change meanwhile. One request a connection, bounded in
size and time; nothing but GET /metrics is answered.
"""

from __future__ import annotations

import asyncio

from mmubusd.rpc.metrics import CONTENT_TYPE, Metrics

__all__ = ["Exposition"]

HEAD_BYTES_MAX = 8192
REQUEST_S = 5.0
CONNECTIONS_MAX = 16


class Exposition:
    """Serves the metrics. Attributes: address: host:port, once it has started."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[object], asyncio.StreamWriter] = {}
        self.address = ""

    async def start(self, host: str, port: str) -> None:
        """Listen. Raises: OSError."""
        self._server = await asyncio.start_server(self._answer, host, int(port), limit=HEAD_BYTES_MAX)
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Close the address and every connection. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._open.values():
            writer.close()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        try:
            if len(self._open) <= CONNECTIONS_MAX:
                async with asyncio.timeout(REQUEST_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._response(head))
                    await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, OSError):
            return  # it is no scraper; the connection is closed below
        finally:
            del self._open[task]
            writer.close()

    def _response(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method != b"GET":
            return _http("405 Method Not Allowed", "text/plain", b"only GET\n")
        if path != b"/metrics":
            return _http("404 Not Found", "text/plain", b"only /metrics\n")
        return _http("200 OK", CONTENT_TYPE, self._metrics.text())


def _http(status: str, kind: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
