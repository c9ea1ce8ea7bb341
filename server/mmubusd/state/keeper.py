"""The keeper of a directory of state: a checkpoint, and the journal of what has happened since, in segments.

    checkpoint-7          the core as it was when segment 7 began
    journal-7             every input since, a record a group commit, until a quiet moment
    journal-8             every input since that moment: the one that is written to
    checkpoint-8.tmp      another process plays segment 7 on checkpoint 7; then it takes the place of both

A segment ends when it is long enough and no operation is under way, so that what follows can begin with a checkpoint.
Nothing waits for that checkpoint: without it, the next start plays two segments instead of one.

Recovery is the newest checkpoint with all segments from it on, played in order. The end of the last one may be torn by
a crash, and is cut: whoever waited for that record has not been answered. Anything else that is not as it was written
is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import mmubusd
from mmubusd.state.disk import Disk, File
from mmubusd.state.errors import StateError
from mmubusd.state.framing import Records, pack, unpack
from mmubusd.state.freeze import dumps, freeze, loads, thaw
from mmubusd.state.inputs import Entry, RecordedCore, apply

__all__ = ["FORMAT", "Keeper", "compact", "made_by", "open_state"]

FORMAT = 1
JOURNAL, CHECKPOINT, UNFINISHED = "journal-", "checkpoint-", ".tmp"
JOURNAL_MAGIC, CHECKPOINT_MAGIC = b"mmuJ", b"mmuC"
END = b"end"
ROOMS = ("mm", "notify", "state")

Parameters = Mapping[str, Any]
"""What a machine is made of, and cannot be changed afterwards; plain values by name."""
Make = Callable[[], RecordedCore]
Store = Callable[[int], memoryview]
"""Zero-filled bytes for so many frames."""


@cache
def made_by() -> str:
    """The version of what plays inputs: another one could make another state of them."""
    digest = hashlib.sha256()
    root = Path(mmubusd.__file__).parent
    for path in sorted(path for room in ROOMS for path in (root / room).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _name(kind: str, segment: int) -> str:
    return f"{kind}{segment:08}"


def _segments(names: Iterable[str], kind: str) -> list[int]:
    """The numbers of those that are there, in order."""
    numbers = [name.removeprefix(kind) for name in names if name.startswith(kind)]
    return sorted(int(number) for number in numbers if number.isdecimal())


class Keeper:
    """Writes the journal.

    Attributes: segment: the number of the one that is written to; size: its bytes.
    """

    def __init__(self, disk: Disk, segment: int, number: int, size: int, file: File) -> None:
        """Args: number: of the next record."""
        self._disk = disk
        self._number = number
        self._file = file
        self.segment = segment
        self.size = size

    def append(self, entries: list[Entry]) -> None:
        """One group commit: all of them are kept when it returns, or none.

        Raises: OSError; when it is for want of room (ENOSPC, EDQUOT), the same may be tried again.
        """
        record = pack(JOURNAL_MAGIC, self._number, dumps(entries))
        try:
            self._file.write(record)
        except OSError:
            self._file.cut(self.size)
            raise
        self._file.sync()
        self._number += 1
        self.size += len(record)

    def begin_segment(self) -> None:
        """What follows goes into another segment. Requires: the last entry appended is a SEAL, and the core is quiet.

        Raises: OSError; then it goes on in this one.
        """
        segment = self.segment + 1
        file, size = _begin_journal(self._disk, segment, self._number)
        self._file.close()
        self._file, self.size, self.segment = file, size, segment
        self._number += 1

    def install(self, segment: int) -> None:
        """The checkpoint of a segment is finished: it takes the place of everything before it. Raises: OSError."""
        name = _name(CHECKPOINT, segment)
        self._disk.rename(name + UNFINISHED, name)
        self._disk.sync()
        _clear(self._disk, segment)

    @property
    def number(self) -> int:
        """Of the next record."""
        return self._number

    def close(self) -> None:
        self._file.close()


def open_state(disk: Disk, parameters: Parameters, make: Make, store: Store) -> tuple[Keeper, RecordedCore, bool]:
    """Recover what a directory holds, or begin in an empty one.

    Args: parameters: what the machine must be made of; make: makes one; store: where its bytes go otherwise.
    Returns: the keeper; the core, as it was when the last commit ended; whether it is new.
    Raises: StateError: it is damaged, or not for this version or these parameters. OSError.
    """
    names = disk.names()
    for name in names:
        if name.endswith(UNFINISHED):
            disk.remove(name)
    checkpoints = _segments(names, CHECKPOINT)
    if not checkpoints:
        _check_unbegun(disk, _segments(names, JOURNAL))
        return _begin(disk, parameters, make)
    segment = checkpoints[-1]
    core, number = _read_checkpoint(disk, segment, parameters, store)
    _clear(disk, segment)
    keeper = _play(disk, core, segment, number)
    core.frames.go_live()
    return keeper, core, False


def _begin(disk: Disk, parameters: Parameters, make: Make) -> tuple[Keeper, RecordedCore, bool]:
    """The journal first: a checkpoint is there only when the journal that follows it is."""
    core = make()
    file, size = _begin_journal(disk, 0, 0)
    _write_checkpoint(disk, 0, core, parameters, 0)
    keeper = Keeper(disk, 0, 1, size, file)
    keeper.install(0)
    return keeper, core, True


def _check_unbegun(disk: Disk, journals: list[int]) -> None:
    """Without a checkpoint there may be a journal of which nothing has been kept yet. Raises: StateError."""
    if journals in ([], [0]):
        name = _name(JOURNAL, 0)
        if not journals or len(unpack(name, disk.read(name), JOURNAL_MAGIC, 0).payloads) < 2:
            return
    raise StateError(f"there is {_name(JOURNAL, journals[-1])}, but no checkpoint that it began with")


def _clear(disk: Disk, segment: int) -> None:
    """Everything before this segment has been taken over by its checkpoint."""
    for kind in (CHECKPOINT, JOURNAL):
        for old in _segments(disk.names(), kind):
            if old < segment:
                disk.remove(_name(kind, old))


# The journal.


def _header(segment: int, **more: object) -> bytes:
    return json.dumps({"format": FORMAT, "made_by": made_by(), "segment": segment, **more}).encode()


def _begin_journal(disk: Disk, segment: int, number: int) -> tuple[File, int]:
    file = disk.create(_name(JOURNAL, segment))
    header = pack(JOURNAL_MAGIC, number, _header(segment))
    try:
        file.write(header)
        file.sync()
        disk.sync()
    except OSError:
        file.close()
        disk.remove(_name(JOURNAL, segment))
        raise
    return file, len(header)


def _read_journal(disk: Disk, segment: int, number: int) -> Records:
    name = _name(JOURNAL, segment)
    records = unpack(name, disk.read(name), JOURNAL_MAGIC, number)
    if records.payloads:
        _check_header(name, records.payloads[0])
    return records


def _check_header(name: str, payload: bytes) -> dict[str, Any]:
    """Raises: StateError when it is another version's."""
    try:
        header: dict[str, Any] = json.loads(payload)
        version, author = header["format"], header["made_by"]
    except (ValueError, TypeError, KeyError):
        raise StateError(f"{name} does not begin with a header") from None
    if version != FORMAT:
        raise StateError(f"{name} is of format {version}, and this server's is {FORMAT}")
    if author != made_by():
        raise StateError(
            f"{name} was written by another version of the server (core {author}; this one is {made_by()}), and "
            "another state would be made of it here: start that version, or begin with an empty directory"
        )
    return header


