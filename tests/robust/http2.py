"""Bare HTTP/2, to do to a server what no gRPC library would: frames by hand, on a plain socket."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterable

DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4
HEAD_BYTES = 9


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def message(data: bytes) -> bytes:
    """A message of gRPC, as it goes into DATA."""
    return b"\0" + len(data).to_bytes(4, "big") + data


def _header(name: str, value: str) -> bytes:
    assert max(len(name), len(value)) < 127, "longer ones are written otherwise"
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class Client:
    """One connection; pings are answered, and everything else that comes is forgotten.

    Args: window: bytes that the server may send on a stream before it is told that they were read.
    """

    def __init__(self, address: str, *, window: int = 65535) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._stream = -1
        self._one = threading.Lock()
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        self.send(preface + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, window)))
        threading.Thread(target=self._answer_pings, daemon=True).start()

    def send(self, data: bytes) -> None:
        with self._one:
            self._socket.sendall(data)

    def call(self, path: str, data: bytes | None = None, more: Iterable[tuple[str, str]] = (), end: bool = True) -> int:
        """Begin a call. Args: data: its first message, None: only the headers come. Returns: its stream."""
        self._stream += 2
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "server")]
        fields += [("content-type", "application/grpc"), ("te", "trailers"), *more]
        frames = frame(HEADERS, END_HEADERS, self._stream, b"".join(_header(*field) for field in fields))
        if data is not None:
            frames += frame(DATA, END_STREAM if end else 0, self._stream, message(data))
        self.send(frames)
        return self._stream

    def close(self) -> None:
        self._socket.close()

    def _answer_pings(self) -> None:
        rest = b""
        try:
            while got := self._socket.recv(65536):
                rest += got
                while len(rest) >= HEAD_BYTES:
                    end = HEAD_BYTES + int.from_bytes(rest[:3], "big")
                    if len(rest) < end:
                        break
                    if rest[3] == PING and not rest[4] & ACK:
                        self.send(frame(PING, ACK, 0, rest[HEAD_BYTES:end]))
                    rest = rest[end:]
        except OSError:
            return
