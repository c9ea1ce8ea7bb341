"""What two driver processes say to each other: questions and answers, in both directions, on one stream.

    header length, data length   two big-endian uint32
    header                       JSON: {"ask": name, "n": number, ...} or {"answer": number, ...}
    data                         bytes

Order is kept, and that is what protocols here are built on: what `Message.reply` is given goes out at once, before
anything that is said later, and a plain handler, or the `commit` of `ask`, runs where the message is read, before any
later one is looked at. So a grant that was sent before its recall is also in the table before the recall is handled.
"""

from __future__ import annotations

import asyncio
import json
import logging
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from mmubus.errors import CallFailed, ConnectionLost, MmuBusError, error_from

__all__ = ["Handler", "Message", "Wire", "dial", "listen"]

log = logging.getLogger("mmubus.drivers")

LENGTHS = struct.Struct(">II")
HEADER_BYTES_MAX, DATA_BYTES_MAX = 1 << 20, 64 << 20

Handler: TypeAlias = "Callable[[Message], Awaitable[None] | None]"
"""Answers a question by Message.reply; plain: at once and in order, async: in a task of its own."""


class Message:
    """One message that has come in. Attributes: fields: of its header; data: bytes."""

    def __init__(self, wire: Wire, fields: dict[str, Any], data: bytes) -> None:
        self.wire = wire
        self.fields = fields
        self.data = data
        self.answered = False

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def reply(self, data: bytes = b"", **fields: object) -> None:
        """Answer, now."""
        self.answered = True
        self.wire.send({"answer": self.fields["n"], **fields}, data)


class Wire:
    """One end of a connection.

    Args: handlers: by the name of the question. closed: called once when it has ended, for whatever reason.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        handlers: Mapping[str, Handler],
        closed: Callable[[Wire], None] | None = None,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._handlers = handlers
        self._closed = closed
        self._answers: dict[int, tuple[asyncio.Future[Message], Callable[[Message], None] | None]] = {}
        self._last = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.open = True
        self._reading = asyncio.create_task(self._read())

    def ask(
        self, name: str, data: bytes = b"", *, commit: Callable[[Message], None] | None = None, **fields: object
    ) -> asyncio.Future[Message]:
        """Ask the other side, now: it goes out before anything that is said later. Returns: the answer, to be awaited.

        Args: commit: called with the answer when it is read, before any later message is looked at.
        Raises: ConnectionLost; awaiting it also what the other side raised, as far as that is an error of ours.
        """
        self._last += 1
        self.send({"ask": name, "n": self._last, **fields}, data)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._answers[self._last] = answer, commit
        return answer

    def send(self, fields: dict[str, object], data: bytes = b"") -> None:
        """Put a message on the wire. Raises: ConnectionLost."""
        if not self.open:
            raise ConnectionLost("the connection to the other driver is closed")
        header = json.dumps(fields, separators=(",", ":")).encode()
        self._writer.write(LENGTHS.pack(len(header), len(data)) + header + data)

    async def close(self) -> None:
        """End the connection; what is asked fails with ConnectionLost. Idempotent."""
        self._reading.cancel()
        await asyncio.gather(self._reading, *self._tasks, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while True:
                header, data = LENGTHS.unpack(await self._reader.readexactly(LENGTHS.size))
                if header > HEADER_BYTES_MAX or data > DATA_BYTES_MAX:
                    raise ValueError(f"a message of {header} + {data} bytes")
                fields = json.loads(await self._reader.readexactly(header))
                self._receive(Message(self, fields, await self._reader.readexactly(data)))
        except (OSError, EOFError):
            pass  # the other side has gone: the end of every connection
        except (ValueError, KeyError, TypeError) as error:
            log.error("the other driver does not speak this protocol: %s", error)
        finally:
            self._end()

    def _receive(self, message: Message) -> None:
        if "ask" in message.fields:
            self._handle(message)
        elif (waiting := self._answers.pop(message["answer"], None)) is not None:
            answer, commit = waiting
            if answer.done():
                return
            if error := message.fields.get("error"):
                answer.set_exception(error_from("", error["reason"], error["message"]))
                return
            if commit is not None:
                commit(message)
            answer.set_result(message)

    def _handle(self, message: Message) -> None:
        try:
            waiting = self._handlers[message["ask"]](message)
        except MmuBusError as error:
            self._fail(message, error)
            return
        if waiting is not None:
            task = asyncio.ensure_future(self._finish(message, waiting))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _finish(self, message: Message, waiting: Awaitable[None]) -> None:
        try:
            await waiting
        except MmuBusError as error:
            self._fail(message, error)

    def _fail(self, message: Message, error: MmuBusError) -> None:
        if message.answered or not self.open:
            return
        reason = error.reason if isinstance(error, CallFailed) else "EIO"
        text = error.message if isinstance(error, CallFailed) else str(error)
        message.reply(error={"reason": reason, "message": text})

    def _end(self) -> None:
        if not self.open:
            return
        self.open = False
        for answer, _ in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionLost("the other driver has gone"))
        for task in self._tasks:
            task.cancel()
        self._writer.close()
        if self._closed is not None:
            self._closed(self)


async def dial(address: str, handlers: Mapping[str, Handler]) -> Wire:
    """Connect to another driver. Args: address: unix:/path or host:port. Raises: OSError."""
    if address.startswith("unix:"):
        return Wire(*await asyncio.open_unix_connection(address.removeprefix("unix:")), handlers)
    host, _, port = address.rpartition(":")
    return Wire(*await asyncio.open_connection(host, int(port)), handlers)


async def listen(address: str, connected: Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]) -> Listener:
    """Let other drivers connect. Args: connected: called with each; address: as of dial, port 0: a free one."""
    if address.startswith("unix:"):
        return Listener(await asyncio.start_unix_server(connected, address.removeprefix("unix:")), address)
    host, _, port = address.rpartition(":")
    server = await asyncio.start_server(connected, host, int(port))
    return Listener(server, f"{host}:{server.sockets[0].getsockname()[1]}")


class Listener:
    """Where other drivers connect to. Attributes: address: what to dial."""

    def __init__(self, server: asyncio.Server, address: str) -> None:
        self._server = server
        self.address = address

    def close(self) -> None:
        """No new connections."""
        self._server.close()
