"""Whom the kit tests: a factory in Python, or a process that speaks a few lines of JSON.

The process gets one object a line on its standard input, and answers each with one on its standard output that has the
same "n". Several may be asked at a time; answers may come in any order. Addresses are numbers, bytes are hexadecimal.

    {"n": 1, "do": "attach", "address": "unix:/...", "mm": 3, "name": "driver", "chaos": ""}     -> {"n": 1}
    {"n": 2, "do": "read", "address": 123145302310912, "length": 16}                    -> {"n": 2, "data": "6d6d..."}
    {"n": 3, "do": "write", "address": 123145302310912, "data": "6d6d..."}              -> {"n": 3}
    {"n": 4, "do": "leave"}                                                             -> {"n": 4}, and it ends

What could not be done is answered with {"n": ..., "error": "what was wrong"}. docs/conform.md tells the whole.
"""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from mmubus.conform.kit import NAME, PATIENCE_S, Broken, Driver
from mmubus.errors import CallFailed

if TYPE_CHECKING:
    from mmubus.address_space import AddressSpace
    from mmubus.connection import Bus

__all__ = ["Command", "Factory", "Made"]

LINE_BYTES_MAX = 1 << 20
Factory = Callable[["Bus", "AddressSpace"], Awaitable[Driver]]


class Made:
    """Drivers of a factory in Python."""

    def __init__(self, make: Factory) -> None:
        self._make = make

    @asynccontextmanager
    async def driver(self, address: str, mm: int, *, chaos: str, survives: bool = False) -> AsyncIterator[Driver]:
        from mmubus.connection import connect

        async with connect(address, name=NAME, chaos=chaos, reattach=survives) as bus:
            yield await self._make(bus, bus.mm(mm))


class Command:
    """Drivers that are processes. Args: command: and its arguments."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command

    @asynccontextmanager
    async def driver(self, address: str, mm: int, *, chaos: str, survives: bool = False) -> AsyncIterator[Driver]:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=PIPE, stdout=PIPE, limit=LINE_BYTES_MAX
            )
        except OSError as error:
            raise Broken("Survives", f"{self._command[0]} could not be started: {error}") from error
        driver = ProcessDriver(process)
        try:
            await driver.must("attach", address=address, mm=mm, name=NAME, chaos=chaos)
            yield driver
            await driver.must("leave")
            await asyncio.wait_for(process.wait(), PATIENCE_S)
        except TimeoutError:
            raise Broken("Survives", f"the process did not end within {PATIENCE_S:.0f} s after it had left") from None
        finally:
            await driver.close()


class ProcessDriver:
    """A driver in a process of its own."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._last = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._broken: Broken | None = None
        self._reading = asyncio.create_task(self._read())

    async def read(self, address: int, length: int) -> bytes:
        """Raises: CallFailed when the driver says that it cannot; Broken."""
        answer = await self.do("read", address=address, length=length)
        try:
            return bytes.fromhex(answer["data"])
        except (KeyError, TypeError, ValueError) as error:
            raise Broken("Survives", f"a read was answered with {answer}: {error!r}") from error

    async def write(self, address: int, data: bytes) -> None:
        """Raises: as read."""
        await self.do("write", address=address, data=data.hex())

    async def must(self, what: str, **fields: object) -> None:
        """Have it done; that it cannot be is no answer. Raises: Broken."""
        try:
            await self.do(what, **fields)
        except CallFailed as error:
            raise Broken("Survives", f"{what} was refused: {error.message}") from error

    async def do(self, what: str, **fields: object) -> dict[str, Any]:
        """Have it done. Raises: CallFailed, Broken."""
        self._last += 1
        number = self._last
        await self._tell({"n": number, "do": what, **fields})
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            said = await asyncio.wait_for(answer, PATIENCE_S)
        except TimeoutError:
            raise Broken("Survives", f"{what} was not answered within {PATIENCE_S:.0f} s") from None
        finally:
            self._answers.pop(number, None)
        if "error" in said:
            raise CallFailed("DRIVER", str(said["error"]))
        return said

    async def _tell(self, message: dict[str, object]) -> None:
        assert self._process.stdin is not None
        if self._broken is None:
            try:
                self._process.stdin.write(json.dumps(message).encode() + b"\n")
            except (OSError, RuntimeError):  # its end is closed: it has ended, or is about to
                await self._reading
        if self._broken is not None:
            raise self._broken

    async def close(self) -> None:
        """End the process, whatever it does."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        why = "ended"
        try:
            while line := await self._process.stdout.readline():
                said = json.loads(line)
                if (answer := self._answers.get(said["n"])) is not None and not answer.done():
                    answer.set_result(said)
            why = f"ended with status {await self._process.wait()}"
        except (ValueError, KeyError, TypeError) as error:
            why = f"does not speak the protocol: {error!r}"
        self._broken = Broken("Survives", f"the driver's process {why}")
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self._broken)
