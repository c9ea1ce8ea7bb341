"""Looking at the server: address spaces as /proc shows them, sessions, rounds, statistics. Nothing here changes it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from mmu.v1 import inspection_pb2 as pb
from numpy.typing import NDArray

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE, MmId
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import ANON, EXTERNAL, PINNED
from mmubusd.mm.frame_bytes import RESERVED
from mmubusd.mm.mm import Mm
from mmubusd.mm.pgtable import DIRTY, KIND_MASK, PFN_SHIFT, PRESENT, SWAP, WRITE
from mmubusd.notify import Registration, Session, State
from mmubusd.rpc.convert import mapping_message
from mmubusd.rpc.driver import Driver
from mmubusd.rpc.explain import Explanations, registration_message, round_message
from mmubusd.rpc.methods import Context
from mmubusd.rpc.roles import Role

__all__ = ["InspectionService"]

RUN_BYTES = 64
"""Bytes that a PageRun may take."""
US = 1e6


class InspectionService(Explanations):
    """Implements mmu.v1.InspectionService."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._memory = driver.memory
        try:
            self._version = version("mmubus")
        except PackageNotFoundError:
            self._version = "not installed"

    async def list_address_spaces(
        self, request: pb.ListAddressSpacesRequest, context: Context
    ) -> pb.ListAddressSpacesResponse:
        who = self._authority.caller(context)
        registrations: dict[int, int] = {}
        for session in self._bus.sessions.values():
            for registration in session.registrations.values():
                registrations[registration.mm] = registrations.get(registration.mm, 0) + 1
        rounds: dict[int, int] = {}
        for open_round in self._bus.rounds.open.values():
            rounds[open_round.mm] = rounds.get(open_round.mm, 0) + 1
        return pb.ListAddressSpacesResponse(
            address_spaces=[
                _address_space(mm, registrations.get(mm.id, 0), rounds.get(mm.id, 0), self._authority.mm_owner(mm.id))
                for mm in self._memory.mms.values()
                if self._sees(who, mm.id)
            ]
        )

    async def show_maps(self, request: pb.ShowMapsRequest, context: Context) -> pb.ShowMapsResponse:
        self._authority.check_mm(self._authority.caller(context), Role.OBSERVE, request.mm)
        mm = self._memory.mm(MmId(request.mm))
        return pb.ShowMapsResponse(mappings=[mapping_message(mm, mapping) for mapping in mm.mappings()])

    async def show_pagemap(self, request: pb.ShowPagemapRequest, context: Context) -> pb.ShowPagemapResponse:
        self._authority.check_mm(self._authority.caller(context), Role.OBSERVE, request.mm)
        mm = self._memory.mm(MmId(request.mm))
        end = request.end or TASK_SIZE
        if request.start % PAGE_SIZE or end % PAGE_SIZE:
            raise MmError("EINVAL", f"[{request.start:#x}, {end:#x}): start and end are multiples of {PAGE_SIZE}")
        if not request.start < end <= TASK_SIZE:
            raise MmError("EINVAL", f"[{request.start:#x}, {end:#x}) is empty, backwards or beyond {TASK_SIZE:#x}")
        runs_max = self._driver.settings.message_bytes_max // RUN_BYTES
        response = pb.ShowPagemapResponse()
        for first, ptes in mm.pgtable.spans(request.start >> PAGE_SHIFT, end >> PAGE_SHIFT):
            self._add_runs(response, first, ptes)
            if request.swapped:
                _add_swapped(response, first, ptes)
            if len(response.runs) > runs_max:
                raise MmError("E2BIG", f"more than {runs_max} runs; ask for a smaller range")
        if request.swapped:
            response.runs.sort(key=lambda run: run.start)
        return response

    def _add_runs(self, response: pb.ShowPagemapResponse, first: int, ptes: NDArray[np.uint64]) -> None:
        """Add the runs of one leaf table: consecutive present pages with consecutive frames and equal marks."""
        present = np.flatnonzero(ptes & np.uint64(PRESENT))
        if not len(present):
            return
        entries = ptes[present]
        pfns = (entries >> np.uint64(PFN_SHIFT)).astype(np.int64)
        marks = entries & np.uint64(WRITE | DIRTY)
        frames = self._memory.frames
        flags = frames.flags[pfns] & (ANON | EXTERNAL | PINNED | RESERVED)
        once = frames.mapcount[pfns] == 1
        same = (
            (np.diff(present) == 1)
            & ((np.diff(pfns) == 1) | ((flags[1:] & RESERVED) != 0))
            & (marks[1:] == marks[:-1])
            & (flags[1:] == flags[:-1])
            & (once[1:] == once[:-1])
        )
        starts = np.concatenate(([0], np.flatnonzero(~same) + 1))
        ends = np.concatenate((starts[1:], [len(present)]))
        for a, b in zip(starts.tolist(), ends.tolist(), strict=True):
            zero = bool(flags[a] & RESERVED)
            response.runs.add(
                start=(first + int(present[a])) << PAGE_SHIFT,
                end=(first + int(present[b - 1]) + 1) << PAGE_SHIFT,
                pfn=int(pfns[a]),
                contiguous=not zero and b - a > 1,
                writable=bool(marks[a] & np.uint64(WRITE)),
                dirty=bool(marks[a] & np.uint64(DIRTY)),
                anonymous=bool(flags[a] & ANON),
                zero=zero,
                exclusive=bool(once[a]) and not zero,
                exported=bool(flags[a] & EXTERNAL),
                pinned=bool(flags[a] & PINNED),
            )

    async def list_sessions(self, request: pb.ListSessionsRequest, context: Context) -> pb.ListSessionsResponse:
        """A caller sees its own sessions whole, and of others what they have on address spaces that it may see."""
        who = self._authority.caller(context)
        found = []
        for session in self._bus.sessions.values():
            if self._authority.administers(who) or self._authority.may_use(who, session):
                found.append(_session(session, list(session.registrations.values())))
                continue
            seen = [each for each in session.registrations.values() if self._sees(who, each.mm)]
            if seen:
                found.append(_session(session, seen))
        return pb.ListSessionsResponse(sessions=found)

    async def list_rounds(self, request: pb.ListRoundsRequest, context: Context) -> pb.ListRoundsResponse:
        now = self._bus.clock(self._driver.now())
        who = self._authority.caller(context)
        rounds = [round_message(each, now, True) for each in self._bus.rounds.open.values() if self._sees(who, each.mm)]
        if request.ended:
            ended = [each for each in self._bus.rounds.past if self._sees(who, each.mm)][-request.ended :]
            rounds += [round_message(each, now, False) for each in reversed(ended)]
        return pb.ListRoundsResponse(rounds=rounds)

    async def list_memory_groups(
        self, request: pb.ListMemoryGroupsRequest, context: Context
    ) -> pb.ListMemoryGroupsResponse:
        who = self._authority.caller(context)
        everyone = self._authority.administers(who)
        return pb.ListMemoryGroupsResponse(
            groups=[
                pb.MemoryGroup(
                    name=one.name, frames=one.charged, frames_max=one.limit, swap=one.swapped,
                    swap_max=one.swap_limit, limit_hits=one.limit_hits, ooms=one.ooms,
                )
                for one in self._memory.memcgs.values()
                if everyone or one.name == who.name
            ]
        )  # fmt: skip

    async def get_statistics(self, request: pb.GetStatisticsRequest, context: Context) -> pb.GetStatisticsResponse:
        self._authority.check_administers(self._authority.caller(context), "the statistics of the whole server")
        frames = self._memory.frames
        bus, counted = self._bus, self._bus.counters
        latency = bus.ack_latency()
        standing = [session for session in bus.sessions.values() if session.state in (State.LIVE, State.LOST)]
        return pb.GetStatisticsResponse(
            uptime_s=self._driver.now() - self._driver.started_at,
            epoch=bus.epoch,
            version=self._version,
            operations=counted.operations,
            rounds=counted.rounds,
            rounds_open=len(bus.rounds.open),
            notices=counted.notices,
            acks=counted.acks,
            late=counted.late,
            fenced=counted.fenced,
            frames=frames.frames_nr,
            frames_free=frames.free_nr,
            frames_used=frames.frames_nr - frames.free_nr - frames.quarantine_nr - frames.hwpoison_nr,
            frames_quarantined=frames.quarantine_nr,
            frames_failed=frames.hwpoison_nr,
            frames_exported=len(frames.exports),
            frames_pinned=len(frames.pins),
            stale_refused=counted.stale_refused,
            freed_before_ack=counted.freed_before_ack,
            ack_us_p50=latency.quantile(0.5) * US,
            ack_us_p99=latency.quantile(0.99) * US,
            sessions=len(standing),
            registrations=sum(len(session.registrations) for session in standing),
            address_spaces=len(self._memory.mms),
            swap=self._memory.swap.slots_nr,
            swap_used=self._memory.swap.used_nr,
        )


