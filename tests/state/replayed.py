"""A plugin: every embedded server of a test run keeps its state, and is played again when it has stopped.

    PYTHONPATH=tests pytest -p state.replayed tests/rpc tests/hmm tests/client

What its journal makes must be what it was. Servers that were asked for chaos, or that broke, are left alone. A test
that has the bus do something that is no input is stopped by `RecordedCore.start`.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import pytest
from mmubusd.rpc import EmbeddedServer
from mmubusd.state import Directory, RecordedCore, open_state
from state.likeness import digest
from state.workload import PAGE, unseen


def pytest_configure(config: pytest.Config) -> None:
    make, leave = EmbeddedServer.__init__, EmbeddedServer.__aexit__

    def begin(self: EmbeddedServer, settings: object = None, log: object = None, **options: object) -> None:
        if settings is None and "chaos" not in options and "state" not in options:
            self.kept_in = options["state"] = Path(tempfile.mkdtemp(prefix="mmubus-replayed-"))  # type: ignore[attr-defined]
        make(self, settings, log, **options)  # type: ignore[arg-type]

    async def end(
        self: EmbeddedServer,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        core = self.server.bus
        store = core.memory.frames.store
        await leave(self, kind, error, traceback)
        path = getattr(self, "kept_in", None)
        if path is not None and isinstance(core, RecordedCore) and error is None:
            core.frames.store = store
            check(core, path)
        if path is not None:
            shutil.rmtree(path)

    EmbeddedServer.__init__ = begin  # type: ignore[method-assign]
    EmbeddedServer.__aexit__ = end  # type: ignore[method-assign]


def check(core: RecordedCore, path: Path) -> None:
    """Raises: AssertionError when the state that is kept is another one."""
    directory = Directory(path)
    try:
        _, again, _ = open_state(
            directory, {}, lambda: core, lambda frames_nr: memoryview(mmap.mmap(-1, frames_nr * PAGE))
        )
    finally:
        directory.close()
    but = unseen(core)
    core.finished.clear()
    core.drain_ready()
    for one in (core, again):
        one.remembered = {kind: kept for kind, kept in one.remembered.items() if kept}
    assert again.fingerprint() == core.fingerprint()
    assert digest(again, but) == digest(core, but), f"{path}: played again it is another one"
