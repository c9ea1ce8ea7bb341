"""`mmubus conform MODULE:FACTORY`, or --command: the conformance kit on a driver of yours."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import os
import shlex
import sys
from typing import Annotated

import typer

from mmubus.cli.commands import add_command
from mmubus.cli.embedded import embedded_server
from mmubus.conform import SCENARIOS, Command, Factory, Made, Outcome, Subject
from mmubus.conform.kit import conform as play
from mmubus.conform.restart import restart
from mmubus.trace.loop import run

__all__ = ["add"]

SERVER_OPTIONS = ("--chaos", "--frames-nr", "16384")


def add(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, "conform", conform)


def conform(
    factory: Annotated[
        str,
        typer.Argument(metavar="MODULE:FACTORY", help="async def make(bus, mm) -> a driver with read(), write()."),
    ] = "",
    command: Annotated[
        str, typer.Option("--command", metavar="'PROGRAM ...'", help="A driver that is a process; see docs/conform.md.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Decides everything that is random.")] = 1,
    only: Annotated[str, typer.Option(metavar="NAME", help="One scenario.")] = "",
    verbose: Annotated[bool, typer.Option(help="Print every transcript, not only of what was broken.")] = False,
) -> None:
    """Put a driver of yours through everything that a notifier must bear, and say which rule it breaks.

    It is a factory in Python, or, in any other language, a command that is asked on its standard input.

    Example:

        mmubus conform my_package.driver:make

        mmubus conform --command 'node client/examples/node/driver.js'
    """
    subject = subject_of(factory, command)
    if only and only not in (*SCENARIOS, "restart"):
        raise typer.BadParameter(f"there is no scenario {only!r}; there are {', '.join((*SCENARIOS, 'restart'))}")
    logging.disable(logging.CRITICAL)  # what is staged would be reported as trouble
    outcomes = run(_play_all(subject, seed, only))
    broken = 0
    for outcome in outcomes:
        broken += outcome.broken is not None
        print(f"{outcome.scenario:<28} {outcome.broken or 'holds'}  ({outcome.seconds:.1f} s)")
        if verbose or outcome.broken is not None:
            for line in outcome.transcript[None if verbose else -40 :]:
                print(f"    {line}")
    print(f"{len(outcomes)} scenarios, {broken} broken, seed {seed}")
    raise typer.Exit(int(broken > 0))


def subject_of(factory: str, command: str) -> Subject:
    """What is to be tested. Raises: BadParameter."""
    if bool(factory) == bool(command):
        raise typer.BadParameter("name MODULE:FACTORY, or a command by --command")
    return Command(shlex.split(command)) if command else Made(load(factory))


def load(text: str) -> Factory:
    """The factory of MODULE:FACTORY; the directory that we are in counts. Raises: BadParameter."""
    module, colon, name = text.partition(":")
    if not colon:
        raise typer.BadParameter(f"{text!r}: write MODULE:FACTORY")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"{text}: {error}") from None

    async def make(bus: object, mm: object) -> object:
        made = found(bus, mm)
        return await made if inspect.isawaitable(made) else made

    return make  # type: ignore[return-value]


async def _play_all(subject: Subject, seed: int, only: str) -> list[Outcome]:
    outcomes = []
    async with embedded_server(SERVER_OPTIONS) as address:
        for name, scenario in SCENARIOS.items():
            if only in ("", name):
                outcomes.append(await play(name, scenario.play, subject, address, chaos=scenario.chaos, seed=seed))
    if only in ("", "restart"):
        outcomes.append(await restart(subject, seed, lambda options: embedded_server((*SERVER_OPTIONS, *options))))
    await asyncio.sleep(0)
    return outcomes
