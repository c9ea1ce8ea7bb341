"""How a client shows who it is, and makes sure of whom it talks to.

Options of `connect` win over the environment: MMUBUS_TLS, MMUBUS_CA, MMUBUS_CERT, MMUBUS_KEY, MMUBUS_SERVER_NAME,
MMUBUS_TOKEN or MMUBUS_TOKEN_FILE. TLS is for host:port; a Unix socket is the kernel's business. There is no way down:
with TLS asked for nothing is sent without it, and a token never leaves this machine in the clear.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmubus.errors import UnsafeConnection

__all__ = ["Security"]


@dataclass(frozen=True, slots=True)
class Security:
    """What to show and whom to trust.

    Attributes:
        tls: whether host:port is spoken to with TLS.
        ca: file of the authorities that a server's certificate must come from; None: those of the system.
        cert, key: files of this client's certificate and its key; both or none.
        server_name: the name that must be in the server's certificate, where it is not the host's.
        token: the bearer token. token_file: where it is, instead; read again when it changes.
    """

    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""
    token: str = field(default="", repr=False)
    token_file: Path | None = None

    @classmethod
    def of(
        cls,
        *,
        tls: bool | None = None,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        server_name: str = "",
        token: str = "",
        token_file: str | Path | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> Security:
        """What was given, completed from the environment. tls None: TLS when one of ca, cert and key is there.

        Raises: UnsafeConnection when a certificate is given without its key, or TLS refused beside them.
        """
        ca, cert, key = (
            Path(given) if given else Path(found) if (found := environment.get(variable)) else None
            for given, variable in ((ca, "MMUBUS_CA"), (cert, "MMUBUS_CERT"), (key, "MMUBUS_KEY"))
        )
        if (cert is None) != (key is None):
            raise UnsafeConnection("a client's certificate and its key go together")
        if tls is None and (asked := environment.get("MMUBUS_TLS")):
            tls = asked.lower() in ("1", "true", "yes", "on")
        if tls is False and (ca or cert):
            raise UnsafeConnection("TLS is turned off, but certificates are given")
        if not (token or token_file):
            token, token_file = environment.get("MMUBUS_TOKEN", ""), environment.get("MMUBUS_TOKEN_FILE") or None
        return cls(
            bool(tls or ca or cert),
            ca,
            cert,
            key,
            server_name or environment.get("MMUBUS_SERVER_NAME", ""),
            token,
            Path(token_file) if token_file and not token else None,
        )

    @property
    def has_token(self) -> bool:
        """Whether a token is to be shown."""
        return bool(self.token or self.token_file)

    def check(self, address: str) -> None:
        """Raises: UnsafeConnection when a token would go to another machine in the clear."""
        if self.has_token and not self.tls and not _stays_here(address):
            raise UnsafeConnection(f"{address} is on another machine: a token is sent there with TLS only (tls, ca)")

    def read_token(self) -> str:
        """The token as it is now. Raises: UnsafeConnection."""
        if self.token_file is None:
            return self.token
        try:
            return self.token_file.read_text().strip()
        except OSError as error:
            raise UnsafeConnection(f"the token cannot be read from {self.token_file}: {error.strerror}") from None

    def read(self, path: Path | None) -> bytes | None:
        """The contents of a certificate's or a key's file. Raises: UnsafeConnection."""
        if path is None:
            return None
        try:
            return path.read_bytes()
        except OSError as error:
            raise UnsafeConnection(f"{path} cannot be read: {error.strerror}") from None


def is_unix(address: str) -> bool:
    """Whether the address is a Unix socket."""
    return address.startswith(("unix:", "unix-abstract:"))


def _stays_here(address: str) -> bool:
    if is_unix(address):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
