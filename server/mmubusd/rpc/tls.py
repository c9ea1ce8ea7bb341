"""TLS of the server: certificate, key and the clients' authority, read again when their files change.

Every handshake looks at the files' times; what stands already goes on. Files that cannot be used (half a copy, a key
of another certificate) are told in the log, and the ones before stay in use.
"""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc

from mmubusd.rpc.certificate import SERVABLE_KEYS, read_certificates
from mmubusd.rpc.identity import SecurityFileError

__all__ = ["TlsFiles", "server_credentials"]

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files; client_ca None: clients are not asked for certificates."""

    cert: Path
    key: Path
    client_ca: Path | None

    def stamp(self) -> Stamp:
        """What changes when one of them does. Raises: OSError."""
        paths = [self.cert, self.key, *([self.client_ca] if self.client_ca else [])]
        return tuple((status.st_mtime_ns, status.st_ino, status.st_size) for status in map(Path.stat, paths))

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Raises: SecurityFileError when they cannot be read, do not fit each other, or no handshake could succeed."""
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.cert, self.key, password=lambda: "")
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
            pair = (self.key.read_bytes(), self.cert.read_bytes())
            authority = self.client_ca.read_bytes() if self.client_ca is not None else None
        except (OSError, ssl.SSLError) as error:
            raise SecurityFileError(
                f"tls: {self.cert}, {self.key}{f', {self.client_ca}' if self.client_ca else ''} cannot be used: "
                f"{_because(error)}"
            ) from error
        _check(self.cert, pair[1])
        if self.client_ca is not None and authority is not None:
            _check_authority(self.client_ca, authority)
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authority)


def _because(error: OSError) -> str:
    if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
        return "the key is another certificate's"
    return str(error.strerror or error)


def _check(path: Path, pem: bytes) -> None:
    """The server's own certificate, the first of the file. Raises: SecurityFileError."""
    try:
        own, *chain = read_certificates(pem.decode("latin-1"))
    except ValueError as error:
        raise SecurityFileError(f"tls: {path} cannot be used: {error}") from error
    if own.key not in SERVABLE_KEYS:
        raise SecurityFileError(
            f"tls: {path} has a key of the kind {own.key or 'unknown here'}, by which gRPC shakes no hands; "
            f"it takes {', '.join(SERVABLE_KEYS)}"
        )
    now = datetime.datetime.now(datetime.UTC)
    for which, one in enumerate([own, *chain], 1):
        wrong = one.wrong_at(now)
        if wrong:
            raise SecurityFileError(f"tls: {path}, certificate {which} of the file {wrong}")


def _check_authority(path: Path, pem: bytes) -> None:
    """One that is valid is enough: a bundle has old ones, too. Raises: SecurityFileError."""
    try:
        found = read_certificates(pem.decode("latin-1"))
    except ValueError as error:
        raise SecurityFileError(f"tls: {path} cannot be used: {error}") from error
    now = datetime.datetime.now(datetime.UTC)
    wrong = [one.wrong_at(now) for one in found]
    if found and all(wrong):
        raise SecurityFileError(f"tls: {path}: no client could be let in; the authority's certificate {wrong[0]}")


def server_credentials(files: TlsFiles, changed: Callable[[SecurityFileError | None], None]) -> grpc.ServerCredentials:
    """Credentials that follow the files.

    Args: changed: called from a thread of gRPC with None after new files have been taken up, or with why they were not.
    Raises: SecurityFileError when they cannot be used to begin with.
    """
    seen = _stamp(files)
    configuration = files.read()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        try:
            now = files.stamp()
        except OSError:
            return None  # they are being replaced; the next handshake looks again
        if now == seen:
            return None
        seen = now
        try:
            fresh = files.read()
        except SecurityFileError as error:
            changed(error)
            return None
        changed(None)
        return fresh

    # The stubs forget that None means: as before.
    fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", fetch)
    return grpc.dynamic_ssl_server_credentials(configuration, fetcher, files.client_ca is not None)


def _stamp(files: TlsFiles) -> Stamp:
    try:
        return files.stamp()
    except OSError as error:
        raise SecurityFileError(f"tls: {error.filename} cannot be read: {error.strerror}") from error
