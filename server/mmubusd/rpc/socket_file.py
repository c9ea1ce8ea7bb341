"""The file of a Unix socket: put in its place when it is bound, and taken away only by who put it there.

gRPC and the event loops remove the file that they have bound when they stop, whoever's it is by then: an
operator who removes the file of a server and starts another one there lost the new one's when the old one stopped. So a
socket is bound under a name that nobody else has, and that name becomes the path.
"""

from __future__ import annotations

import os
import secrets
import socket
import stat
from pathlib import Path

__all__ = ["SocketFile"]

ADDRESS_MAX = 107
"""Bytes of a Unix socket's path. Kernel: sun_path."""


class SocketFile:
    """One path at which a server listens.

    Attributes: path: where clients connect. bound: what to bind.
    """

    def __init__(self, path: Path) -> None:
        """Make way: a socket that a dead server left is removed.

        Raises: OSError when a server answers on it, or when it is not a socket.
        """
        self.path = path
        beside = path.parent / f".{secrets.token_hex(4)}"
        self.bound = beside if len(os.fsencode(beside)) <= ADDRESS_MAX else path
        self._identity: tuple[int, int] | None = None
        _make_way(path)

    def settle(self) -> None:
        """It is bound. Raises: OSError."""
        if self.bound != self.path:
            os.rename(self.bound, self.path)
        self._identity = _identity(self.path)

    def remove(self) -> None:
        """Nobody listens any more. Idempotent; another server's is left alone."""
        if self._identity is not None and _identity(self.path) == self._identity:
            self.path.unlink(missing_ok=True)
        self._identity = None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _make_way(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(f"{path} exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(f"unix:{path} is in use: a server answers there")