def _play(disk: Disk, core: RecordedCore, segment: int, number: int, until: int | None = None) -> Keeper:
    """Play the segments from one on, all of them or until one; cut the end that a crash has torn.

    Returns: a keeper that goes on in the last one. With until: of no use but for its number.
    """
    last = _segments(disk.names(), JOURNAL)[-1:] if until is None else [until - 1]
    if not last or last[0] < segment:
        raise StateError(f"{_name(JOURNAL, segment)} is missing")
    for at in range(segment, last[0] + 1):
        if _name(JOURNAL, at) not in disk.names():
            raise StateError(f"{_name(JOURNAL, at)} is missing")
        records = _read_journal(disk, at, number)
        if records.torn and (at < last[0] or until is not None):
            raise StateError(
                f"{_name(JOURNAL, at)} is damaged at byte {records.end}: it was finished, and is not whole"
            )
        for offset, payload in enumerate(records.payloads[1:], 1):
            _play_record(core, payload, f"{_name(JOURNAL, at)}, record {number + offset}")
        number += len(records.payloads)
    name = _name(JOURNAL, last[0])
    if not records.payloads:  # its first write is what the crash has torn
        file, size = _begin_journal(disk, last[0], number)
        return Keeper(disk, last[0], number + 1, size, file)
    file = disk.open(name)
    if records.torn:
        file.cut(records.end)
        file.sync()
    return Keeper(disk, last[0], number, records.end, file)


