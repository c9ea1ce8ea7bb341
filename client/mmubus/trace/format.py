"""The mm-trace format, version 1: what a recording is, read and written.

A recording is a gzip file with one JSON object a line. The first line is the header, every further line one operation,
in the order in which the operations began. `docs/trace-format.md` describes every key.

Reading checks what later code relies on, so that a file that is truncated, of another version or not a recording at all
gives one clear line that names the file and the line, and nothing is replayed.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "FAULTS",
    "FORMAT",
    "VERSION",
    "Header",
    "Notified",
    "Operation",
    "Snapshot",
    "Trace",
    "TraceError",
    "TraceFile",
    "VmaLine",
    "read_trace",
    "write_trace",
]

FORMAT = "mm-trace"
VERSION = 1
FAULTS = frozenset({"read", "write", "execute"})
PAGE_SIZE = 4096
LINE_BYTES_MAX = 64 << 20  # one line; a snapshot of a large process is some 100 KiB

# How many arguments a call may have; `None`: it is not replayed, any number will do.
ARGUMENTS: Mapping[str, tuple[int, ...] | None] = {
    "mmap": (6,),
    "munmap": (2,),
    "mprotect": (3,),
    "mremap": (5,),
    "madvise": (3,),
    "brk": (1,),
    "msync": (3,),
    "mlock": (2,),
    "mlock2": (3,),
    "munlock": (2,),
    "mlockall": (1,),
    "munlockall": (0,),
    "mseal": (3,),
    "setrlimit": (2,),
    "process_madvise": (4, 6),
    "remap_file_pages": (3, 5),
    "read": (2,),
    "write": (2,),
    "execute": (2,),
    "fsync": (1,),
    "ftruncate": (2,),
    "punch": (3,),
    "uffd_register": (4,),
    "uffd_unregister": (3,),
    "uffd_writeprotect": (4,),
    "uffd_move": (5,),
    "mbind": (5,),
    "set_mempolicy": (2,),
    "get_mempolicy": (2,),
    "set_mempolicy_home_node": (4,),
    "migrate_pages": (2,),
    "fork": (0,),
    "reap": (0,),
    "process": (0,),
    "execve": None,
    "exit_group": None,
    "exit": None,
    "unmapped": None,
    "kernel": None,
    "thread": None,
}


class TraceError(Exception):
    """A recording that cannot be read; the message is one line: file, line and what is wrong."""

    def __init__(self, path: str, line: int, message: str) -> None:
        super().__init__(f"{path}:{line}: {message}" if line else f"{path}: {message}")
        self.path = path
        self.line = line


@dataclass(frozen=True, slots=True)
class Notified:
    """A notifier call that the kernel made: invalidate_range, clear_young or test_young of [start, end)."""

    call: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class VmaLine:
    """A mapping after an operation of a random recording; offset and file are None for anonymous memory."""

    start: int
    end: int
    protection: str
    offset: int | None
    file: int | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A mapping of a process when its notifier was attached.

    Attributes:
        file: "device:inode", or None.
        resident: (first page, end page, kind) from the mapping's start; kind f (file or shared), a (anonymous, mapped
            here alone), s (anonymous, shared since a fork).
        flags: what the program has chosen for it, in smaps' letters; empty in recordings that do not tell.
    """

    start: int
    end: int
    protection: str
    offset: int
    file: str | None
    name: str
    resident: tuple[tuple[int, int, str], ...]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """One line of a recording; see docs/trace-format.md for what each op's arguments are.

    Attributes:
        number: its i.
        err, ret: the errno's name or None, and the returned value or None.
        vmas, present: the arena after it; None in program recordings.
        swapped, huge: likewise, where the recording carries them.
        protection: program faults: the page was mapped, the access was not allowed.
        during: program faults: the call that the kernel was in.
        child: program fork: the child's number, or None when it was not seen.
        why, maps: process only: exec or fork, and the mappings.
    """

    number: int
    pid: int
    op: str
    args: tuple[int, ...]
    err: str | None = None
    ret: int | None = None
    notify: tuple[Notified, ...] = ()
    vmas: tuple[VmaLine, ...] | None = None
    present: tuple[tuple[int, int], ...] | None = None
    swapped: tuple[tuple[int, int], ...] | None = None
    huge: tuple[tuple[int, int], ...] | None = None
    protection: bool = False
    during: str | None = None
    child: int | None = None
    why: str = ""
    maps: tuple[Snapshot, ...] = ()


@dataclass(frozen=True, slots=True)
class TraceFile:
    """A file of a random recording: zero-filled, cached: wholly in the cache at the start; else it is a hole."""

    id: int
    kind: str
    pages: int
    cached: bool = True


