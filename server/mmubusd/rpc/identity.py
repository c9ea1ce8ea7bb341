"""Who calls: a principal, from a bearer token, a client certificate or the credentials of a Unix socket's peer.

| principal | known by | where |
|---|---|---|
| `token:NAME` | a bearer token in the call's metadata; the server keeps only its SHA-256 | everywhere |
| `cert:NAME` | the certificate's common name, checked by TLS against tls_client_ca | TLS addresses |
| `unix:USER` | SO_PEERCRED, or the socket's mode 0600 which the kernel checks | Unix sockets |
| `local` | nothing: no kind of authentication is configured | loopback and Unix sockets |

A token that is presented counts before everything else, and a wrong one is refused: nobody falls back to less.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from mmubusd.rpc.errors import Unauthenticated
from mmubusd.rpc.methods import Context

__all__ = [
    "LOCAL",
    "Identities",
    "Principal",
    "SecurityFileError",
    "digest",
    "read_private",
    "read_tokens",
    "session_key",
    "user_name",
]

BEARER = "bearer "
TOKEN_LINE = re.compile(r"([A-Za-z0-9_.@-]{1,64}):([0-9a-f]{64})")


class SecurityFileError(ValueError):
    """A file of tokens, roles or certificates cannot be used; the message says which line and why, never a secret."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who calls. credential: the digest of the token that was presented, b"" when it was none."""

    name: str
    credential: bytes = b""


LOCAL = Principal("local")
"""Everybody, when nothing is configured."""


def digest(secret: str) -> str:
    """What is kept of a secret. It is of 192 random bits and more, so that a plain hash is enough."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def session_key(who: Principal, token: str) -> str:
    """By what the core knows a session: its token is kept nowhere, and worth nothing in another principal's hands."""
    return digest(f"{who.name}\0{token}")


def user_name(uid: int) -> str:
    """The user's name, or its number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def read_tokens(path: Path) -> dict[str, str]:
    """Read a file of tokens: `NAME:SHA256` a line, empty lines and # comments aside.

    Returns: names by digest; several tokens may have one name, so that a token can be replaced without a gap.
    Raises: SecurityFileError.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(read_private(path).splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = TOKEN_LINE.fullmatch(text)
        if match is None:
            raise SecurityFileError(f"tokens: {path}, line {number} is not NAME:SHA256, 64 hexadecimal digits")
        found[match[2]] = match[1]
    return found


def read_private(path: Path) -> str:
    """Read a file that says who may do what. Raises: SecurityFileError when others could have written it."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise SecurityFileError(f"{path} can be written by others (mode {stat.S_IMODE(mode):04o}); chmod go-w")
            return file.read().decode()
    except OSError as error:
        raise SecurityFileError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SecurityFileError(f"{path} is not text in UTF-8") from error


class Identities:
    """Finds out who calls.

    Args:
        tokens: names by digest. peers_directory: where the relay of Unix sockets binds its side, see peer_credentials.
        certificates: whether TLS addresses ask for certificates of clients.
    """

    def __init__(self, tokens: Mapping[str, str], *, certificates: bool, peers_directory: str = "") -> None:
        self.tokens = tokens
        self._certificates = certificates
        self._peers = f"{peers_directory}/peer-" if peers_directory else ""
        self._own = f"unix:{user_name(os.getuid())}"

    @property
    def own(self) -> str:
        """The principal of the user whom the server runs as."""
        return self._own

    def stands(self, who: Principal) -> bool:
        """Whether the token by which it came is still one."""
        return not who.credential or who.credential.decode() in self.tokens

    def of(self, context: Context) -> Principal:
        """Raises: Unauthenticated."""
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                return self._of_token(value if isinstance(value, str) else value.decode("latin-1"))
        peer = context.peer()
        if peer.startswith("unix:"):
            return self._of_peer(unquote(peer.removeprefix("unix:")))
        if self._certificates:
            name = _certificate_name(context.auth_context())
            if name:
                return Principal(f"cert:{name}")
        raise Unauthenticated("the call says nothing about who makes it; a bearer token is wanted in `authorization`")

    def _of_token(self, header: str) -> Principal:
        if header[: len(BEARER)].lower() != BEARER:
            raise Unauthenticated("`authorization` is not of the form `Bearer TOKEN`")
        presented = digest(header[len(BEARER) :].strip())
        # What is looked up is the hash, which nobody can steer: how long it takes tells nothing about the token.
        name = self.tokens.get(presented)
        if name is None:
            raise Unauthenticated("the token is not known here (any more)")
        return Principal(f"token:{name}", presented.encode())

    def _of_peer(self, path: str) -> Principal:
        """The relay says by its own path who is behind it; everybody else has passed the mode of the socket."""
        if self._peers and path.startswith(self._peers):
            uid = path.removeprefix(self._peers).partition("-")[0]
            return Principal(f"unix:{user_name(int(uid))}")
        return Principal(self._own)


def _certificate_name(properties: Mapping[str, object]) -> str:
    """The name in a verified certificate: its common name, or the first of its alternative names."""
    if properties.get("transport_security_type") != [b"ssl"] and properties.get("transport_security_type") != (b"ssl",):
        return ""
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        values = properties.get(key)
        if isinstance(values, list | tuple) and values and isinstance(values[0], bytes):
            return values[0].decode("utf-8", "replace")
    return ""
