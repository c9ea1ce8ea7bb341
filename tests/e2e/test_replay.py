"""Recordings replayed through real processes: a server, three drivers, and the replay itself."""

import asyncio
import gzip
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmubus.cli.demo import DRIVERS
from mmubus.cli.embedded import embedded_server
from mmubus.trace.format import Operation, read_trace
from mmubus.trace.replay import Stage, replay
from mmubus.trace.report import Report

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Run = Callable[..., Any]
Recording = Callable[[str], Path]

KEYS = {
    "trace",
    "operations",
    "seconds",
    "mismatched",
    "notifications",
    "rounds",
    "acks",
    "ack_us",
    "freed_before_ack",
    "stale_reads",
    "fenced",
    "first_mismatches",
}
EQUAL = {"err": 0, "ret": 0, "vmas": 0, "present": 0, "notify": 0}


def test_a_random_recording_with_three_drivers_is_the_kernel_s(mmubus: Run, recording: Recording):
    done = mmubus("replay", recording("random-plain-1"), "--json")
    assert done.status == 0, done.err
    report = done.json
    assert set(report) == KEYS
    assert report["mismatched"] == EQUAL
    assert report["first_mismatches"] == []
    told = report["notifications"]
    assert (told["kernel"], told["bus"]) == (461, 461)
    assert told["kernel_bytes"] == told["bus_bytes"]
    assert (told["missed"], told["missed_bytes"], told["excess_bytes"], told["unknowable"]) == (0, 0, 0, 0)
    assert (report["freed_before_ack"], report["stale_reads"], report["fenced"]) == (0, 0, [])
    assert report["operations"] == 1000
    assert report["rounds"] >= 461
    assert report["acks"] >= 2 * 461  # the two drivers that mirror whole address spaces hear each of them
    assert 0 < report["ack_us"]["p50"] <= report["ack_us"]["p99"]


@pytest.mark.parametrize("name", ["random-anon-2", "random-file-2"])
def test_drivers_change_nothing_that_the_program_sees(name: str, mmubus: Run, recording: Recording):
    report = mmubus("replay", recording(name), "--json").json
    assert {aspect: report["mismatched"][aspect] for aspect in ("err", "ret", "vmas", "present")} == {
        "err": 0,
        "ret": 0,
        "vmas": 0,
        "present": 0,
    }
    assert report["notifications"]["missed"] == 0
    assert report["stale_reads"] == 0


@pytest.mark.parametrize("name", ["bad-2", "sealed-1"])
def test_calls_that_fail_with_three_drivers(name: str, mmubus: Run, recording: Recording):
    done = mmubus("replay", recording(name), "--json")
    assert done.status == 0, done.err
    assert done.json["mismatched"] == EQUAL
    assert (done.json["notifications"]["missed"], done.json["notifications"]["excess_bytes"]) == (0, 0)
    assert (done.json["freed_before_ack"], done.json["stale_reads"], done.json["fenced"]) == (0, 0, [])


@pytest.mark.parametrize("name", ["program-gcc", "program-python", "program-redis-bgsave"])
def test_a_program_with_three_drivers(name: str, mmubus: Run, recording: Recording):
    done = mmubus("replay", recording(name), "--json")
    assert done.status == 0, done.err
    report = done.json
    assert report["mismatched"]["err"] == report["mismatched"]["ret"] == 0
    told = report["notifications"]
    assert told["missed"] == 0
    assert told["unknowable"] == 0  # these recordings say when the pages of each process went
    assert told["excess_bytes"] < told["kernel_bytes"] / 1000
    assert (report["freed_before_ack"], report["stale_reads"], report["fenced"]) == (0, 0, [])


def test_several_recordings_are_an_array(mmubus: Run, recording: Recording):
    done = mmubus("replay", recording("random-plain-2"), recording("random-anon-1"), "--only-state", "--json")
    assert done.status == 0, done.err
    assert [report["mismatched"] for report in done.json] == [EQUAL, EQUAL]
    assert [report["acks"] for report in done.json] == [0, 0]


def test_a_summary_for_people(mmubus: Run, recording: Recording):
    done = mmubus("replay", recording("random-plain-big-1"), "--drivers", "1")
    assert done.status == 0
    for word in ("random-plain-big-1", "500 operations", "equal to the kernel", "0 missed", "mirror-1"):
        assert word in done.out


def tampered(source: Path, target: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    """A recording that says something else than the kernel did."""
    lines = [json.loads(line) for line in gzip.decompress(source.read_bytes()).splitlines()]
    change(lines)
    target.write_bytes(gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines)))
    return target


def test_one_invented_notification_is_missed(tmp_path: Path, mmubus: Run, recording: Recording):
    """The comparison can fail: an invalidation that the kernel never made is missed by the bus."""

    def invent(lines: list[dict[str, Any]]) -> None:
        base = lines[0]["base"]
        lines[51]["notify"].append(["invalidate_range", base + 255 * 4096, base + 256 * 4096])

    path = tampered(recording("random-plain-1"), tmp_path / "invented.jsonl.gz", invent)
    done = mmubus("replay", path, "--only-state", "--json")
    assert done.status == 1
    assert done.json["notifications"]["missed"] == 1
    assert done.json["mismatched"] == EQUAL | {"notify": 1}
    assert done.json["first_mismatches"][0]["i"] == 50


