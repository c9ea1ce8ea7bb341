"""A server inside a process that does other things, too."""

from __future__ import annotations

import tempfile
from types import TracebackType

from structlog.typing import FilteringBoundLogger

from mmubusd.rpc.config import Settings
from mmubusd.rpc.server import Server

__all__ = ["EmbeddedServer"]


class EmbeddedServer:
    """A server inside this process, for tests and for replays: an async context manager.

    Listens on a Unix socket in a directory of its own, unless settings say otherwise. Leaving the context drains and
    stops it; a broken invariant is raised there.
    """

    def __init__(
        self, settings: Settings | None = None, log: FilteringBoundLogger | None = None, **options: object
    ) -> None:
        """Args: settings: all of them; or options: some of them by name, the rest as default."""
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        if settings is None:
            if "listen" not in options:
                self._directory = tempfile.TemporaryDirectory(prefix="mmubus-")
                options["listen"] = (f"unix:{self._directory.name}/mmubus.sock",)
            settings = Settings.model_validate({"log_level": "error", "drain_s": 0.0, **options})
        self.server = Server(settings, log)

    @property
    def address(self) -> str:
        """Where clients find it."""
        return self.server.addresses[0]

    async def __aenter__(self) -> EmbeddedServer:
        await self.server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.server.drain()
            await self.server.stop()
        finally:
            if self._directory is not None:
                self._directory.cleanup()
        broken = self.server.alarm.broken
        if broken.done():
            raise broken.result()
