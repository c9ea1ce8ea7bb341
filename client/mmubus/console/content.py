"""What the pages say: from the server's answers to HTML, without a browser or a server being there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from mmu.v1 import inspection_pb2 as pb

from mmubus.console import drawing
from mmubus.console.markup import Html, join, link, note, section, table, tag
from mmubus.inspection import Mapping, PageRun
from mmubus.linux import PAGE_SIZE, NotifierOp, Reason
from mmubus.look import (
    ROUNDS,
    SESSIONS,
    SPACES,
    Column,
    Glance,
    Timeline,
    Watch,
    address_range,
    describe,
    draw,
    late,
    place,
    took,
)

__all__ = ["SpaceLook", "banner", "one_round", "one_session", "overview", "space", "violations"]

SLOWEST = 8
ROUND_COLUMNS: tuple[Column[pb.Round], ...] = (
    Column("took", lambda one: took(one.took_s), lambda one: -one.took_s),
    Column("last to answer", lambda one: one.last or "nobody was asked", lambda one: one.last, number=False),
    Column("operation", lambda one: one.operation or one.notification, lambda one: one.operation, number=False),
    Column("reason", lambda one: Reason(one.reason).name.lower(), lambda one: one.reason, number=False),
    Column("where", place, lambda one: one.start, number=False),
    Column("ago", lambda one: took(one.age_s), lambda one: one.age_s),
)
MAPPING_COLUMNS: tuple[Column[Mapping], ...] = (
    Column("range", lambda one: address_range(one.start, one.end), lambda one: one.start, number=False),
    Column("rights", lambda one: one.protection, lambda one: one.protection, number=False),
    Column("name", lambda one: one.name or "anonymous", lambda one: one.name, number=False),
    Column("resident", lambda one: f"{one.resident:,}", lambda one: one.resident),
    Column("pages", lambda one: f"{(one.end - one.start) // PAGE_SIZE:,}", lambda one: one.end - one.start),
)
HOLDER_COLUMNS: tuple[Column[pb.Holder], ...] = (
    Column("session", lambda one: one.session_name, lambda one: one.session_name, number=False),
    Column("notifier", lambda one: one.registration.name, lambda one: one.registration.name, number=False),
    Column("state", lambda one: one.state, lambda one: one.state, number=False),
    Column("pages of this", lambda one: f"{one.pages:,}", lambda one: one.pages),
    Column("of all", lambda one: f"{one.registration.held_pages:,}", lambda one: one.registration.held_pages),
)
REGISTRATION_COLUMNS: tuple[Column[pb.Registration], ...] = (
    Column("notifier", lambda one: one.name or f"{one.registration}", lambda one: one.name, number=False),
    Column("on", lambda one: f"mm {one.mm}" if one.mm else "the rmap list", lambda one: one.mm, number=False),
    Column("interval", lambda one: address_range(one.start, one.end), lambda one: one.start, number=False),
    Column("held", lambda one: f"{one.held_pages:,}", lambda one: one.held_pages),
    Column(
        "ops", lambda one: ", ".join(NotifierOp(op).name.lower() for op in one.ops), lambda one: len(one.ops), False
    ),
)


@dataclass(frozen=True, slots=True)
class SpaceLook:
    """All that the page of an address space shows.

    start, end: the part that is shown, 0: everything; page: the address whose history is wanted, or None.
    """

    mm: int
    name: str
    mappings: Sequence[Mapping]
    runs: Sequence[PageRun]
    holders: Sequence[pb.Holder]
    open: Sequence[pb.Round]
    ended: Sequence[pb.Round]
    start: int = 0
    end: int = 0
    page: int | None = None
    stories: pb.ExplainPageResponse | None = None


def banner(watch: Watch) -> Html:
    """Why there is nothing new, or nothing."""
    if watch.failed is None:
        return Html("")
    old = "" if watch.latest is None else f" What stands below is {took(time.monotonic() - watch.latest.at)} old."
    said = f"Not connected to {watch.bus.address}; trying again. {' '.join(str(watch.failed).split())}.{old}"
    return tag("div", said, class_="banner", role="alert")


def overview(watch: Watch, timeline: Timeline) -> Html:
    """The server: its pace, its rounds, its sessions and address spaces."""
    glance = watch.latest
    if glance is None:
        if watch.failed is None:
            return note("Looking …")
        return section("No server yet", tag("p", "Start one with ", tag("code", "mmubus serve"), "."))
    names = sorted({one.name for one in glance.sessions})
    slowest = sorted(glance.ended, key=lambda one: -one.took_s)[:SLOWEST]
    return join(
        [
            _figures(watch, glance),
            section(
                "Rounds", drawing.rounds(timeline, names), about="each dot one round; higher is slower; last minute"
            ),
            section(
                "Waited for now",
                table(
                    "Open rounds", ROUNDS, glance.open, empty="Nobody is waited for.", alarming=late,
                    to=lambda one: f"/round/{one.round}", link_at=2,
                ),
            ),
            section("Sessions", _sessions(glance), about="the one that others waited for most comes first"),
            section("Address spaces", _spaces(glance)),
            section(
                "Slowest rounds",
                table(
                    "The slowest of the last rounds", ROUND_COLUMNS, slowest, empty="No round has ended yet.",
                    to=lambda one: f"/round/{one.round}", link_at=2,
                ),
                about=f"of the last {len(glance.ended)}",
            ),
        ]
    )  # fmt: skip


def _sessions(glance: Glance) -> Html:
    empty = "No driver is connected. A first one in ten minutes: the tutorial in the documents."
    return table(
        "Sessions", SESSIONS, glance.sessions, empty=empty, to=lambda one: f"/session/{one.session}", link_at=1,
        alarming=lambda one: one.state == "fenced",
    )  # fmt: skip


def _spaces(glance: Glance) -> Html:
    empty = join(["There are no address spaces. To see some: ", tag("code", "mmubus demo --server ADDRESS"), "."])
    return table(
        "Address spaces", SPACES, glance.address_spaces, empty=empty, to=lambda one: f"/mm/{one.mm}", link_at=1
    )


def _figures(watch: Watch, glance: Glance) -> Html:
    counted = glance.statistics
    if counted is None:
        return note("The figures of the whole server are for its administrators.")

    def rate(counter: str) -> str:
        found = watch.rate(counter)
        return "…" if found is None else f"{found:,.0f}"

    figures = [
        ("rounds/s", rate("rounds"), False),
        ("notices/s", rate("notices"), False),
        ("acks/s", rate("acks"), False),
        ("ack p50", took(counted.ack_us_p50 / 1e6), False),
        ("ack p99", took(counted.ack_us_p99 / 1e6), False),
        ("open rounds", f"{counted.rounds_open:,}", any(late(one) for one in glance.open)),
        ("late", f"{counted.late:,}", False),
        ("fenced", f"{counted.fenced:,}", counted.fenced > 0),
        ("stale, refused", f"{counted.stale_refused:,}", counted.stale_refused > 0),
    ]
    boxes = [
        tag("div", tag("dt", name), tag("dd", value), class_="alarming" if alarming else None)
        for name, value, alarming in figures
    ]
    return join([tag("dl", *boxes, class_="figures"), section("Frames", drawing.frames(counted))])


def space(look: SpaceLook) -> Html:
    """An address space, or a part of it, and the history of one of its pages."""
    mappings = [one for one in look.mappings if not look.end or (one.start < look.end and look.start < one.end)]
    picture = draw(mappings, look.runs, look.holders, look.open)
    part = f" {address_range(look.start, look.end)}" if look.end else ""
    back = link(f"/mm/{look.mm}", "show everything") if look.end else "choose a mapping to see it alone"
    return join(
        [
            tag("h1", f"mm {look.mm} {look.name}{part}"),
            section(
                "Picture",
                drawing.address_space(picture, look.mm),
                about=join(["mappings to scale, gaps folded; ", back]),
            ),
            _history(look),
            section(
                "Who holds translations",
                table(
                    "Holders", HOLDER_COLUMNS, look.holders, to=lambda one: f"/session/{one.session}",
                    empty="No device holds a translation of this: taking it away waits for nobody.",
                ),
            ),
            section(
                "Mappings",
                table(
                    "Mappings", MAPPING_COLUMNS, mappings, empty="Nothing is mapped.",
                    to=lambda one: f"/mm/{look.mm}?start={one.start:#x}&end={one.end:#x}",
                ),
            ),
        ]
    )  # fmt: skip


def _history(look: SpaceLook) -> Html:
    value = f"{look.page:#x}" if look.page is not None else ""
    form = tag(
        "form",
        tag("label", "Address", for_="page"),
        tag("input", name="page", id="page", value=value, placeholder="0x10000000", autocomplete="off"),
        tag("button", "Show its history", type="submit"),
        method="get",
        action=f"/mm/{look.mm}",
    )
    if look.page is None or look.stories is None:
        return section(
            "One page", form, note("Whom it was given to, who took it away, and when that was acknowledged.")
        )
    return section("One page", form, _page(look, look.page, look.stories))


def _page(look: SpaceLook, page: int, found: pb.ExplainPageResponse) -> Html:
    mapping = next((one for one in look.mappings if one.start <= page < one.end), None)
    run = next((one for one in look.runs if one.start <= page < one.end), None)
    covering = [one for one in look.ended if one.mm == look.mm and one.start <= page < one.end]
    stories = [
        tag(
            "div",
            tag(
                "h3",
                f"{one.session_name}, registration {one.registration}: ",
                "holds it" if one.holds else "holds it no more",
            ),
            tag("ol", *(tag("li", line) for line in one.story), class_="story"),
        )
        for one in found.stories
    ]
    return join(
        [
            tag("p", f"In {describe(mapping)}." if mapping else "Nothing is mapped there."),
            tag("p", _state(run, page)),
            tag("div", *stories, class_="stories") if stories else note("No device had it, as far as is remembered."),
            tag("p", f"The server's clock shows {found.now_s:.6f} s.", class_="about"),
            table(
                "Rounds on this page", ROUND_COLUMNS, covering, to=lambda one: f"/round/{one.round}", link_at=2,
                empty="None of the rounds that are remembered was about it.",
            ),
        ]
    )  # fmt: skip


def _state(run: PageRun | None, page: int) -> str:
    if run is None:
        return "It is not resident."
    if run.swapped:
        return "It is in swap."
    pfn = run.pfn + ((page - run.start) // PAGE_SIZE if run.contiguous else 0)
    frame = (
        "the zero page" if run.zero else f"frame {pfn:#x}" if run.contiguous or run.end - run.start == PAGE_SIZE else ""
    )
    words = [word for word in ("writable", "dirty", "exclusive", "exported", "pinned") if getattr(run, word)]
    return f"It is resident: {', '.join([part for part in (frame, *words) if part])}."


def one_round(found: pb.ExplainRoundResponse) -> Html:
    """A round: who was told, who answered when, who is to blame."""
    columns: tuple[Column[pb.Answer], ...] = (
        Column("session", lambda one: one.name, lambda one: one.name, number=False),
        Column("state", lambda one: one.state, lambda one: one.state, number=False),
        Column("after", lambda one: took(one.seconds), lambda one: one.seconds),
        Column("waited for alone", lambda one: f"{one.blame:.0%} of the time", lambda one: one.blame),
        Column("said", lambda one: one.said, lambda one: one.said, number=False),
    )
    return join(
        [
            tag("h1", f"Round {found.round.round}: {found.round.operation or found.round.notification}"),
            section("What happened", tag("ol", *(tag("li", line) for line in found.story), class_="story")),
            section(
                "Who was asked",
                table(
                    "Answers", columns, found.answers, empty="Nobody was concerned.",
                    to=lambda one: f"/session/{one.session}", alarming=lambda one: one.blame >= 0.5,
                ),
                about="slowest first",
            ),
        ]
    )  # fmt: skip


def one_session(one: pb.Session) -> Html:
    """A session and its registrations."""
    facts = [
        tag("div", tag("dt", c.title), tag("dd", c.text(one))) for c in SESSIONS if c.title not in ("session", "state")
    ]
    return join(
        [
            tag("h1", f"Session {one.session} {one.name}: {one.state}"),
            tag("div", one.fenced_because, class_="banner") if one.fenced_because else "",
            tag("dl", *facts, class_="figures"),
            section(
                "Registrations",
                table(
                    "Registrations", REGISTRATION_COLUMNS, one.registrations, empty="It has registered nothing.",
                    to=lambda each: f"/mm/{each.mm}" if each.mm else "/",
                ),
            ),
        ]
    )  # fmt: skip


def violations(found: pb.ListViolationsResponse) -> Html:
    """What drivers did that no driver may do, explained."""
    counts = ", ".join(f"{kind} {count:,}" for kind, count in sorted(found.counts.items()))
    entries = [
        tag(
            "div",
            tag("h3", f"{one.kind}{', refused' if one.refused else ''}: {one.session_name or 'nobody can be named'}"),
            tag("p", f"{took(one.age_s)} ago. ", one.message),
            tag("ol", *(tag("li", line) for line in one.story), class_="story"),
            _where_it_was(one),
            class_="violation",
        )
        for one in found.violations
    ]
    return join(
        [
            tag("h1", "Violations"),
            section(
                "What drivers did that no driver may do",
                *(entries or [note("None is remembered.")]),
                about=f"since the start: {counts}" if counts else "",
            ),
        ]
    )


def _where_it_was(one: pb.Violation) -> Html:
    if not one.mm:
        return Html("")
    return tag("p", link(f"/mm/{one.mm}?page={one.address:#x}", f"the page {one.address:#x} of mm {one.mm}"))
