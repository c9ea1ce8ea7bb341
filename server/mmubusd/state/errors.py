"""What can be wrong with a directory of state."""

from __future__ import annotations

__all__ = ["StateError"]


class StateError(Exception):
    """The state cannot be used; the message names the file and says what is wrong with it, and nothing has changed."""
