"""`mmubus top`: a server in a terminal. The screen is `mmubus.top.app`, which needs textual."""

from mmubus.top.frame import frame, headline

__all__ = ["frame", "headline"]
