"""A seeded workload on a core: programs, drivers that answer late or never, time that passes; all through inputs."""

from __future__ import annotations

import mmap
from random import Random
from typing import Any

import numpy as np
from mmubusd.mm.errno import MmError
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.memory import Memory
from mmubusd.notify import Ack, FencedError, Hello, Limits, NotifyError, Op, Result, Session, Spec, State
from mmubusd.state import ObservedFrames, RecordedCore

PAGE = 4096
AT = 0x40_0000
PAGES = 32
FRAMES = 1024
MEMCGS = ("", "alice", "mallory")
"""Who pays for memory; nobody counts that of the first."""
SEED = frozenset({Op.RELEASE, Op.AGE_PAGE, Op.INVALIDATE_PAGE, Op.INVALIDATE_RANGE, Op.INVALIDATE_ALL})
MAINLINE = frozenset({Op.RELEASE, Op.INVALIDATE_RANGE_START, Op.INVALIDATE_RANGE_END, Op.CLEAR_FLUSH_YOUNG})


def store(frames_nr: int) -> memoryview:
    """Zero-filled bytes of so many frames."""
    return memoryview(mmap.mmap(-1, frames_nr * PAGE))


def make_core(seed: int = 0) -> RecordedCore:
    """A machine with little memory, a swap file, and huge pages for some seeds."""
    thp = Thp.ALWAYS if seed % 3 == 2 else Thp.NEVER
    memory = Memory(
        frames_nr=FRAMES, store=store(FRAMES), swap_slots_nr=64, nodes_nr=1, thp=thp, frame_table=ObservedFrames
    )
    return RecordedCore(memory, Limits(), 7)


