"""Address spaces that begin in the middle of a program's life: the mappings of a CreateRequest.

Checked as a whole before anything is made; a snapshot that a kernel could not have shown is refused.
"""

from __future__ import annotations

import re

from mmu.v1 import address_space_pb2 as pb
from mmu.v1 import types_pb2

from mmubusd.mm.addr import PAGE_SIZE, TASK_SIZE, FileId
from mmubusd.mm.errno import MmError
from mmubusd.mm.memory import Memory
from mmubusd.mm.mm import Mapping

__all__ = ["check_initial", "initial_mappings"]

PROTECTION = re.compile(r"[r-][w-][x-][ps]")
KINDS = "fas"
"""Resident pages' kinds by the contract's number: of the file, anonymous, anonymous shared with another process."""


def check_initial(memory: Memory, request: pb.CreateRequest, memcg: str = "") -> None:
    """Check every mapping of a CreateRequest.

    Args: memcg: the group that is to pay for its memory.
    Raises: MmError EINVAL, EEXIST (overlap), EBADF (no such file), ENOMEM (more resident pages than frames are free).
    """
    before = 0
    resident = 0
    for initial in sorted(request.initial, key=lambda each: each.mapping.start):
        mapping = initial.mapping
        where = f"mapping {mapping.start:#x}-{mapping.end:#x}"
        _check_mapping(mapping, where)
        if mapping.start < before:
            raise MmError("EEXIST", f"{where} overlaps the one before it, which ends at {before:#x}")
        before = mapping.end
        if mapping.file:
            memory.file(FileId(mapping.file))
        resident += _check_resident(initial, where)
    if request.brk > TASK_SIZE:
        raise MmError("EINVAL", f"brk {request.brk:#x} is beyond the end of user addresses, {TASK_SIZE:#x}")
    room = memory.room(memory.memcg(memcg))
    if resident > room:
        raise MmError("ENOMEM", f"{resident} resident pages, but only {room} frames are to be had")


def _check_mapping(mapping: types_pb2.Mapping, where: str) -> None:
    if mapping.start % PAGE_SIZE or mapping.end % PAGE_SIZE or mapping.offset % PAGE_SIZE:
        raise MmError("EINVAL", f"{where}: start, end and offset are multiples of {PAGE_SIZE}")
    if not mapping.start < mapping.end <= TASK_SIZE:
        raise MmError("EINVAL", f"{where}: it is empty, backwards or beyond {TASK_SIZE:#x}")
    if not PROTECTION.fullmatch(mapping.protection):
        raise MmError("EINVAL", f"{where}: protection {mapping.protection!r} is not of the form rwxp (or - and s)")
    if mapping.offset + (mapping.end - mapping.start) >= 1 << 63:
        raise MmError("EOVERFLOW", f"{where}: offset {mapping.offset:#x} ends beyond the largest file")


def _check_resident(initial: pb.InitialMapping, where: str) -> int:
    if len(initial.resident) % 3:
        raise MmError("EINVAL", f"{where}: resident is a list of triples, not {len(initial.resident)} numbers")
    pages = (initial.mapping.end - initial.mapping.start) // PAGE_SIZE
    at = 0
    for first, end, kind in _triples(initial):
        if not at <= first < end <= pages:
            raise MmError(
                "EINVAL", f"{where}: resident pages {first}-{end} are out of order or beyond its {pages} pages"
            )
        if kind >= len(KINDS):
            raise MmError("EINVAL", f"{where}: kind {kind} is not one of 0 (file), 1 (anonymous), 2 (shared anonymous)")
        at = end
    return sum(end - first for first, end, _ in _triples(initial))


def _triples(initial: pb.InitialMapping) -> list[tuple[int, int, int]]:
    numbers = list(initial.resident)
    return list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def initial_mappings(request: pb.CreateRequest) -> tuple[list[tuple[Mapping, list[tuple[int, int, str]]]], int]:
    """The mappings of a request that has been checked, each with its resident pages, and its brk."""
    mappings = []
    for initial in request.initial:
        mapping = initial.mapping
        mappings.append(
            (
                Mapping(
                    start=mapping.start,
                    end=mapping.end,
                    prot=mapping.protection,
                    offset=mapping.offset,
                    file=FileId(mapping.file) if mapping.file else None,
                    name=mapping.name,
                    flags=tuple(mapping.flags),
                ),
                [(first, end, KINDS[kind]) for first, end, kind in _triples(initial)],
            )
        )
    return mappings, request.brk
