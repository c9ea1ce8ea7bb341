"""What opens when a row is chosen: one session, one round, one address space."""

from __future__ import annotations

from collections.abc import Sequence

from mmu.v1 import inspection_pb2 as pb
from rich.text import Text

from mmubus.inspection import Mapping
from mmubus.linux import NotifierOp
from mmubus.look import SESSIONS, address_range, describe, took

__all__ = ["round_text", "session_text", "space_text"]

MAPPINGS_MAX = 200


def session_text(one: pb.Session) -> Text:
    """A session with its registrations."""
    text = Text(f"session {one.session} {one.name}\n", "bold")
    for column in SESSIONS:
        text.append_text(Text.assemble((f"{column.title:>10}  ", "dim"), column.text(one), "\n"))
    text.append(f"\n{len(one.registrations)} notifiers\n", "bold")
    for each in one.registrations:
        where = f"mm {each.mm} {address_range(each.start, each.end)}" if each.mm else "the rmap list"
        ops = ", ".join(NotifierOp(op).name.lower() for op in each.ops)
        demoted = ", demoted for being slow" if each.uncached else ""
        text.append(f"{each.registration} {each.name} on {where}: holds {each.held_pages:,} pages{demoted}\n")
        text.append(f"    {ops}\n", "dim")
    return text


def round_text(found: pb.ExplainRoundResponse) -> Text:
    """A round, and everyone whom it concerns."""
    text = Text(f"round {found.round.round}\n", "bold")
    for line in found.story:
        text.append(f"{line}\n")
    text.append("\n")
    for answer in found.answers:
        width = round(answer.blame * 20)
        text.append_text(Text.assemble((f"{'█' * width:<20} ", "red"), f"{answer.name} ", (answer.state, "dim")))
        text.append(f" {took(answer.seconds)} {answer.said}\n")
    return text


def space_text(one: pb.AddressSpace, mappings: Sequence[Mapping], holders: Sequence[pb.Holder]) -> Text:
    """An address space: who holds what of it, and its mappings."""
    text = Text(f"mm {one.mm} {one.name}\n", "bold")
    text.append(f"{one.resident_pages:,} of {one.total_pages:,} pages resident, {one.open_rounds:,} open rounds\n\n")
    for holder in holders:
        text.append(f"{holder.session_name}, {holder.registration.name}: {holder.pages:,} pages\n", "cyan")
    if not holders:
        text.append("nobody holds a translation of it\n", "dim")
    text.append("\n")
    for mapping in mappings[:MAPPINGS_MAX]:
        text.append(f"{describe(mapping)}\n")
    if len(mappings) > MAPPINGS_MAX:
        text.append(f"and {len(mappings) - MAPPINGS_MAX:,} more mappings: mmubus mm maps {one.mm}\n", "dim")
    return text