def _play_record(core: RecordedCore, payload: bytes, where: str) -> None:
    try:
        for entry in loads(payload):
            apply(core, entry)
    except StateError as error:
        raise StateError(f"{where}: {error}") from error
    except Exception as error:
        raise StateError(f"{where} cannot be played again: {type(error).__name__}: {error}") from error


# Checkpoints.


def _write_checkpoint(disk: Disk, segment: int, core: RecordedCore, parameters: Parameters, number: int) -> None:
    """Write it under another name. Args: number: of the record that begins the segment. Raises: OSError, StateError."""
    file = disk.create(_name(CHECKPOINT, segment) + UNFINISHED)
    try:
        header = _header(segment, number=number, parameters=dict(parameters))
        for at, payload in enumerate((header, *freeze(core), END)):
            file.write(pack(CHECKPOINT_MAGIC, at, payload))
        file.sync()
    finally:
        file.close()


def _read_checkpoint(disk: Disk, segment: int, parameters: Parameters | None, store: Store) -> tuple[RecordedCore, int]:
    """Returns: the core, and the number of the record that begins the segment. Raises: StateError."""
    name = _name(CHECKPOINT, segment)
    records = unpack(name, disk.read(name), CHECKPOINT_MAGIC, 0)
    if not records.payloads:
        raise StateError(f"{name} is no checkpoint")
    header = _check_header(name, records.payloads[0])
    if records.torn or records.payloads[-1] != END:
        raise StateError(f"{name} is damaged at byte {records.end}: it was finished, and is not whole")
    was = header["parameters"]
    for key, value in (parameters or {}).items():
        if was.get(key) != value:
            raise StateError(f"{name} is of a machine with {key} = {was.get(key)}; the configuration says {value}")
    try:
        return thaw(records.payloads[1:-1], store(was["frames_nr"])), header["number"]
    except StateError as error:
        raise StateError(f"{name}: {error}") from error


def compact(disk: Disk, segment: int, store: Store) -> None:
    """Make the checkpoint that a segment begins with, of the one before and what has happened since; `Keeper.install`
    puts it in place. Raises: StateError, OSError."""
    before = [at for at in _segments(disk.names(), CHECKPOINT) if at < segment]
    if not before:
        raise StateError(f"there is no checkpoint before {segment}")
    name = _name(CHECKPOINT, before[-1])
    parameters = _check_header(name, unpack(name, disk.read(name), CHECKPOINT_MAGIC, 0).payloads[0])["parameters"]
    core, number = _read_checkpoint(disk, before[-1], None, store)
    keeper = _play(disk, core, before[-1], number, segment)
    _write_checkpoint(disk, segment, core, parameters, keeper.number)
    keeper.close()
