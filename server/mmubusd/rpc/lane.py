"""Lanes: what a stream carries, over a plain Unix socket, for clients on this machine.

    bytes of an acknowledgement ──data_received──► bus.acknowledge ──► pump      one call, no task switch
    sessions that are ready     ──wake──► the loop's next turn ──► one batch, one write

Through grpc.aio a message wakes a task, which wakes another, and every byte goes through a second library's threads and
buffers: three quarters of a round's time. A lane carries exactly the contract's messages, each behind four bytes of
length: of a session nothing but notices and their acknowledgements (session.proto), of a pipelined stream its requests
and answers (`mmubusd.rpc.pipeline`). Its stream stands beside it: it says how everything ends, and takes the notices
back when the lane breaks. A peer that does not read its lane is a silent client like any other: what waits for it is
bounded, and it is fenced when its budget is over.

Who may open one: a process of the server's own user (or root), by the mode of the socket and its directory and by
SO_PEERCRED, with a secret that the stream carried (in Welcome, or in its initial metadata) and that works once. What
may be done is what the stream may.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
from typing import Protocol

from google.protobuf.message import DecodeError
from mmu.v1 import session_pb2 as pb

from mmubusd.notify import PeerError
from mmubusd.rpc.commits import Commits
from mmubusd.rpc.identity import digest
from mmubusd.rpc.methods import Context
from mmubusd.rpc.peer_credentials import peer_uid

__all__ = ["Lane", "LaneUser", "Lanes", "is_local"]

SECRET_BYTES = 32
LENGTH_BYTES = 4
OPENING_S = 10.0
"""How long a connection may stand without having said its secret."""
OPENING_MAX = 64
"""Connections that have not said their secret, at a time."""
OPENING_BYTES_MAX = 128
"""Bytes of the first message."""
BUFFER_HIGH_BYTES = 64 << 10
"""Bytes written and not taken by the kernel above which no batch is taken; the outbox has its own bounds."""
BUFFER_MAX_BYTES = 1 << 20
"""Bytes at which a lane that is not read is closed: answers are not held back by the mark above."""
BESIDE_MAX = 80
"""Characters of the path that a lane's is made beside; a Unix socket's has at most 107."""

WANTED_KEY = "mmubus-lane"
"""Metadata by which the client of a pipelined stream asks for a lane; PATH_KEY and SECRET_KEY of its initial metadata
answer."""
PATH_KEY = "mmubus-lane-path"
SECRET_KEY = "mmubus-lane-secret-bin"

OPENED = pb.AttachResponse(lane_opened=pb.LaneOpened()).SerializeToString()


class LaneUser(Protocol):
    """The stream beside a lane."""

    def lane_opened(self, lane: Lane) -> None:
        """It carries the messages from now on."""

    def lane_closed(self, lane: Lane) -> None:
        """It does no more."""

    def lane_heard(self, data: bytes) -> None:
        """One message of the client. Raises: PeerError when it is not one for a lane."""

    def lane_caught_up(self) -> None:
        """Everything that was heard at once has been told."""

    def lane_failed(self, error: Exception) -> None:
        """The client broke the contract on it, or an invariant of ours is broken."""

    def lane_messages(self) -> list[bytes]:
        """Take what there is to send."""


class Lanes:
    """Where lanes are opened: one socket in a directory of its own, mode 0700.

    Args:
        bytes_max: of one message of a client.
        beside: the server's own Unix socket, "": it has none. Whoever sees that one sees a lane beside it, in another
            container or with a /tmp of its own.
        commits: what everything that is sent waits for; None: nothing is kept.
    """

    def __init__(self, bytes_max: int, beside: str = "", commits: Commits | None = None) -> None:
        self.bytes_max = bytes_max
        self.commits = commits
        self._directory = _private_directory(beside)
        self.path = f"{self._directory.name}/lane.sock"
        self.opening_nr = 0
        self._offers: dict[str, LaneUser] = {}
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        """Listen. Raises: OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: Lane(self), self.path)
        os.chmod(self.path, 0o600)

    def stop(self) -> None:
        """Accept no more; the lanes that stand end with their streams. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._directory.cleanup()

    async def offer_to(self, user: LaneUser, context: Context) -> bytes:
        """Offer one in the stream's initial metadata, if its client is here and asks for it.

        Returns: the secret, to withdraw; b"" when none is offered. Requires: nothing has been written.
        """
        if self.commits is not None or not is_local(context):
            return b""  # an answer that waits for the disk gains nothing, and must fail when the disk is full
        if (WANTED_KEY, "1") not in tuple(context.invocation_metadata() or ()):
            return b""
        secret = self.offer(user)
        await context.send_initial_metadata(((PATH_KEY, self.path), (SECRET_KEY, secret)))
        return secret

    def offer(self, user: LaneUser) -> bytes:
        """Returns: the secret that opens a lane for this stream, once."""
        secret = secrets.token_bytes(SECRET_BYTES)
        self._offers[_key(secret)] = user
        return secret

    def withdraw(self, secret: bytes) -> None:
        """The stream has ended. Idempotent."""
        self._offers.pop(_key(secret), None)

    def accept(self, data: bytes) -> LaneUser | None:
        """Returns: the stream whose secret a first message says; None when it says none that is known (any more)."""
        try:
            message = pb.AttachRequest.FromString(data)
        except DecodeError:
            return None
        return self._offers.pop(_key(message.open_lane.secret), None)


def is_local(context: Context) -> bool:
    """Whether the client is on this machine."""
    return context.peer().startswith(("unix:", "ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D"))


def _private_directory(beside: str) -> tempfile.TemporaryDirectory[str]:
    """A directory of mode 0700, beside a socket where that can be, else where temporary files are."""
    if beside and len(os.path.abspath(beside)) < BESIDE_MAX:
        with contextlib.suppress(OSError):
            return tempfile.TemporaryDirectory(prefix=".lane-", dir=os.path.dirname(os.path.abspath(beside)))
    return tempfile.TemporaryDirectory(prefix="mmubusd-lane-")


def _key(secret: bytes) -> str:
    # Looked up by its hash: how long that takes tells nothing about the secret.
    return digest(secret.hex())


class Lane(asyncio.Protocol):
    """One connection, from accept to its end."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._loop = asyncio.get_running_loop()
        self._user: LaneUser | None = None
        self._transport: asyncio.Transport | None = None
        self._silent: asyncio.TimerHandle | None = None
        self._rest = b""
        self._due = self._paused = False

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is one, but does not say so
        transport.set_write_buffer_limits(BUFFER_HIGH_BYTES)  # type: ignore[attr-defined]
        self._lanes.opening_nr += 1
        self._silent = self._loop.call_later(OPENING_S, self.close)
        uid = peer_uid(transport.get_extra_info("socket"))
        if uid not in (os.geteuid(), 0) or self._lanes.opening_nr > OPENING_MAX:
            self.close()

    def data_received(self, data: bytes) -> None:
        """Every whole message that has come; then what all of them together have made ready."""
        if self._transport is None:
            return
        try:
            self._rest = self._messages(self._rest + data if self._rest else data)
            if self._user is not None:
                self._user.lane_caught_up()
        except Exception as error:
            self._fail(error)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_opening()
        self._transport = None
        user, self._user = self._user, None
        if user is not None:
            user.lane_closed(self)

    # What its stream calls.

    def pause_reading(self) -> None:
        """Take no more for now; what has been read already still comes."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def wake(self) -> None:
        """There is something to send: what is ready when the loop comes round goes out as one message."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self._flush)

    def send(self, data: bytes) -> None:
        """Write one message, once everything that led to it is kept."""
        commits = self._lanes.commits
        if commits is None:
            self._send(data)
        else:
            commits.then(lambda: self._send(data))

    def _send(self, data: bytes) -> None:
        transport = self._transport
        if transport is not None:
            transport.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
            if self._paused and transport.get_write_buffer_size() > BUFFER_MAX_BYTES:
                self.close()

    def close(self) -> None:
        """End it at once; what has not been read is sent again on the stream. Idempotent."""
        if self._transport is not None:
            self._transport.abort()

    def finish(self) -> None:
        """End it when everything has been sent. Idempotent."""
        if self._transport is not None:
            self._transport.close()

    # Inside.

    def _messages(self, data: bytes) -> bytes:
        """Take whole messages from the front. Returns: what is left. Raises: PeerError."""
        at, size = 0, len(data)
        while size - at >= LENGTH_BYTES:
            begin = at + LENGTH_BYTES
            end = begin + int.from_bytes(data[at:begin], "big")
            user = self._user
            bytes_max = OPENING_BYTES_MAX if user is None else self._lanes.bytes_max
            if end - begin > bytes_max:
                raise PeerError(f"a message of {end - begin} bytes on a lane; at most {bytes_max} are taken")
            if end > size:
                break
            message = data[begin:end]
            if user is not None:
                user.lane_heard(message)
            elif not self._open(message):
                return b""
            at = end
        return data[at:] if at else data

    def _open(self, message: bytes) -> bool:
        user = self._lanes.accept(message)
        if user is None:
            self.close()
            return False
        self._end_opening()
        self._user = user
        self.send(OPENED)
        user.lane_opened(self)
        return True

    def _flush(self) -> None:
        self._due = False
        user = self._user
        if user is None or self._paused:
            return  # what is ready stays where it is, and is taken when the peer has read
        try:
            for message in user.lane_messages():
                self.send(message)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        user = self._user
        self.close()
        if user is not None:
            user.lane_failed(error)
        elif not isinstance(error, PeerError):
            raise error

    def _end_opening(self) -> None:
        if self._silent is not None:
            self._silent.cancel()
            self._silent = None
            self._lanes.opening_nr -= 1
