"""What `mmubus top` and the console show, before it is a screen or a page."""

from mmubus.look.columns import LATE_S, ROUNDS, SESSIONS, SPACES, Column, late, matches, place
from mmubus.look.glance import Glance, Watch
from mmubus.look.picture import Bar, Picture, Scale, Stretch, Track, describe, draw
from mmubus.look.timeline import Dot, Timeline
from mmubus.look.words import address_range, took

__all__ = [
    "LATE_S",
    "ROUNDS",
    "SESSIONS",
    "SPACES",
    "Bar",
    "Column",
    "Dot",
    "Glance",
    "Picture",
    "Scale",
    "Stretch",
    "Timeline",
    "Track",
    "Watch",
    "address_range",
    "describe",
    "draw",
    "late",
    "matches",
    "place",
    "took",
]