def _add_swapped(response: pb.ShowPagemapResponse, first: int, ptes: NDArray[np.uint64]) -> None:
    """Add the runs of one leaf table's pages in swap: consecutive pages, wherever their slots are."""
    where = np.flatnonzero(ptes & np.uint64(KIND_MASK | PRESENT) == SWAP)
    if not len(where):
        return
    starts = np.concatenate(([0], np.flatnonzero(np.diff(where) != 1) + 1))
    ends = np.concatenate((starts[1:], [len(where)]))
    for a, b in zip(where[starts].tolist(), where[ends - 1].tolist(), strict=True):
        response.runs.add(
            start=(first + a) << PAGE_SHIFT,
            end=(first + b + 1) << PAGE_SHIFT,
            pfn=int(ptes[a]) >> PFN_SHIFT,
            swapped=True,
        )


def _address_space(mm: Mm, registrations: int, rounds: int, owner: str) -> pb.AddressSpace:
    mappings = mm.mappings()
    return pb.AddressSpace(
        mm=mm.id,
        name=mm.name,
        parent=mm.parent or 0,
        mappings=len(mappings),
        total_pages=sum(mapping.end - mapping.start for mapping in mappings) >> PAGE_SHIFT,
        resident_pages=mm.resident_pages(),
        registrations=registrations,
        open_rounds=rounds,
        owner=owner,
    )


def _session(session: Session, registrations: Sequence[Registration]) -> pb.Session:
    return pb.Session(
        session=session.id,
        name=session.name,
        state=session.state.value,
        registrations=[registration_message(each) for each in registrations],
        notices=session.notices_nr,
        acknowledged=session.acknowledged_nr,
        waiting=session.waiting_nr,
        late=session.late_nr,
        ack_us_p50=session.ack_latency.quantile(0.5) * US,
        ack_us_p99=session.ack_latency.quantile(0.99) * US,
        harm_s=session.harm_s,
        fenced_because=session.fenced.message if session.fenced is not None else "",
    )
