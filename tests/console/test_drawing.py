"""Pictures and pages as HTML, without a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from mmu.v1 import inspection_pb2 as pb
from mmubus.console import content, drawing
from mmubus.console.content import SpaceLook
from mmubus.console.markup import Html, table, tag
from mmubus.inspection import Mapping
from mmubus.look import SESSIONS, Glance, Timeline, draw

EVIL = '"><script>alert(1)</script>'
VOID = {"input", "img", "br"}


class Balanced(HTMLParser):
    """Fails when elements are not closed in order; remembers what there is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_everything_that_others_wrote_is_text() -> None:
    session = pb.Session(session=1, name=EVIL, state="fenced", fenced_because=EVIL)
    mapping = Mapping(0x1000, 0x2000, "rw-p", 0, 1, EVIL, 1)
    holder = pb.Holder(
        session_name=EVIL, registration=pb.Registration(name=EVIL, mm=1), run_starts=[0x1000], run_ends=[0x2000]
    )
    round_ = pb.Round(round=1, operation=EVIL, open=True, waiting_for=[EVIL], mm=1, start=0x1000, end=0x2000)
    timeline = Timeline()
    timeline.add(Glance(10.0, None, [session], [round_], (), ()))
    violation = pb.Violation(kind=EVIL, session_name=EVIL, message=EVIL, story=[EVIL], mm=1)
    answer = pb.Answer(name=EVIL, said=EVIL)
    pages = [
        content.one_session(session),
        content.violations(pb.ListViolationsResponse(violations=[violation], counts={EVIL: 1})),
        content.one_round(pb.ExplainRoundResponse(round=round_, answers=[answer], story=[EVIL])),
        content.space(
            SpaceLook(
                1, EVIL, [mapping], [], [holder], [round_], [round_], page=0x1000,
                stories=pb.ExplainPageResponse(stories=[pb.PageStory(session_name=EVIL, story=[EVIL])]),
            )
        ),
        drawing.rounds(timeline, [EVIL]),
    ]  # fmt: skip
    for page in pages:
        assert "script" not in Balanced(page).tags
        assert EVIL not in page
        assert "&lt;script&gt;" in page


def test_attributes_are_quoted() -> None:
    assert tag("a", "x", title='"<', class_="c", hidden=None) == '<a title="&quot;&lt;" class="c">x</a>'
    assert tag("p", Html("<b>x</b>"), "<") == "<p><b>x</b>&lt;</p>"


def test_a_table_can_be_heard() -> None:
    rows = [pb.Session(session=3, name="nic", state="live")]
    said = table("Sessions", SESSIONS, rows, empty="none", to=lambda one: f"/session/{one.session}", link_at=1)
    assert "<caption>Sessions</caption>" in said
    assert said.count('scope="col"') == len(SESSIONS)
    assert '<a href="/session/3" id="to-/session/3">nic</a>' in said
    assert table("Sessions", SESSIONS, [], empty="none") == '<p class="note">none</p>'


def test_each_open_round_s_name_stands_there_once() -> None:
    timeline = Timeline()
    rounds = [pb.Round(round=n, open=True, took_s=2.0, age_s=2.0, waiting_for=["slow"]) for n in (1, 2, 3)]
    timeline.add(Glance(10.0, None, (), rounds, (), ()))
    svg = drawing.rounds(timeline, ["slow"])
    assert svg.count('class="axis end waits"') == 1
    assert len(re.findall(r"<circle [^>]*is-late", svg)) == 3


def test_a_mapping_is_a_link_to_itself_alone() -> None:
    said = drawing.address_space(draw([Mapping(0x1000, 0x3000, "r-xp", 0, 1, "/lib/a.so", 2)], [], []), 7)
    assert 'href="/mm/7?start=0x1000&amp;end=0x3000"' in said
    assert ">a.so</a>" in said


@pytest.mark.parametrize("used", [0, 1, 4096])
def test_frames_fill_the_bar(used: int) -> None:
    said = drawing.frames(pb.GetStatisticsResponse(frames=4096, frames_used=used, frames_free=4096 - used))
    widths = [float(one) for one in re.findall(r"width:([\d.]+)%", said)]
    assert sum(widths) == pytest.approx(100.0)
