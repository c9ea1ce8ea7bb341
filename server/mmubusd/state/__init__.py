"""The state over a restart: a core whose inputs are noted, a journal of them, and checkpoints."""

from mmubusd.state.core import Core
from mmubusd.state.disk import Directory, Disk, File
from mmubusd.state.errors import StateError
from mmubusd.state.frames import ObservedFrames
from mmubusd.state.inputs import SEAL, Entry, RecordedCore
from mmubusd.state.keeper import Keeper, compact, open_state

__all__ = [
    "SEAL",
    "Core",
    "Directory",
    "Disk",
    "Entry",
    "File",
    "Keeper",
    "ObservedFrames",
    "RecordedCore",
    "StateError",
    "compact",
    "open_state",
]
