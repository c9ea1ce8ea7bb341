"""Group commit: inputs are kept before anything that came of them leaves the server.

    input ──core──► noted ─┐                      ┌─► answers, notices, statuses that waited for it
    input ──core──► noted ─┴─ one write, one sync ┘
    input ──core──► noted ─── the next write begins when this one has ended

The loop never waits for the disk: a thread writes, and what is noted meanwhile goes into the next write together. So
the busier the server, the more each sync is for. Whoever is about to send something waits for what has been noted by
then, no matter whose it was: it may know of all that.

When the disk is full nobody is answered, new work is refused, and the same write is tried again until there is room.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from structlog.typing import FilteringBoundLogger

from mmubusd.mm.errno import MmError
from mmubusd.rpc.errors import Alarm, NotKept
from mmubusd.state import SEAL, Directory, Entry, Keeper, RecordedCore

__all__ = ["Commits", "NoRoom"]

FULL = (errno.ENOSPC, errno.EDQUOT)
CROWDED = (errno.EMFILE, errno.ENFILE)
"""No file can be opened: too many are, such as connections of strangers. What is open can be written to."""
AGAIN_S = 0.5
"""How long a full disk is left alone before the same is tried again."""
LONG = 4
"""A segment that is so many times as long as it should be, because something is always under way, needs a pause."""
PAUSE_S = 0.05
PAUSED_AGAIN_S = 1.0
"""How long new work waits at most for what is under way to end, and how often. What a handler asks for never waits."""


class NoRoom(MmError):
    """Nothing new can be kept. Nothing has changed."""


class Commits:
    """Writes what a core notes, and says when it is kept.

    Attributes:
        full: there is no room. pause: new work waits until it is done.
        commits_nr, inputs_nr: how many writes there were, and inputs in them.
    """

    def __init__(
        self, core: RecordedCore, keeper: Keeper, directory: Directory, alarm: Alarm, log: FilteringBoundLogger,
        segment_bytes: int,
    ) -> None:  # fmt: skip
        self._core = core
        self._keeper = keeper
        self._directory = directory
        self._alarm = alarm
        self._log = log
        self._segment_bytes = segment_bytes
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "mmubus-journal")
        self._pending: list[Entry] = []
        self._busy = self._closing = False
        self._noted = self._kept = 0
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._answering: list[tuple[int, asyncio.Future[None]]] = []
        self._compaction: asyncio.Task[None] | None = None
        self.pause: asyncio.Future[None] | None = None
        self._paused_at = -PAUSED_AGAIN_S
        self.full = False
        self._stays = False  # the last segment could not be ended
        self.commits_nr = self.inputs_nr = 0
        core.note = self._note

    # Waiting.

    def admit(self) -> None:
        """Raises: NoRoom while there is no room to keep anything."""
        if self.full:
            raise NoRoom("ENOSPC", f"the disk of {self._directory.path} is full: nothing new can be kept")

    def then(self, what: Callable[[], None]) -> None:
        """Do something when everything that has been noted is kept; in the order in which it was asked."""
        if self._kept == self._noted:
            what()
        else:
            self._waiting.append((self._noted, what))

    async def kept(self) -> None:
        """Wait until everything that has been noted is kept, however long that takes."""
        if self._kept != self._noted:
            done = self._loop.create_future()
            self._waiting.append((self._noted, lambda: None if done.done() else done.set_result(None)))
            await done

    async def kept_or_fail(self) -> None:
        """As kept, for a call that is to be answered. Raises: NotKept when the disk is full."""
        if self._kept == self._noted:
            return
        if self.full:
            raise NotKept(str(self._directory.path))
        done: asyncio.Future[None] = self._loop.create_future()
        self._answering.append((self._noted, done))
        await done

    def _release(self) -> None:
        kept = self._kept
        while self._waiting and self._waiting[0][0] <= kept:
            self._waiting.popleft()[1]()
        if self._answering:
            still = []
            for number, done in self._answering:
                if number > kept:
                    still.append((number, done))
                elif not done.done():
                    done.set_result(None)
            self._answering = still

    # Writing.

    def _note(self, entry: Entry) -> None:
        self._pending.append(entry)
        self._noted += 1
        if not self._busy:
            self._busy = True
            # One turn of the loop later: what this input has made ready is taken meanwhile, and is kept with it.
            self._loop.call_soon(self._loop.call_soon, self._begin)

    def _begin(self) -> None:
        batch, self._pending = self._pending, []
        ends = self._keeper.size >= self._segment_bytes and self._core.quiet and self._compaction is None
        if ends:
            batch.append((SEAL, self._core.fingerprint(), {}, ()))
            self._end_pause()
        elif self._keeper.size >= LONG * self._segment_bytes and self._compaction is None:
            self._begin_pause()
        self._write(batch, self._noted, ends)

    def _write(self, batch: list[Entry], upto: int, ends: bool) -> None:
        writing = self._loop.run_in_executor(self._thread, self._keeper.append, batch)
        writing.add_done_callback(lambda done: self._written(batch, upto, ends, done.exception()))

    def _written(self, batch: list[Entry], upto: int, ends: bool, error: BaseException | None) -> None:
        if isinstance(error, OSError) and error.errno in FULL:
            self._is_full(error)
            self._loop.call_later(AGAIN_S, self._write, batch, upto, ends)
            return
        if error is not None:
            self._alarm.ring(error)  # what is on the disk is not known any more
            return
        if self.full:
            self.full = False
            self._log.info("there is room for the state again")
        self._kept = upto
        self.commits_nr += 1
        self.inputs_nr += len(batch)
        try:
            self._release()
        except Exception as broken:
            self._alarm.ring(broken)
        if ends:
            self._end_segment()
        elif self._pending:
            self._begin()
        else:
            self._busy = False

    def _is_full(self, error: OSError) -> None:
        if not self.full:
            self.full = True
            self._log.error("the disk is full: nothing is answered until there is room", because=str(error))
        for _, done in self._answering:
            if not done.done():
                done.set_exception(NotKept(str(self._directory.path)))
        self._answering.clear()

    # Segments and checkpoints.

    def _end_segment(self) -> None:
        beginning = self._loop.run_in_executor(self._thread, self._keeper.begin_segment)
        beginning.add_done_callback(lambda done: self._segment_begun(done.exception()))

    def _segment_begun(self, error: BaseException | None) -> None:
        if isinstance(error, OSError) and error.errno in FULL + CROWDED:
            if not self._stays:
                self._log.warning("no other segment of the journal can be begun; this one goes on", because=str(error))
            self._stays = True
        elif error is not None:
            self._alarm.ring(error)
            return
        elif not self._closing:
            self._stays = False
            self._compaction = self._loop.create_task(self._compact(self._keeper.segment))
        if self._pending:
            self._begin()
        else:
            self._busy = False

    def _begin_pause(self) -> None:
        now = self._loop.time()
        if self.pause is None and now - self._paused_at > PAUSED_AGAIN_S:
            self._paused_at = now
            self.pause = self._loop.create_future()
            self._loop.call_later(PAUSE_S, self._end_pause)

    def _end_pause(self) -> None:
        if self.pause is not None:
            self.pause.set_result(None)
            self.pause = None

    async def _compact(self, segment: int) -> None:
        """Have another process make the checkpoint, and put it in place."""
        program = (sys.executable, "-m", "mmubusd.state.compactor", str(self._directory.path), str(segment))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            process = await asyncio.create_subprocess_exec(*program, env=environment)
            try:
                status = await process.wait()
            except asyncio.CancelledError:
                process.kill()
                await process.wait()
                raise
            if status == 0:
                await self._loop.run_in_executor(self._thread, self._keeper.install, segment)
                self._log.info("checkpoint", segment=segment)
            else:
                self._log.error("no checkpoint was made; the journal is kept", segment=segment, status=status)
        except OSError as error:
            self._log.error("no checkpoint was made; the journal is kept", segment=segment, because=str(error))
        finally:
            self._compaction = None

    async def close(self) -> None:
        """Keep what was noted, as far as there is room, and let go of the directory. Nothing may be noted any more."""
        self._core.note = None
        self._closing = True
        if not self.full:
            kept = asyncio.ensure_future(self.kept())
            waits: list[asyncio.Future[Any]] = [kept, self._alarm.broken]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            kept.cancel()
        if self._compaction is not None:
            self._compaction.cancel()
            await asyncio.gather(self._compaction, return_exceptions=True)
        self._thread.shutdown()
        self._keeper.close()
        self._directory.close()
