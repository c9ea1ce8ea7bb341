"""Unix sockets for several users: the kernel is asked who is at the other end (SO_PEERCRED).

gRPC does not hand out the sockets that it accepts, so a relay accepts in front of it:

    client ──► PATH, mode 0666 ──accept, SO_PEERCRED──► relay ──► gRPC's own socket in a directory of mode 0700
                                   not allowed: closed              bound to DIRECTORY/peer-UID-N

The relay binds its own end of each inner connection to a name that carries the user's number. gRPC tells a handler the
peer's name, and nobody else can bind or connect in that directory, so the name can be trusted. It costs two copies in
this process; the socket of one user alone (mode 0600) needs none of this, since the kernel checks its mode.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable

from mmubusd.rpc.socket_file import SocketFile

__all__ = ["CONNECTIONS_MAX", "Relay", "peer_uid", "user_ids"]

UCRED = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""
BUFFER_BYTES = 64 << 10
CONNECTIONS_MAX = 256
"""Connections of one user at a time. Prevents one user from taking all descriptors."""


def user_ids(names: Iterable[str]) -> frozenset[int] | None:
    """Numbers of users by name or number. Returns: None for everybody, written `*`. Raises: ValueError."""
    numbers = set()
    for name in names:
        if name == "*":
            return None
        try:
            numbers.add(int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid)
        except KeyError:
            raise ValueError(f"unix_users: there is no user {name!r} on this machine") from None
    return frozenset(numbers)


class Relay:
    """Accepts on one path for the users who are allowed."""

    def __init__(
        self,
        file: SocketFile,
        inner: str,
        directory: str,
        allowed: frozenset[int] | None,
        refused: Callable[[int], None],
    ) -> None:
        """
        Args:
            file: where clients connect; inner: gRPC's socket; directory: of mode 0700.
            allowed: user numbers; None: everybody. The server's own user always is.
            refused: called with the number of a user who was turned away.
        """
        self._file, self._inner, self._directory = file, inner, directory
        self._allowed = allowed
        self._refused = refused
        self._open: Counter[int] = Counter()
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._last = 0
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        """Listen. Raises: OSError."""
        self._server = await asyncio.start_unix_server(self._accept, self._file.bound, limit=BUFFER_BYTES)
        self._file.bound.chmod(0o666)
        self._file.settle()

    async def stop(self) -> None:
        """Close the socket and every connection. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._file.remove()
        for writer in self._connections.values():
            writer.close()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        uid = peer_uid(writer.get_extra_info("socket"))
        allowed = self._allowed is None or uid in self._allowed or uid == os.getuid()
        try:
            if not allowed or self._open[uid] >= CONNECTIONS_MAX:
                self._refused(uid)
                return
            self._open[uid] += 1
            try:
                await self._carry(uid, reader, writer)
            finally:
                self._open[uid] -= 1
        except OSError:
            return  # one of the two ends went; the other is closed below
        finally:
            del self._connections[task]
            writer.close()

    async def _carry(self, uid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connect to gRPC under a name that says who it is, and copy both ways until one of them ends."""
        self._last += 1
        name = f"{self._directory}/peer-{uid}-{self._last}"
        with socket.socket(socket.AF_UNIX) as end:
            end.setblocking(False)
            end.bind(name)
            try:
                await asyncio.get_running_loop().sock_connect(end, self._inner)
            finally:
                os.unlink(name)
            inner_reader, inner_writer = await asyncio.open_unix_connection(sock=end.dup(), limit=BUFFER_BYTES)
        copies = [
            asyncio.ensure_future(_copy(reader, inner_writer)),
            asyncio.ensure_future(_copy(inner_reader, writer)),
        ]
        try:
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for copy in copies:
                copy.cancel()
            await asyncio.gather(*copies, return_exceptions=True)
            inner_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(BUFFER_BYTES):
        writer.write(data)
        await writer.drain()


def peer_uid(end: socket.socket) -> int:
    """Who is at the other end of a Unix socket. Kernel: SO_PEERCRED, the credentials at the time of connect(2)."""
    _, uid, _ = UCRED.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return int(uid)
