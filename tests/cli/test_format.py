"""Recordings that cannot be read: one clear line with file and line, status 2."""

import gzip
import json
from pathlib import Path

import pytest
from mmubus.cli import main
from mmubus.trace.format import Notified, TraceError, VmaLine, read_trace, write_trace

HEADER = {
    "format": "mm-trace",
    "version": 1,
    "source": "random",
    "kernel": "6.18",
    "page_size": 4096,
    "base": 0x200000000000,
    "pages": 16,
}
OPERATION = {
    "i": 0,
    "pid": 1,
    "op": "munmap",
    "args": [0x200000000000, 4096],
    "err": None,
    "ret": 0,
    "notify": [],
    "vmas": [],
    "present": [],
}


def lines(*objects: object) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in objects)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content))
    return path


def test_what_is_written_is_read_again(tmp_path: Path):
    notify = ["invalidate_range", 0x200000000000, 0x200000001000]
    more = {"notify": [notify], "vmas": [[0x200000001000, 0x200000002000, "rw-p", None, None]], "present": [[1, 2]]}
    operation = {key: value for key, value in (OPERATION | more).items() if key != "i"}
    header = {key: value for key, value in HEADER.items() if key not in ("format", "version")}
    assert write_trace(tmp_path / "a.jsonl.gz", header, [operation]) == 1
    trace = read_trace(tmp_path / "a.jsonl.gz")
    assert trace.name == "a"
    assert (trace.header.base, trace.header.end) == (0x200000000000, 0x200000010000)
    (read,) = trace.operations
    assert read.notify == (Notified("invalidate_range", 0x200000000000, 0x200000001000),)
    assert read.vmas == (VmaLine(0x200000001000, 0x200000002000, "rw-p", None, None),)
    assert read.present == ((1, 2),)


def test_the_same_recording_gives_the_same_bytes(tmp_path: Path):
    header = {key: value for key, value in HEADER.items() if key not in ("format", "version")}
    for name in ("a", "b"):
        write_trace(tmp_path / name, header, [{key: value for key, value in OPERATION.items() if key != "i"}])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_plain_text_is_read_too(tmp_path: Path):
    path = tmp_path / "plain.jsonl"
    path.write_bytes(lines(HEADER, OPERATION))
    assert len(read_trace(path).operations) == 1


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"", 0, "empty"),
        (b"hello\n", 1, "not JSON"),
        (b"\xff\xfe\n", 1, "not"),
        (b"[1]\n", 1, "not a JSON object"),
        (lines({"format": "something"}), 1, "not a recording"),
        (lines(HEADER | {"version": 2}), 1, "version 2"),
        (lines(HEADER | {"page_size": 16384}), 1, "page_size"),
        (lines(HEADER | {"source": "dream"}), 1, "dream"),
        (lines(HEADER | {"base": 5}), 1, "arena"),
        (lines({key: value for key, value in HEADER.items() if key != "pages"}), 1, "'pages' is missing"),
        (lines(HEADER | {"files": [{"id": 0, "kind": "tape", "pages": 1}]}), 1, "tape"),
        (lines(HEADER, OPERATION)[:-5], 2, "cut off"),
        (lines(HEADER, OPERATION) + b"{\n", 3, "not JSON"),
        (lines(HEADER, OPERATION | {"op": "dance"}), 2, "'dance' is not known"),
        (lines(HEADER, OPERATION | {"args": [1]}), 2, "munmap has 1 arguments; it must have 2"),
        (lines(HEADER, OPERATION | {"args": [-1, 2]}), 2, "-1"),
        (lines(HEADER, OPERATION | {"args": "xx"}), 2, "not a list"),
        (lines(HEADER, OPERATION | {"notify": [["shout", 0, 1]]}), 2, "shout"),
        (lines(HEADER, OPERATION | {"notify": [1]}), 2, ""),
        (lines(HEADER, OPERATION | {"i": "x"}), 2, "i is 'x'"),
        (lines(HEADER, {key: value for key, value in OPERATION.items() if key != "vmas"}), 2, "'vmas' is missing"),
        (b'{"format":"mm-trace",' + b'"a":[' * 100_000 + b"\n", 1, "not JSON"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: bytes, line: int, says: str):
    path = write(tmp_path / "bad.jsonl.gz", content)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert caught.value.line == line
    assert says in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_truncated_gzip_stream(tmp_path: Path):
    whole = gzip.compress(
        lines(HEADER, *[OPERATION | {"i": number, "args": [number * 4096, 4096 * number]} for number in range(500)])
    )
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match="cut off"):
        read_trace(path)


def test_a_damaged_gzip_stream(tmp_path: Path):
    whole = bytearray(gzip.compress(lines(HEADER, OPERATION)))
    whole[15] ^= 0xFF
    path = tmp_path / "damaged.jsonl.gz"
    path.write_bytes(bytes(whole))
    with pytest.raises(TraceError):
        read_trace(path)


def test_snapshots_are_checked(tmp_path: Path):
    program = {"format": "mm-trace", "version": 1, "source": "program"}
    process = {"i": 0, "pid": 1, "op": "process", "args": [], "why": "exec"}
    bad = [0x1000, 0x3000, "rw-p", None, None, "", [[0, 3, "a"]]]  # three pages in a mapping of two
    with pytest.raises(TraceError, match="resident"):
        read_trace(write(tmp_path / "a.gz", lines(program, process | {"maps": [bad]})))
    with pytest.raises(TraceError, match="mapping"):
        read_trace(write(tmp_path / "b.gz", lines(program, process | {"maps": [[0x1001, *bad[1:6], []]]})))


@pytest.mark.parametrize("name", ["missing.jsonl.gz", "."])
def test_the_command_ends_with_2_and_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["replay", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert name.rstrip(".") in err


def test_a_snapshot_may_tell_what_the_program_has_chosen(tmp_path: Path) -> None:
    """The eighth part of a mapping is not in older recordings."""
    mapping = [4096, 3 * 4096, "rw-p", 0, None, "[heap]", [[0, 1, "a"]]]
    process = {"i": 0, "pid": 1, "op": "process", "args": [], "err": None, "ret": None, "notify": [], "why": "exec"}
    header = {"format": "mm-trace", "version": 1, "source": "program", "kernel": "6.18"}
    path = tmp_path / "program.jsonl"
    for maps, flags in (([mapping], ()), ([[*mapping, ["hg", "wf"]]], ("hg", "wf"))):
        path.write_text("".join(json.dumps(line) + "\n" for line in (header, process | {"maps": maps})))
        assert read_trace(path).operations[0].maps[0].flags == flags
