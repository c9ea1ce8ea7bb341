"""Inputs on paper: which methods change a core, how each is noted, and how it is done again.

    live     method(…) ──runs──► note((name, arguments, options, seen))     only what has run is noted
    replay   entry ──► the same method with the same arguments              and the same outcome, an error included

Sessions are named by their numbers; what the room above passes through (tags, wrappers) is left out. An input that
breaks an invariant of ours is not noted: its server stops, and the next one does not stumble over it again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, TypeVar, cast

from mmubusd.mm.errno import MmError
from mmubusd.notify import NotifyError, Operation, Session
from mmubusd.notify.notice import SessionId
from mmubusd.state.core import Core
from mmubusd.state.errors import StateError
from mmubusd.state.frames import ObservedFrames, Seen

__all__ = ["SEAL", "Entry", "RecordedCore", "apply"]

F = TypeVar("F", bound=Callable[..., Any])

Entry = tuple[str, tuple[Any, ...], dict[str, Any], Seen]
"""One input: the method, its arguments and options, and what was seen of frames meanwhile."""

SEAL = "seal"
"""An entry that changes nothing: what the state looked like here. Arguments: `RecordedCore.fingerprint()`."""

FORGETS = frozenset(
    {"flush", "heartbeat", "leave", "process_died", "send_again", "session_lost", "take_batch", "take_finding"}
)
"""Inputs that mean nothing for a session that is not remembered any more. All others of one are refused."""


class _Numbered(int):
    """The number of a session, among arguments."""

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return _Numbered, (int(self),)


def _noted(method: F) -> F:
    name = method.__name__

    @wraps(method)
    def noted(self: RecordedCore, *args: Any, **options: Any) -> Any:
        note = self.note
        if note is None:
            return method(self, *args, **options)
        written = args
        if args and isinstance(args[0], Session):
            session = args[0]
            if session.id not in self.sessions:
                if name not in FORGETS:
                    self._sessions.check(session)
                return None
            written = (_Numbered(session.id), *args[1:])
        asked = options
        if options:
            asked = {key: value for key, value in options.items() if key not in ("tag", "wrap")}
            on_behalf = asked.get("session")
            if isinstance(on_behalf, Session):
                if on_behalf.id not in self.sessions:
                    options["session"] = asked["session"] = None  # it has gone; the call is made all the same
                else:
                    asked["session"] = _Numbered(on_behalf.id)
        self.frames.begin()
        try:
            result = method(self, *args, **options)
        except (MmError, NotifyError):
            note((name, written, asked, self.frames.take_seen()))
            raise
        note((name, written, asked, self.frames.take_seen()))
        return result

    return cast(F, noted)


class RecordedCore(Core):
    """A core that notes what is done to it.

    Attributes: note: is given each input after it has run; None: nobody notes (while inputs are played again).
    """

    note: Callable[[Entry], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "note"}

    @property
    def frames(self) -> ObservedFrames:
        """The frames, as this room has them."""
        frames = self.memory.frames
        assert isinstance(frames, ObservedFrames)
        return frames

    def fingerprint(self) -> tuple[int, ...]:
        """A few numbers that two equal states have in common, and others hardly ever."""
        frames, counters = self.memory.frames, self.counters
        return (
            frames.free_nr, frames.quarantine_nr, int(frames.generation.sum()), int(frames.refcount.sum()),
            int(frames.mapcount.sum()), len(self.memory.mms), len(self.memory.files_by_mapping), len(self.sessions),
            counters.operations, counters.acks, counters.fenced, len(self.rounds.past),
        )  # fmt: skip

    def start(self, *args: Any, **options: Any) -> Operation[Any]:
        """As `Bus.start`. Work that did not come in as an input could not be done again, and so is not begun.

        Raises: AssertionError when it comes from outside while inputs are noted.
        """
        assert self.note is None or self.frames.inside, "work begins with an input of the core, such as `call`"
        return super().start(*args, **options)

    # Sessions.
    open_session = _noted(Core.open_session)
    heartbeat = _noted(Core.heartbeat)
    session_lost = _noted(Core.session_lost)
    leave = _noted(Core.leave)
    fence = _noted(Core.fence)
    flush = _noted(Core.flush)
    process_died = _noted(Core.process_died)
    acknowledge = _noted(Core.acknowledge)
    take_batch = _noted(Core.take_batch)
    take_finding = _noted(Core.take_finding)
    send_again = _noted(Core.send_again)
    ask_after = _noted(Core.ask_after)
    register = _noted(Core.register)
    unregister = _noted(Core.unregister)

    # Programs.
    call = _noted(Core.call)
    create_mm = _noted(Core.create_mm)
    rename_mm = _noted(Core.rename_mm)
    create_file = _noted(Core.create_file)
    limit_memcg = _noted(Core.limit_memcg)
    join_memcg = _noted(Core.join_memcg)
    unlink = _noted(Core.unlink)
    read_file = _noted(Core.read_file)
    remember = _noted(Core.remember)

    # Devices.
    fault = _noted(Core.fault)
    snapshot = _noted(Core.snapshot)
    migrate = _noted(Core.migrate)
    exclusive = _noted(Core.exclusive)
    pin = _noted(Core.pin)
    unpin = _noted(Core.unpin)
    dma_read = _noted(Core.dma_read)
    dma_write = _noted(Core.dma_write)
    export = _noted(Core.export)
    unexport = _noted(Core.unexport)

    # Time, and the server's own life.
    expire = _noted(Core.expire)
    stalled = _noted(Core.stalled)
    change_limits = _noted(Core.change_limits)
    offences = _noted(Core.offences)
    drain = _noted(Core.drain)
    restart = _noted(Core.restart)


def apply(core: RecordedCore, entry: Entry) -> None:
    """Do an input again, as the room above would: what has ended and what is ready is taken. Requires: core.note None.

    Raises: StateError when it is no input, or does not do what it did.
    """
    name, args, options, seen = entry
    if name == SEAL:
        if args != core.fingerprint():
            raise StateError(f"played again the state is {core.fingerprint()}, and it was {args}")
        return
    if not callable(getattr(RecordedCore, name, None)) or name.startswith("_"):
        raise StateError(f"{name!r} is no input of this version")
    if args and isinstance(args[0], _Numbered):
        args = (_session(core, args[0]), *args[1:])
    number = options.get("session")
    if isinstance(number, _Numbered):
        options = options | {"session": _session(core, number)}
    core.frames.play(seen)
    with suppress(MmError, NotifyError):  # it was refused when it was noted, too
        getattr(core, name)(*args, **options)
    core.finished.clear()
    core.drain_ready()


def _session(core: RecordedCore, number: int) -> Session:
    session = core.sessions.get(SessionId(number))
    if session is None:
        raise StateError(f"there is no session {number} when the inputs are played again")
    return session