class Client:
    """A driver: its session and what it holds, (registration, page): (pfn, may write)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.session: Session | None = None
        self.lost = False
        self.held: dict[tuple[int, int], tuple[int, bool]] = {}
        self.handled = 0
        self.pins: list[int] = []


class Workload:
    """Draws one input after another.

    Args: core: of `make_core`; seed: decides everything.
    """

    def __init__(self, core: RecordedCore, seed: int) -> None:
        self.core = core
        self.random = Random(seed)
        self.now = 100.0
        self.clients = [Client(f"client {n}") for n in range(3)]
        self.tokens = 0
        for memcg in MEMCGS[1:]:
            core.limit_memcg(memcg, 40, 16)
        shared = core.create_file("shared", "shm", PAGES, False, MEMCGS[1])
        self.files = [shared, core.create_file("data", "disk", PAGES, True)]
        for n in range(2):
            self._begin(f"program {n}")

    def _begin(self, name: str) -> None:
        mm = self.core.create_mm(name, memcg=self.random.choice(MEMCGS))
        for first, flags, file in ((0, 0x32, 0), (11, 0x11, self.files[0]), (22, 0x11, self.files[1])):
            self._call(mm.id, "mmap", AT + first * PAGE, 10 * PAGE, 3, flags, file, first * PAGE if file else 0)
        self._call(mm.id, "mmap", 0x4000_0000, 4 << 20, 3, 0x32, 0, 0)
        self._call(mm.id, "madvise", AT, 10 * PAGE, 12)

    def _call(self, mm: int, op: str, *args: int, data: bytes = b"") -> None:
        try:
            self.core.call(mm, op, args, self.now, data=data, label=f"{op} of {mm}")
        except (MmError, NotifyError):
            return

    def _mm(self) -> int:
        alive = list(self.core.memory.mms)
        if not alive:
            self._begin("again")
            alive = list(self.core.memory.mms)
        return int(self.random.choice(alive))

    def step(self) -> None:
        """One input, or a few that belong together."""
        self.now += self.random.choice((0.0, 0.001, 0.01, 0.1, 0.4))
        deadline = self.core.next_deadline()
        if deadline is not None and deadline <= self.now:
            self.core.expire(self.now)
        what = self.random.choice((self._program,) * 4 + (self._device,) * 3 + (self._answer,) * 5 + (self._life,))
        what()
        self.core.finished.clear()
        self.core.drain_ready()

    # Programs.

    def _program(self) -> None:
        r, mm = self.random, self._mm()
        at, length = AT + r.randrange(PAGES) * PAGE, r.choice((1, 1, 2, 4)) * PAGE
        file = r.choice(self.files)
        match r.randrange(19):
            case 17:
                self.core.limit_memcg(r.choice(MEMCGS[1:]), r.randrange(20, 60), r.randrange(32))
            case 18:
                self.core.join_memcg(mm, r.choice(MEMCGS))
            case 0 | 1 | 2:
                self._call(mm, "store", at + r.randrange(64), data=bytes([r.randrange(1, 9)]) * r.choice((8, length)))
            case 3:
                self._call(mm, "load", at, length)
            case 4:
                self._call(mm, "munmap", at, length)
            case 5:
                self._call(mm, "mmap", at, length, 3, r.choice((0x32, 0x31)), 0, 0)
            case 6:
                self._call(mm, "mprotect", at, length, r.choice((1, 3)))
            case 7 | 8:
                self._call(mm, "madvise", at, length, r.choice((4, 8, 21, 12)))
            case 9:
                self._call(mm, "mremap", at, length, length, 3, AT + (PAGES + r.randrange(8)) * PAGE)
            case 10 if len(self.core.memory.mms) < 5:
                self._call(mm, "fork")
            case 11 if len(self.core.memory.mms) > 2:
                self._call(mm, "exit")
            case 12:
                self._call(0, r.choice(("fsync", "ksm_scan")), file)
                self._call(0, "ksm_scan")
                self._call(0, "khugepaged_scan", 0)
            case 13:
                self._call(0, "ftruncate", file, r.randrange(8, PAGES + 1) * PAGE)
            case 14:
                self._call(0, "punch", file, r.randrange(PAGES) * PAGE, 2 * PAGE)
            case 15:
                self._call(0, "write_file", file, r.randrange(PAGES * PAGE), data=b"written")
            case _:
                self._call(mm, "write", 0x4000_0000 + r.randrange(512) * PAGE, r.choice((1, 8)) * PAGE)

    # Drivers.

    def _live(self) -> list[Client]:
        return [one for one in self.clients if one.session is not None and one.session.state is State.LIVE]

    def _device(self) -> None:
        clients = self._live()
        if not clients:
            self._attach(self.random.choice(self.clients))
            return
        client, r = self.random.choice(clients), self.random
        session = client.session
        assert session is not None
        try:
            if not session.registrations or r.random() < 0.1:
                mm = 0 if r.random() < 0.2 else self._mm()
                ops = r.choice((SEED, MAINLINE)) if mm else frozenset({Op.RMAP_INVALIDATE_PAGE})
                self.core.register(session, Spec(mm, ops, only_held=r.random() < 0.5), self.now)
            else:
                self._request(client, session, r.choice(list(session.registrations.values())))
        except (MmError, NotifyError):
            return

    def _request(self, client: Client, session: Session, registration: Any) -> None:
        r, core, now = self.random, self.core, self.now
        at, length = AT + r.randrange(PAGES) * PAGE, r.choice((1, 2)) * PAGE
        if not registration.mm:
            core.export(session, registration.id, self._mm(), at, at + length, True, now)
            return
        match r.randrange(9):
            case 0 | 1 | 2 | 3:
                write = r.random() < 0.6
                core.fault(session, registration.id, at, at + length, write, now)
                self._granted(client, registration.id, write)
            case 4:
                self._write_through(client)
            case 5:
                for (number, page), (pfn, may_write) in list(client.held.items())[:1]:
                    if may_write:
                        generation = int(core.memory.frames.generation[pfn])
                        core.dma_write(session, number, page + 8, b"dma", [pfn], [generation], now)
            case 6:
                core.pin(session, registration.id, at, at + PAGE, True, now)
                done = core.finished[-1] if core.finished else None
                if done is not None and done.error is None and hasattr(done.result, "pin"):
                    client.pins.append(done.result.pin)
            case 7 if client.pins:
                core.unpin(session, client.pins.pop(), True, now)
            case 8:
                core.migrate(session, registration.id, at, at + length, r.random() < 0.5, now)
            case _:
                core.unregister(session, registration.id, now)

    def _granted(self, client: Client, registration: int, write: bool) -> None:
        done = self.core.finished[-1] if self.core.finished else None
        if done is None or done.error is not None or getattr(done.result, "translations", None) is None:
            return
        given = done.result.translations
        for at, pfn in enumerate(given.pfns.tolist()):
            if pfn < FRAMES:
                client.held[registration, given.start + at * PAGE] = (pfn, bool(given.rights[at] & 2))

    def _write_through(self, client: Client) -> None:
        """Through shared memory: no input tells."""
        assert client.session is not None
        tables = {number: one.table for number, one in client.session.registrations.items()}
        writable = sorted(
            pfn
            for (number, page), (pfn, may_write) in client.held.items()
            if may_write and number in tables and (held := tables[number].get(page)) is not None and held.pfn == pfn
        )
        if writable:
            self.core.frames.data[self.random.choice(writable), : self.random.choice((4, PAGE))] = (
                self.random.randrange(9)
            )

    def _answer(self) -> None:
        """A driver reads, and perhaps answers; whatever a notice names it has dropped when it does."""
        clients = self._live()
        if not clients:
            return
        client, r = self.random.choice(clients), self.random
        session = client.session
        assert session is not None
        self.core.take_batch(session)
        last = session.as_of_seq
        if r.random() < 0.75 and last > client.handled:
            through = r.randint(client.handled + 1, last)
            dirty = self._drop(client, session, through)
            results = tuple(Result(seq, dirty=pages) for seq, pages in dirty)
            client.handled = through
            self.core.acknowledge(session, Ack(through, results=results), self.now)
        else:
            self.core.heartbeat(session, self.now)

    def _drop(self, client: Client, session: Session, through: int) -> list[tuple[int, tuple[int, ...]]]:
        """Handle notices up to one. Returns: which pages were written to, by notice."""
        dirty = []
        for seq in range(client.handled + 1, through + 1):
            targets = session.outbox.targets_of(seq)
            if not targets:
                continue
            notice = session.outbox.sent(seq)
            gone = [
                key
                for key, (pfn, _) in client.held.items()
                if key[0] in targets
                and (notice.start <= key[1] < notice.end or notice.op in (Op.RELEASE, Op.FLUSH_ALL))
            ]
            written = tuple(
                page for number, page in gone if client.held[number, page][1] and self.random.random() < 0.5
            )
            for key in gone:
                del client.held[key]
            if written and notice.op in (Op.INVALIDATE_RANGE, Op.INVALIDATE_RANGE_START, Op.INVALIDATE_PAGE):
                dirty.append((seq, written))
        return dirty

    # Sessions' lives.

    def _attach(self, client: Client) -> None:
        core, session = self.core, client.session
        token = session.token if session is not None and session.state is State.LOST else ""
        try:
            if token:
                core.open_session(Hello(client.name, token=token, handled_through=client.handled), self.now, token)
                return
            self.tokens += 1
            client.held.clear()
            client.pins.clear()
            client.handled = 0
            client.session = core.open_session(
                Hello(client.name, features=frozenset({"within"}), window=self.random.random() < 0.5),
                self.now,
                f"token {self.tokens}",
            )
        except (FencedError, NotifyError):
            client.session = None

    def _life(self) -> None:
        client = self.random.choice(self.clients)
        session = client.session
        if session is None or session.state is not State.LIVE:
            self._attach(client)
            return
        match self.random.randrange(6):
            case 0 | 1 | 2:
                self.core.session_lost(session, self.now)
            case 3:
                self.core.leave(session, self.now)
                client.session = None
            case 4:
                self.core.fence(session, self.now, "for the test")
            case _:
                self.core.flush(session, self.now)


def unseen(core: RecordedCore) -> frozenset[int]:
    """Frames that were written to from outside, and that nobody has looked at since."""
    frames = core.frames
    return frozenset(
        pfn
        for pfn, (generation, known) in frames._shared.items()
        if int(frames.generation[pfn]) == generation and frames._hash(pfn) != known
    )


def bytes_of(core: RecordedCore, but: frozenset[int]) -> bytes:
    """What all written frames hold, but for some."""
    from mmubusd.mm.frame_bytes import WRITTEN

    frames = core.frames
    written = [pfn for pfn in np.flatnonzero(frames.flags & np.uint32(WRITTEN)).tolist() if pfn not in but]
    return np.array(written).tobytes() + frames.data[written].tobytes()