@dataclass(frozen=True, slots=True)
class Header:
    """The first line. base and pages: the arena of a random recording, bytes and pages; 0 in program recordings.

    maps, brk, locked_limit: random, where calls are recorded that fail: what the recorder had mapped beside the arena,
        where its heap began and ended, and its RLIMIT_MEMLOCK in bytes.
    swap, hugetlb_nr: the machine had a swap file, and so many huge pages in hugetlb's pool; shmem_enabled: which shared
    memory got huge pages, files of tmpfs included.
    """

    source: str
    kernel: str
    thp: bool = False
    base: int = 0
    pages: int = 0
    files: tuple[TraceFile, ...] = ()
    command: tuple[str, ...] = ()
    profile: str = ""
    seed: int | None = None
    recorder: str = "kernel"
    swap: bool = False
    hugetlb_nr: int = 0
    shmem_enabled: str = "never"
    maps: tuple[Snapshot, ...] = ()
    brk: tuple[int, int] | None = None
    locked_limit: int | None = None
    settled: bool = False  # between two operations every batch of pages was emptied

    @property
    def end(self) -> int:
        """The end of the arena in bytes."""
        return self.base + self.pages * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Trace:
    """A recording, read and checked."""

    path: str
    header: Header
    operations: tuple[Operation, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """The file's name without its endings."""
        return Path(self.path).name.removesuffix(".gz").removesuffix(".jsonl")


def read_trace(path: str | Path) -> Trace:
    """Read a recording, gzip or plain.

    Raises: TraceError, when it cannot be read or is not what the format says.
    """
    shown = str(path)
    lines = _lines(shown)
    try:
        number, first = next(lines)
    except StopIteration:
        raise TraceError(shown, 0, "the file is empty") from None
    header = _checked(shown, number, _header, first)
    operations = tuple(_checked(shown, number, _operation, line, header) for number, line in lines)
    return Trace(shown, header, operations)


def write_trace(path: str | Path, header: Mapping[str, Any], operations: Iterable[Mapping[str, Any]]) -> int:
    """Write a recording; the same input gives the same bytes.

    Args: header: the keys beside format and version; operations: without i, which is their place.
    Returns: the number of operations.
    """
    count = 0
    with open(path, "wb") as file, gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as out:
        for line in _numbered(header, operations):
            out.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            count += 1
    return count - 1


def _numbered(header: Mapping[str, Any], operations: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    yield {"format": FORMAT, "version": VERSION, **header}
    for number, operation in enumerate(operations):
        yield {"i": number, **operation}


def _lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1 and the objects of the file."""
    number = 0
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if packed else raw
            while line := stream.readline(LINE_BYTES_MAX):
                number += 1
                if not line.endswith(b"\n"):
                    raise TraceError(path, number, "the file is cut off in the middle of a line")
                yield number, _object(path, number, line)
    except EOFError:
        raise TraceError(path, number + 1, "the file is cut off (the compressed stream has no end)") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(path, number + 1, f"the compressed stream is damaged ({error})") from None
    except OSError as error:
        raise TraceError(path, 0, error.strerror or str(error)) from None


def _object(path: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except UnicodeDecodeError:
        raise TraceError(path, number, "not a recording (not text)") from None
    except (ValueError, RecursionError) as error:
        raise TraceError(path, number, f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise TraceError(path, number, "not a JSON object")
    return found


def _checked(path: str, number: int, make: Any, *args: Any) -> Any:
    """make(*args), with what it finds wrong turned into a TraceError."""
    try:
        return make(*args)
    except KeyError as error:
        raise TraceError(path, number, f"the key {error} is missing") from None
    except (ValueError, TypeError) as error:
        raise TraceError(path, number, str(error)) from None


def _header(found: dict[str, Any]) -> Header:
    if found.get("format") != FORMAT:
        raise ValueError(f"not a recording: its first line does not say format {FORMAT!r}")
    if found.get("version") != VERSION:
        raise ValueError(f"version {found.get('version')!r} of the format is not known; this reads version {VERSION}")
    if found.get("page_size", PAGE_SIZE) != PAGE_SIZE:
        raise ValueError(f"page_size {found['page_size']!r} is not supported; it must be {PAGE_SIZE}")
    source = found["source"]
    if source not in ("random", "program"):
        raise ValueError(f"source {source!r} is neither 'random' nor 'program'")
    arena = source == "random"
    base, pages = (_number(found, "base"), _number(found, "pages")) if arena else (0, 0)
    if arena and (base % PAGE_SIZE or not 0 < pages <= 1 << 24):
        raise ValueError(f"the arena of {pages} pages at {base:#x} is not one")
    files = tuple(_file(file) for file in found.get("files", ()))
    command = tuple(str(word) for word in found.get("command", ()))
    return Header(
        source,
        str(found.get("kernel", "")),
        bool(found.get("thp", False)),
        base,
        pages,
        files,
        command,
        str(found.get("profile", "")),
        found.get("seed"),
        str(found.get("recorder", "kernel")),
        bool(found.get("environment", {}).get("swap", False)),
        int(found.get("environment", {}).get("hugetlb_pool", 0)),
        str(found.get("environment", {}).get("shmem_enabled", "never")),
        tuple(_snapshot(entry) for entry in found.get("maps", ())),
        _heap(found["brk"]) if "brk" in found else None,
        _number(found, "locked_limit") if "locked_limit" in found else None,
        bool(found.get("environment", {}).get("settled", False)),
    )


def _heap(values: Any) -> tuple[int, int]:
    start, end = _numbers(values, "brk")
    return start, end


def _file(found: dict[str, Any]) -> TraceFile:
    if found["kind"] not in ("disk", "shm", "hugetlb"):
        raise ValueError(f"a file's kind is {found['kind']!r}; it must be 'disk', 'shm' or 'hugetlb'")
    cached = bool(found.get("cached", found["kind"] != "hugetlb"))
    return TraceFile(_number(found, "id"), found["kind"], _number(found, "pages"), cached)


def _operation(found: dict[str, Any], header: Header) -> Operation:
    op = found["op"]
    if op not in ARGUMENTS:
        raise ValueError(f"the op {op!r} is not known")
    args = tuple(_numbers(found["args"], "args"))
    if (allowed := ARGUMENTS[op]) is not None and len(args) not in allowed:
        raise ValueError(f"{op} has {len(args)} arguments; it must have {' or '.join(map(str, allowed))}")
    random = header.source == "random"
    child = found.get("child")
    return Operation(
        _number(found, "i"),
        _number(found, "pid"),
        op,
        args,
        _text(found.get("err"), "err"),
        None if found.get("ret") is None else _number(found, "ret"),
        tuple(_notified(entry) for entry in found.get("notify", ())),
        tuple(_vma(entry) for entry in found["vmas"]) if random else None,
        _pairs(found, "present") if random else None,
        _pairs(found, "swapped") if random and "swapped" in found else None,
        _pairs(found, "huge") if random and "huge" in found else None,
        bool(found.get("protection", False)),
        _text(found.get("during"), "during"),
        None if child is None else _number(found, "child"),
        str(found.get("why", "")),
        tuple(_snapshot(entry) for entry in found["maps"]) if op == "process" else (),
    )


def _number(found: dict[str, Any], key: str) -> int:
    value = found[key]
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{key} is {value!r}; it must be a number of 64 bits")
    return value


def _numbers(values: Any, key: str) -> list[int]:
    if not isinstance(values, list):
        raise ValueError(f"{key} is not a list")
    for value in values:
        if type(value) is not int or not 0 <= value < 1 << 64:
            raise ValueError(f"{key} holds {value!r}; it must be a number of 64 bits")
    return values


def _text(value: Any, key: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}; it must be a text or null")
    return value


def _notified(entry: Any) -> Notified:
    call, start, end = entry
    if call not in ("invalidate_range", "clear_young", "test_young"):
        raise ValueError(f"notify holds the call {call!r}, which is not known")
    _numbers([start, end], "notify")
    return Notified(call, start, end)


def _vma(entry: Any) -> VmaLine:
    start, end, protection, offset, file = entry
    _numbers([start, end], "vmas")
    return VmaLine(start, end, str(protection), offset, file)


def _pairs(found: dict[str, Any], key: str) -> tuple[tuple[int, int], ...]:
    pairs = [_numbers(list(entry), key) for entry in found[key]]
    return tuple((first, end) for first, end in pairs)


def _snapshot(entry: Any) -> Snapshot:
    start, end, protection, offset, file, name, resident, *more = entry
    _numbers([start, end], "maps")
    if start % PAGE_SIZE or end % PAGE_SIZE or start >= end:
        raise ValueError(f"maps holds the mapping {start:#x}-{end:#x}, which is not one")
    runs = []
    for first, last, kind in resident:
        if kind not in ("f", "a", "s") or not 0 <= first < last <= (end - start) // PAGE_SIZE:
            raise ValueError(f"maps holds the resident pages {[first, last, kind]!r} of {start:#x}-{end:#x}")
        runs.append((first, last, kind))
    flags = tuple(str(flag) for flag in more[0]) if more else ()
    return Snapshot(start, end, str(protection), offset or 0, _text(file, "file"), str(name), tuple(runs), flags)
