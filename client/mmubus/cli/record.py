"""`mmubus record`: a program's memory life, from this machine's own kernel."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mmubus.cli.commands import add_command
from mmubus.cli.output import AsJson, errors, print_json
from mmubus.trace.record.capture import Recording, means, record

__all__ = ["add"]


class How(StrEnum):
    """Ways to record."""

    AUTO = "auto"
    KVM = "kvm"
    STRACE = "strace"


def add(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, "record", record_command, context_settings={"allow_interspersed_args": False})


def record_command(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="The program and its arguments.")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the recording goes.")] = Path(
        "recording.jsonl.gz"
    ),
    how: Annotated[
        How, typer.Option(help="kvm sees notifications and page faults, strace the calls alone.")
    ] = How.AUTO,
    thp: Annotated[bool, typer.Option("--thp", help="Leave transparent huge pages on.")] = False,
    as_json: AsJson = False,
) -> None:
    """Record what a program does to its memory, and what the kernel tells secondary MMUs about it.

    With tracefs and /dev/kvm (root), every process of the program gets a real MMU notifier, and the kernel's
    tracepoints report each of its calls beside the memory calls and page faults. Without them, strace gives the calls
    alone. The recording can be replayed with `mmubus replay`.

    Example:

        mmubus record -o sort.jsonl.gz -- sort --parallel=2 words.txt
    """
    console = errors()
    offered = means()
    chosen = offered.best(how.value)
    if chosen == "strace" and offered.kvm:
        console.print(f"recording with strace; not with kvm: {'; '.join(offered.kvm)}", markup=False, soft_wrap=True)
        console.print("recorded: memory calls, their results, and what exists at the start of each process")
        console.print("not recorded: page faults and notifications; a replay compares errors and results only")
    recording = record(command, out, chosen, thp=thp)
    if recording.lost:
        console.print(f"the kernel's buffer was too small: {recording.lost:,} events are missing from the recording")
    if as_json:
        print_json(recording)
    else:
        console.print(_sentence(recording, out), markup=False, soft_wrap=True)


def _sentence(recording: Recording, out: Path) -> str:
    told = f"{recording.notifications:,} notifications, " if recording.how == "kvm" else ""
    return (
        f"{out}: {recording.operations:,} operations of {recording.processes:,} processes, {told}"
        f"recorded with {recording.how}; the program's exit status was {recording.status}"
    )
