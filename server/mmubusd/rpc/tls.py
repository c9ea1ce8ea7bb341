"""TLS of the server: certificate, key and the clients' authority, read again when their files change.

Every handshake looks at the files' times; what stands already goes on. Files that cannot be used (half a copy, a key
of another certificate) are told in the log, and the ones before stay in use.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc

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
        """Raises: SecurityFileError when they cannot be read or do not fit each other."""
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
                f"{error.strerror or error}"
            ) from error
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authority)


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
