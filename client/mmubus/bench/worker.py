"""A process that takes part in a benchmark, as the benchmark's process sees it and as it sees itself.

Server, clients and brokers are processes of their own, as they are in real life: one loop each, nothing shared. A
worker runs one *role*, an async function `module:function`, and is told what to do by lines of JSON on its standard
input; it answers each with one line on its standard output.

    parent                              worker
    start(role, options)            ->  runs the role, which sets up and calls serve(commands)
                                    <-  {"value": …}       it is ready
    ask("gather", rounds=500)       ->  commands["gather"](rounds=500)
                                    <-  {"value": …}
    stop(): end of input            ->  serve returns, the role cleans up, the process ends
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

__all__ = ["Worker", "WorkerFailed", "main", "run_loop", "serve"]

ANSWER_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 10.0
LINE_MAX = 1 << 24

Command = Callable[..., Awaitable[Any]]


class WorkerFailed(Exception):
    """A worker ended or did not answer; what it had to say is on standard error."""


class Worker:
    """The parent's end of one worker."""

    def __init__(self, role: str, process: Process) -> None:
        self.role = role
        self.ready: Any = None
        self._process = process

    @classmethod
    async def start(cls, role: str, **options: Any) -> Worker:
        """Start a worker and wait until it is ready; `ready` is what it said.

        Args: role: "module:function"; options: its keyword arguments, as JSON has them.
        Raises: WorkerFailed.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __package__, role, json.dumps(options), stdin=PIPE, stdout=PIPE, limit=LINE_MAX
        )
        worker = cls(role, process)
        try:
            worker.ready = await worker._answer()
        except BaseException:
            await worker.stop()
            raise
        return worker

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    async def ask(self, command: str, **arguments: Any) -> Any:
        """Have it run a command. Returns: what the command returned. Raises: WorkerFailed."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
        return await self._answer()

    async def stop(self) -> None:
        """Let it clean up and end; kill it when it does not."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _answer(self) -> Any:
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), ANSWER_TIMEOUT_S)
        except TimeoutError:
            raise WorkerFailed(f"{self.role} did not answer within {ANSWER_TIMEOUT_S:.0f} s") from None
        if not line:
            raise WorkerFailed(f"{self.role} ended; what went wrong stands above")
        return json.loads(line)["value"]


async def serve(commands: Mapping[str, Command], ready: Any = None) -> None:
    """The worker's end: say that it is ready, then run commands until the parent closes the input."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE_MAX)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    _say(ready)
    while line := await reader.readline():
        command, arguments = json.loads(line)
        _say(await commands[command](**arguments))


def _say(value: Any) -> None:
    # Standard output is the answers' alone; print() of anything else would break the conversation.
    sys.stdout.write(json.dumps({"value": value}) + "\n")
    sys.stdout.flush()


def run_loop(main: Awaitable[Any]) -> Any:
    """Run to the end on uvloop, or on asyncio's loop where there is none."""

    async def whole() -> Any:
        return await main

    try:
        import uvloop
    except ImportError:
        return asyncio.run(whole())
    return uvloop.run(whole())


def main() -> None:
    """`python -m mmubus.bench ROLE OPTIONS`: run one role."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    module, _, function = sys.argv[1].partition(":")
    role = getattr(importlib.import_module(module), function)
    run_loop(role(**json.loads(sys.argv[2])))
