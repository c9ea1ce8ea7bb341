"""Who may do what: `mmubus whoami`, `mmubus mm grants|grant|revoke`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmubus.authority import Role
from mmubus.cli.commands import add_command
from mmubus.cli.inspection import ask
from mmubus.cli.inspection import mm as mm_commands
from mmubus.cli.output import AsJson, Mm, Server, print_json, print_table

__all__ = ["add"]

Principal = Annotated[str, typer.Argument(metavar="PRINCIPAL", help="token:NAME, cert:NAME or unix:USER.")]


def add(app: typer.Typer) -> None:
    """Add the commands."""
    add_command(app, "whoami", whoami)
    add_command(mm_commands, "grants", grants)
    add_command(mm_commands, "grant", grant)
    add_command(mm_commands, "revoke", revoke)


def whoami(server: Server = None, as_json: AsJson = False) -> None:
    """Whom the server takes you for.

    Example:

        mmubus whoami --server host:50551
    """
    found = ask(server, lambda bus: bus.whoami())
    if as_json:
        print_json(found)
        return
    print(found.principal + (", who administers" if found.administers else ""))


def grants(mm: Mm, server: Server = None, as_json: AsJson = False) -> None:
    """Who has which roles on an address space, and why.

    Example:

        mmubus mm grants 3
    """
    found = ask(server, lambda bus: bus.mm(mm).grants())
    if as_json:
        print_json(found)
        return
    rows = [(one.principal, ", ".join(one.roles), one.because) for one in found]
    print_table(("principal", "roles", "because"), rows, empty="nobody has a role on it")


def grant(
    mm: Mm,
    principal: Principal,
    roles: Annotated[list[Role], typer.Argument(metavar="ROLE", help="What it may do from now on.")],
    server: Server = None,
) -> None:
    """Give somebody roles on an address space of yours.

    Example:

        mmubus mm grant 3 token:bob attach access
    """
    ask(server, lambda bus: bus.mm(mm).grant(principal, *roles))


def revoke(
    mm: Mm,
    principal: Principal,
    roles: Annotated[
        list[Role] | None, typer.Argument(metavar="ROLE", help="Which; none: all that were given.")
    ] = None,
    server: Server = None,
) -> None:
    """Take roles away again; what stands on them is fenced.

    Example:

        mmubus mm revoke 3 token:bob
    """
    remaining = ask(server, lambda bus: bus.mm(mm).revoke(principal, *(roles or ())))
    if remaining:
        print(f"{principal} may still {', '.join(remaining)}: the server's file of roles says so")
