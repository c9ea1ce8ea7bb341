"""The thread behind the synchronous face: one event loop for all synchronous connections of the process.

One loop, since two loops in a process that both use grpc.aio wake each other up for nothing. It starts with the first
connection and ends with the last one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from mmubus.errors import CalledFromHandler

__all__ = ["Portal", "Run"]

T = TypeVar("T")


class Run(Protocol):
    """Runs a coroutine in the portal's thread and waits for it."""

    def __call__(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns, and raises, what the coroutine does."""
        ...


class Portal:
    """An event loop in a thread of its own, shared and counted: `enter`, then `run` from any thread, then `leave`."""

    _shared: Portal | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        self._users = 0
        self._over = asyncio.Event()
        self._runner = asyncio.Runner(loop_factory=_new_loop)
        self.loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._serve, name="mmubus", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        """The thread: what is still under way when it is over is cancelled, and ends before the loop is closed."""
        with self._runner:
            self._runner.run(self._over.wait())

    @classmethod
    def enter(cls) -> Portal:
        """The shared portal, started when it is not there."""
        with cls._lock:
            if cls._shared is None:
                cls._shared = cls()
            cls._shared._users += 1
            return cls._shared

    def leave(self) -> None:
        """One user fewer; the last one ends the thread."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            Portal._shared = None
        self.loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine in the thread and wait for it; an interrupt or a timeout cancels it.

        Raises: what it raises; TimeoutError; CalledFromHandler in the portal's own thread, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise CalledFromHandler(
                "a handler of this connection runs in the thread that would have to do this; "
                'connect with handlers="worker", or do it after the handler has returned'
            )
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            if not future.cancel():
                return future.result()  # it has ended after all, or with a TimeoutError of its own
            raise TimeoutError(f"not done within {timeout_s} s; the server may still do it") from None
        except BaseException:
            future.cancel()
            raise


def _new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed: a third faster."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
