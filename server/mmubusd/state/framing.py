"""Records in a file: each with its number, its length and a checksum, so that a torn end is known from damage.

    magic | number | length | CRC-32 of all the rest | payload

A crash leaves at most the last write unfinished. So a bad record with nothing good behind it is a torn end, and is cut;
one with a good record behind it, or in a file that was finished, is damage, and nothing is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from zlib import crc32

from mmubusd.state.errors import StateError

__all__ = ["Records", "pack", "unpack"]

HEADER = Struct("<4sQII")
NUMBERED = Struct("<QI")


@dataclass(frozen=True, slots=True)
class Records:
    """What a file holds. payloads: of its records, in order; end: where the last good one ends, in bytes; torn: there
    is more, and it is no record."""

    payloads: list[bytes]
    end: int
    torn: bool


def pack(magic: bytes, number: int, payload: bytes) -> bytes:
    """One record. Args: magic: four bytes."""
    check = crc32(payload, crc32(NUMBERED.pack(number, len(payload))))
    return HEADER.pack(magic, number, len(payload), check) + payload


def unpack(name: str, data: bytes, magic: bytes, first: int) -> Records:
    """All records of a file.

    Args: name: the file's, for messages; first: the number of its first record; the others follow it one by one.
    Raises: StateError when something is damaged and it is not the end.
    """
    payloads: list[bytes] = []
    at = 0
    while at < len(data):
        record = _record(data, at, magic)
        if record is None or record[0] != first + len(payloads):
            after = _next_good(data, at + 1, magic)
            if record is not None or after >= 0:
                where = f"and a good one follows at byte {after}" if record is None else "its number is out of order"
                raise StateError(f"{name} is damaged at byte {at}: there is no record {first + len(payloads)}, {where}")
            return Records(payloads, at, True)
        payloads.append(record[1])
        at += HEADER.size + len(record[1])
    return Records(payloads, at, False)


def _record(data: bytes, at: int, magic: bytes) -> tuple[int, bytes] | None:
    """The record that begins there: its number and payload. None: none does."""
    if len(data) - at < HEADER.size:
        return None
    mark, number, length, check = HEADER.unpack_from(data, at)
    begin = at + HEADER.size
    if mark != magic or length > len(data) - begin:
        return None
    payload = data[begin : begin + length]
    return (number, payload) if crc32(payload, crc32(NUMBERED.pack(number, length))) == check else None


def _next_good(data: bytes, at: int, magic: bytes) -> int:
    """Where the next good record begins; -1: nowhere."""
    while (at := data.find(magic, at)) >= 0:
        if _record(data, at, magic) is not None:
            return at
        at += 1
    return -1
