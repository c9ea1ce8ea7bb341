"""Directories that are not as they were written: the end that a crash tears is cut, everything else is refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from mmubusd.notify import Hello, Op, Spec
from mmubusd.state import Directory, Entry, Keeper, RecordedCore, StateError, compact, open_state
from mmubusd.state.framing import pack, unpack
from mmubusd.state.keeper import made_by
from state.simdisk import Image, SimDisk, Step
from state.workload import AT, FRAMES, PAGE, make_core, store

PARAMETERS = {"frames_nr": FRAMES}
JOURNAL, CHECKPOINT = "journal-00000000", "checkpoint-00000000"


def begin(disk: SimDisk, **parameters: object) -> tuple[Keeper, RecordedCore, bool]:
    return open_state(disk, PARAMETERS | parameters, make_core, store)


def kept(count: int = 3) -> Image:
    """A disk with an address space a commit."""
    disk = SimDisk()
    keeper, core, _ = begin(disk)
    for number in range(count):
        entries: list[Entry] = []
        core.note = entries.append
        core.create_mm(f"program {number}")
        keeper.append(entries)
    return disk.killed()


def names(core: RecordedCore) -> list[str]:
    return [mm.name for mm in core.memory.mms.values()]


def test_what_was_kept_is_there_and_goes_on() -> None:
    disk = SimDisk(kept())
    keeper, core, new = begin(disk)
    assert not new
    assert names(core) == ["program 0", "program 1", "program 2"]
    entries: list[Entry] = []
    core.note = entries.append
    assert core.create_mm("program 3").id == 4
    keeper.append(entries)
    assert names(begin(SimDisk(disk.killed()))[1])[-1] == "program 3"


@pytest.mark.parametrize("left", range(1, 60, 7))
def test_a_torn_end_is_cut(left: int) -> None:
    image = kept()
    image[JOURNAL] = image[JOURNAL][:-left]
    disk = SimDisk(image)
    _, core, _ = begin(disk)
    assert names(core) == ["program 0", "program 1"]
    assert [step.kind for step in disk.log] == ["cut", "sync"]


@pytest.mark.parametrize("name", [JOURNAL, CHECKPOINT])
def test_damage_in_the_middle_is_refused_and_nothing_is_changed(name: str) -> None:
    image = kept()
    whole = image[name]
    for at in range(0, len(whole) - 200, max(1, len(whole) // 23)):
        disk = SimDisk(image | {name: whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]})
        with pytest.raises(StateError, match=f"{name} is damaged at byte"):
            begin(disk)
        assert disk.log == []


def test_a_checkpoint_that_is_cut_short_is_refused() -> None:
    image = kept()
    image[CHECKPOINT] = image[CHECKPOINT][:-30]
    with pytest.raises(StateError, match="checkpoint-00000000 is damaged at byte"):
        begin(SimDisk(image))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "is of format 99, and this server's is 1"),
        ({"made_by": "x"}, "by another version of the server"),
    ],
)
def test_another_version_is_refused(change: dict[str, object], said: str) -> None:
    image = kept()
    header = json.loads(unpack(JOURNAL, image[JOURNAL], b"mmuJ", 0).payloads[0])
    assert header["made_by"] == made_by()
    rest = image[JOURNAL][len(pack(b"mmuJ", 0, json.dumps(header).encode())) :]
    image[JOURNAL] = pack(b"mmuJ", 0, json.dumps(header | change).encode()) + rest
    with pytest.raises(StateError, match=said):
        begin(SimDisk(image))


def test_another_machine_is_refused() -> None:
    with pytest.raises(StateError, match="of a machine with swap_slots_nr = None; the configuration says 7"):
        begin(SimDisk(kept()), swap_slots_nr=7)


@pytest.mark.parametrize("name", [JOURNAL, CHECKPOINT])
def test_a_file_that_is_missing_is_refused(name: str) -> None:
    image = kept()
    del image[name]
    with pytest.raises(StateError, match=r"is missing|no checkpoint"):
        begin(SimDisk(image))


def test_what_is_no_state_is_not_taken_for_one() -> None:
    """Only classes of the rooms below are made of bytes: a state that somebody else has written runs nothing."""
    image = kept()
    evil = b"cos\nsystem\n(S'true'\ntR."
    image[JOURNAL] += pack(b"mmuJ", 4, evil)
    with pytest.raises(StateError, match=r"journal-00000000, record 4: it names os\.system"):
        begin(SimDisk(image))


def test_a_full_disk_keeps_nothing_of_a_commit_and_the_same_can_be_tried_again() -> None:
    disk = SimDisk(kept())
    keeper, core, _ = begin(disk)
    entries: list[Entry] = []
    core.note = entries.append
    core.create_mm("late")

    def full(step: Step) -> None:
        if step.kind == "write":
            disk.play(Step("write", step.name, step.data[:9]))
            raise OSError(errno.ENOSPC, "no room")

    disk.fails = full
    with pytest.raises(OSError, match="no room"):
        keeper.append(entries)
    assert names(begin(SimDisk(disk.killed()))[1])[-1] == "program 2"
    disk.fails = lambda step: None
    keeper.append(entries)
    assert names(begin(SimDisk(disk.killed()))[1])[-1] == "late"


def test_a_checkpoint_takes_the_place_of_what_was_before() -> None:
    disk = SimDisk()
    keeper, core, _ = begin(disk)
    entries: list[Entry] = []
    core.note = entries.append
    mm = core.create_mm("program").id
    core.call(mm, "mmap", (AT, 4 * PAGE, 3, 0x32, 0, 0), 1.0)
    core.call(mm, "store", (AT,), 1.0, data=b"kept")
    keeper.append(entries)
    keeper.begin_segment()
    compact(disk, 1, store)
    keeper.install(1)
    assert disk.names() == ["checkpoint-00000001", "journal-00000001"]
    _, again, _ = begin(SimDisk(disk.killed()))
    again.call(mm, "load", (AT, 4), 2.0)
    assert again.finished[-1].result == b"kept"


def test_a_directory_is_one_servers(tmp_path: Path) -> None:
    first = Directory(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    with pytest.raises(StateError, match="is in use: process"):
        Directory(tmp_path / "state")
    first.close()
    Directory(tmp_path / "state").close()


def test_what_a_device_wrote_is_kept_from_when_the_server_has_looked() -> None:
    """Through shared memory, with no input that tells."""
    disk = SimDisk()
    keeper, core, _ = begin(disk)
    entries: list[Entry] = []
    core.note = entries.append
    mm = core.create_mm("program").id
    core.call(mm, "mmap", (AT, 4 * PAGE, 3, 0x32, 0, 0), 1.0)
    core.call(mm, "store", (AT,), 1.0, data=b"program")
    session = core.open_session(Hello("device", window=True), 1.0, "token")
    registration = core.register(session, Spec(mm, frozenset({Op.INVALIDATE_RANGE})), 1.0)
    granted = core.fault(session, registration.id, AT, AT + PAGE, True, 1.0).value().translations
    assert granted is not None
    pfn = int(granted.pfns[0])
    core.frames.data[pfn, :6] = list(b"device")
    core.call(mm, "load", (AT, 7), 1.0)
    assert core.finished[-1].result == b"devicem"
    core.frames.data[pfn, :6] = list(b"unseen")
    keeper.append(entries)
    assert [len(entry[3]) for entry in entries] == [0] * 6 + [1]
    _, again, _ = begin(SimDisk(disk.killed()))
    again.call(mm, "load", (AT, 7), 2.0)
    assert again.finished[-1].result == b"devicem"
