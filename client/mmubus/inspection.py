"""Looking at the server: what /proc would show, who is registered, who waits for whom. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmu.v1 import address_space_pb2, inspection_pb2, types_pb2

from mmubus.channel import unary

if TYPE_CHECKING:
    from mmubus.connection import Stubs

__all__ = ["InitialMapping", "Inspection", "Mapping", "PageRun"]


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping, as a line of /proc/PID/maps. Bytes, half-open; flags as in smaps."""

    start: int
    end: int
    protection: str
    offset: int
    file: int
    name: str
    resident: int
    flags: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.start:x}-{self.end:x} {self.protection} {self.offset:08x} {self.file} {self.name}".rstrip()


@dataclass(frozen=True, slots=True)
class PageRun:
    """Pages that are alike and adjacent; pfn is the first one's, the others follow when contiguous.

    Present ones, unless swapped is set: those are in swap, and pfn is the first one's slot.
    """

    start: int
    end: int
    pfn: int
    contiguous: bool
    writable: bool
    dirty: bool
    anonymous: bool
    zero: bool
    exclusive: bool
    exported: bool
    pinned: bool
    swapped: bool = False


def mapping_of(mapping: types_pb2.Mapping) -> Mapping:
    """The value of a message."""
    return Mapping(
        mapping.start,
        mapping.end,
        mapping.protection,
        mapping.offset,
        mapping.file,
        mapping.name,
        mapping.resident,
        tuple(mapping.flags),
    )


class Inspection:
    """The inspection calls. Some answer with the contract's own messages; inspection.proto documents them."""

    def __init__(self, stubs: Stubs) -> None:
        self._stub = stubs.inspection
        self._file_stub = stubs.file

    async def address_spaces(self) -> list[inspection_pb2.AddressSpace]:
        """Every address space."""
        request = inspection_pb2.ListAddressSpacesRequest()
        return list((await unary(self._stub.ListAddressSpaces(request))).address_spaces)

    async def maps(self, mm: int) -> list[Mapping]:
        """The mappings of one, ascending. Raises: MmError, ESRCH when there is none of that number."""
        response = await unary(self._stub.ShowMaps(inspection_pb2.ShowMapsRequest(mm=mm)))
        return [mapping_of(mapping) for mapping in response.mappings]

    async def pagemap(self, mm: int, start: int = 0, end: int = 0, *, swapped: bool = False) -> list[PageRun]:
        """The present pages of a range; end 0: to the end of the address space. Raises: MmError.

        Args: swapped: tell of those in swap, too.
        """
        request = inspection_pb2.ShowPagemapRequest(mm=mm, start=start, end=end, swapped=swapped)
        response = await unary(self._stub.ShowPagemap(request))
        return [
            PageRun(
                run.start,
                run.end,
                run.pfn,
                run.contiguous,
                run.writable,
                run.dirty,
                run.anonymous,
                run.zero,
                run.exclusive,
                run.exported,
                run.pinned,
                run.swapped,
            )
            for run in response.runs
        ]

    async def sessions(self) -> list[inspection_pb2.Session]:
        """Every session with its registrations."""
        return list((await unary(self._stub.ListSessions(inspection_pb2.ListSessionsRequest()))).sessions)

    async def rounds(self, ended: int = 0) -> list[inspection_pb2.Round]:
        """Open rounds, oldest first, then that many ended ones, newest first."""
        return list((await unary(self._stub.ListRounds(inspection_pb2.ListRoundsRequest(ended=ended)))).rounds)

    async def explain(self, round: int) -> inspection_pb2.ExplainRoundResponse:
        """A round and everyone whom it concerned, slowest first. Raises: CallFailed when it is not remembered."""
        return await unary(self._stub.ExplainRound(inspection_pb2.ExplainRoundRequest(round=round)))

    async def explain_page(self, mm: int, address: int) -> inspection_pb2.ExplainPageResponse:
        """What became of one page with each registration that could hold it. Raises: MmError."""
        request = inspection_pb2.ExplainPageRequest(mm=mm, address=address)
        return await unary(self._stub.ExplainPage(request))

    async def holders(self, mm: int, start: int = 0, end: int = 0, *, runs_max: int = 0) -> list[inspection_pb2.Holder]:
        """Who holds translations of a range, or exports its frames; end 0: to the end. Raises: MmError.

        Args: runs_max: tell where they are, too: at most so many runs of pages of each.
        """
        request = inspection_pb2.ListHoldersRequest(mm=mm, start=start, end=end, runs_max=runs_max)
        return list((await unary(self._stub.ListHolders(request))).holders)

    async def violations(self, count: int = 0, *, check_frames: int = 0) -> inspection_pb2.ListViolationsResponse:
        """What drivers did that no driver may do, newest first.

        Args: count: 0: all that are remembered; check_frames: look for damage in so many free frames first.
        """
        request = inspection_pb2.ListViolationsRequest(count=count, check_frames=check_frames)
        return await unary(self._stub.ListViolations(request))

    async def dry_run(self, mm: int, start: int, end: int) -> inspection_pb2.DryRunResponse:
        """Who would have to answer if the range were unmapped, and what they cost lately. Raises: MmError."""
        return await unary(self._stub.DryRun(inspection_pb2.DryRunRequest(mm=mm, start=start, end=end)))

    async def memory_groups(self) -> list[inspection_pb2.MemoryGroup]:
        """What each principal has of the server's memory; who is no administrator sees only its own."""
        return list((await unary(self._stub.ListMemoryGroups(inspection_pb2.ListMemoryGroupsRequest()))).groups)

    async def statistics(self) -> inspection_pb2.GetStatisticsResponse:
        """Counters since the start, gauges now."""
        return await unary(self._stub.GetStatistics(inspection_pb2.GetStatisticsRequest()))

    async def files(self) -> list[address_space_pb2.File]:
        """Every file with its size and what of it is cached."""
        return list((await unary(self._file_stub.ListFiles(address_space_pb2.ListFilesRequest()))).files)


@dataclass(frozen=True, slots=True)
class InitialMapping:
    """A mapping with its resident pages, for an address space that begins in the middle of a program's life.

    Attributes:
        mapping: where and what. resident: triples (first page, end page, kind), counted from the mapping's start;
        kind 0: of the file, 1: anonymous,
            2: anonymous and shared with another process.
    """

    mapping: Mapping
    resident: Sequence[tuple[int, int, int]] = ()


def initial_of(initial: InitialMapping) -> address_space_pb2.InitialMapping:
    """The message of a value."""
    mapping = initial.mapping
    return address_space_pb2.InitialMapping(
        mapping=types_pb2.Mapping(
            start=mapping.start,
            end=mapping.end,
            protection=mapping.protection,
            offset=mapping.offset,
            file=mapping.file,
            name=mapping.name,
            resident=mapping.resident,
            flags=mapping.flags,
        ),
        resident=[number for triple in initial.resident for number in triple],
    )
