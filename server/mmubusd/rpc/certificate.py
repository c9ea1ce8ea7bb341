"""What must be known of a certificate before a server stands behind it: its kind of key, and when it is valid.

gRPC takes any certificate that its TLS library can parse, starts, and then fails each handshake without a word. So what
it can serve is asked here first. Of X.509 (RFC 5280) only the way to three fields is walked:

    Certificate ::= SEQUENCE { tbsCertificate ::= SEQUENCE {
        [0] version, serialNumber, signature, issuer,
        validity ::= SEQUENCE { notBefore, notAfter }, subject,
        subjectPublicKeyInfo ::= SEQUENCE { algorithm ::= SEQUENCE { OID, parameters }, … } … } … }
"""

from __future__ import annotations

import datetime
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["SERVABLE_KEYS", "Certificate", "read_certificates"]

PEM = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
INTEGER, OID, UTC_TIME, VERSION = 0x02, 0x06, 0x17, 0xA0
RSA = bytes.fromhex("2a864886f70d010101")
EC = bytes.fromhex("2a8648ce3d0201")
NAMES = {
    RSA: "RSA",
    bytes.fromhex("2b6570"): "Ed25519",
    bytes.fromhex("2b6571"): "Ed448",
    bytes.fromhex("2a8648ce3d030107"): "P-256",
    bytes.fromhex("2b81040022"): "P-384",
    bytes.fromhex("2b81040023"): "P-521",
}
"""Kinds of keys: algorithms, and the curves of EC keys."""
SERVABLE_KEYS = ("RSA", "P-256", "P-384")
"""What gRPC's TLS signs handshakes with."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """One certificate.

    Attributes: key: the kind of its public key, "" for one that is not known here; not_before, not_after: its time.
    """

    key: str
    not_before: datetime.datetime
    not_after: datetime.datetime

    def wrong_at(self, now: datetime.datetime) -> str:
        """Why it is not valid then; "" when it is."""
        if now < self.not_before:
            return f"is valid from {self.not_before:%Y-%m-%d %H:%M:%S} UTC on only"
        if now > self.not_after:
            return f"has expired on {self.not_after:%Y-%m-%d %H:%M:%S} UTC"
        return ""


def read_certificates(pem: str) -> tuple[Certificate, ...]:
    """Every certificate of a PEM file, in order. Raises: ValueError when one of them is damaged."""
    try:
        return tuple(_certificate(ssl.PEM_cert_to_DER_cert(match[0])) for match in PEM.finditer(pem))
    except (IndexError, StopIteration) as error:
        raise ValueError("a certificate ends too early") from error


def _certificate(der: bytes) -> Certificate:
    ((_, whole),) = _elements(der)
    (_, signed), *_ = _elements(whole)
    fields = [content for tag, content in _elements(signed) if tag != VERSION]
    _serial, _signature, _issuer, validity, _subject, key_info = fields[:6]
    before, after = (_time(tag, content) for tag, content in _elements(validity))
    (_, algorithm), *_ = _elements(key_info)
    (_, kind), *parameters = _elements(algorithm)
    if kind == EC and parameters and parameters[0][0] == OID:
        kind = parameters[0][1]
    return Certificate(NAMES.get(kind, ""), before, after)


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The elements of a DER sequence: tag and content. Raises: IndexError, ValueError when it is none."""
    at = 0
    while at < len(data):
        tag, length = data[at], data[at + 1]
        at += 2
        if length & 0x80:
            octets = length & 0x7F
            length = int.from_bytes(data[at : at + octets], "big")
            at += octets
        if at + length > len(data):
            raise ValueError("a certificate ends too early")
        yield tag, data[at : at + length]
        at += length


def _time(tag: int, content: bytes) -> datetime.datetime:
    """RFC 5280, 4.1.2.5: two digits of a year up to 2049, then four."""
    text = content.decode("ascii")
    if tag == UTC_TIME:
        text = ("20" if text[:2] < "50" else "19") + text
    return datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=datetime.UTC)