def test_another_state_is_not_good(tmp_path: Path, mmubus: Run, recording: Recording):
    def change(lines: list[dict[str, Any]]) -> None:
        lines[100]["present"] = [[0, 1]]
        lines[200]["err"], lines[200]["ret"] = "EPERM", None

    path = tampered(recording("random-plain-1"), tmp_path / "changed.jsonl.gz", change)
    done = mmubus("replay", path, "--only-state", "--json")
    assert done.status == 1
    assert done.json["mismatched"] == EQUAL | {"present": 1, "err": 1}


def test_without_the_end_of_pages_copies_are_unknowable(tmp_path: Path, mmubus: Run, recording: Recording):
    """Older recorders wrote no `unmapped`: copies that the kernel made for a child on its way out cannot be told."""

    def forget(lines: list[dict[str, Any]]) -> None:
        lines[:] = [line for line in lines if line.get("op") != "unmapped"]

    path = tampered(recording("program-redis-bgsave"), tmp_path / "older.jsonl.gz", forget)
    done = mmubus("replay", path, "--only-state", "--json")
    assert done.json["notifications"]["missed"] == 0
    assert done.status == 0, done.err


def test_a_server_that_runs_already(server: str, mmubus: Run, recording: Recording):
    done = mmubus("replay", recording("random-anon-3"), "--server", server, "--json")
    assert done.status == 0, done.err
    assert done.json["mismatched"] == EQUAL
    assert mmubus("mm", "list", "--json", "--server", server).json == []  # everything was given back
    sessions = mmubus("sessions", "--json", "--server", server).json
    assert all(session["state"] == "left" for session in sessions)
    statistics = mmubus("stats", "--json", "--server", server).json
    assert statistics["freed_before_ack"] == 0
    assert statistics["rounds_open"] == 0
    rounds = mmubus("rounds", "--ended", 5, "--json", "--server", server).json
    assert len(rounds) == 5
    assert not any(one["open"] for one in rounds)


def test_a_server_that_is_not_there(tmp_path: Path, mmubus: Run, recording: Recording):
    done = mmubus("replay", recording("random-plain-1"), "--server", f"unix:{tmp_path}/none.sock", "--json")
    assert done.status == 1
    assert done.out == ""
    assert done.err.splitlines()[-1].startswith("mmubus: ")


async def replay_and_kill(path: Path, name: str, after: int, number: int) -> Report:
    """Replay with three drivers; one of them gets a signal in the middle."""
    reached = asyncio.Event()

    def progress(played: int) -> None:
        if played == after:
            reached.set()

    async def assassin(stage: Stage) -> None:
        await reached.wait()
        victim = next(driver for driver in stage.crew.drivers if driver.name == name)
        victim.process.send_signal(number)

    async with embedded_server(["--ack-budget-s", "8", "--grace-s", "1"]) as address:
        return await replay(read_trace(path), address, progress=progress, spectator=assassin)


@pytest.mark.parametrize("name", ["mirror-1", "range-1", "rmap-1"])
def test_a_driver_that_is_killed_is_named_and_nothing_is_freed_early(name: str, recording: Recording):
    report = asyncio.run(replay_and_kill(recording("random-anon-1"), name, 300, signal.SIGKILL))
    assert report.fenced == [name]
    assert not report.good
    assert [driver.name for driver in report.drivers if driver.died] == [name]
    assert report.books.operations == 950  # it went on to the end
    assert not any(report.books.mismatched.values())
    assert (report.freed_before_ack, report.stale_reads, report.books.missed) == (0, 0, 0)
    others = [driver for driver in report.drivers if driver.name != name]
    assert all(driver.reads > 200 for driver in others)


def test_the_demo_without_a_terminal(mmubus: Run):
    done = mmubus("demo")
    assert done.status == 0, done.err
    for word in (
        "Redis",
        *DRIVERS,
        "each of these, too",
        "No page was freed before",
        "none of them held",
        "What it means",
    ):
        assert word in done.out
    assert "drivers hold" in done.out, "how far it is"
    assert "\x1b" not in done.out


def test_the_demo_of_chosen_drivers_on_another_recording(mmubus: Run, recording: Recording):
    done = mmubus("demo", "--drivers", "gru, vfio-user,rmap", "--trace", recording("random-anon-2"), "--fast")
    assert done.status == 0, done.err + done.out
    for word in ("random-anon-2", "gru", "vfio_user", "rmap-1", "none of them held"):
        assert word in done.out
    assert "kvm" not in done.out
    assert "drivers hold" not in done.out


def test_the_bundled_recording_is_the_oracle_s(recording: Recording):
    """There is one recording; the demo's copy is in the package so that it works where it is installed."""
    from importlib.resources import files

    bundled = files("mmubus.trace") / "data" / "program-redis-bgsave.jsonl.gz"
    assert bundled.read_bytes() == recording("program-redis-bgsave").read_bytes()


def test_operations_are_what_the_format_says(recording: Recording):
    trace = read_trace(recording("program-redis-bgsave"))
    assert len({operation.pid for operation in trace.operations}) == 10
    assert isinstance(trace.operations[0], Operation)
