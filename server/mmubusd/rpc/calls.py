"""One memory call, from its message to its result: what Call and the Operate stream are made of.

The calls themselves are in one table, `mmubusd.mm.syscall`; here is only what a message adds: its number for a call,
the limits of a message, and what it wants reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from mmu.v1 import address_space_pb2 as pb
from mmu.v1 import types_pb2

from mmubusd.mm.addr import PAGE_SIZE, MmId
from mmubusd.mm.errno import MmError
from mmubusd.mm.madvise import ADMINISTRATORS
from mmubusd.mm.mbind import MPOL_MF_MOVE_ALL
from mmubusd.mm.pagemap_scan import REGION
from mmubusd.notify import Draining, NotifyError, Operation, Session
from mmubusd.rpc.convert import mapping_message, notification_message
from mmubusd.rpc.driver import Driver
from mmubusd.rpc.errors import look_up
from mmubusd.rpc.identity import Principal
from mmubusd.rpc.roles import Role

__all__ = ["Calls", "label_of"]

NAMES = {
    pb.OP_MMAP: "mmap",
    pb.OP_MUNMAP: "munmap",
    pb.OP_MPROTECT: "mprotect",
    pb.OP_MREMAP: "mremap",
    pb.OP_MADVISE: "madvise",
    pb.OP_BRK: "brk",
    pb.OP_MSYNC: "msync",
    pb.OP_MLOCK: "mlock",
    pb.OP_MUNLOCK: "munlock",
    pb.OP_REMAP_FILE_PAGES: "remap_file_pages",
    pb.OP_FORK: "fork",
    pb.OP_EXIT: "exit",
    pb.OP_READ: "read",
    pb.OP_WRITE: "write",
    pb.OP_EXECUTE: "execute",
    pb.OP_LOAD: "load",
    pb.OP_STORE: "store",
    pb.OP_FSYNC: "fsync",
    pb.OP_FTRUNCATE: "ftruncate",
    pb.OP_PUNCH: "punch",
    pb.OP_MOVE_PAGES: "move_pages",
    pb.OP_CLEAR_REFS: "clear_refs",
    pb.OP_UFFD_WRITEPROTECT: "uffd_writeprotect",
    pb.OP_KSM_SCAN: "ksm_scan",
    pb.OP_UFFD_REGISTER: "uffd_register",
    pb.OP_UFFD_UNREGISTER: "uffd_unregister",
    pb.OP_UFFD_MOVE: "uffd_move",
    pb.OP_NUMA_SCAN: "numa_scan",
    pb.OP_PAGEMAP_SCAN: "pagemap_scan",
    pb.OP_UPROBE_REGISTER: "uprobe_register",
    pb.OP_UPROBE_UNREGISTER: "uprobe_unregister",
    pb.OP_IDLE_SCAN: "idle_scan",
    pb.OP_OFFLINE_PAGE: "offline_page",
    pb.OP_PROCESS_MADVISE: "process_madvise",
    pb.OP_MIGRATE_PAGES: "migrate_pages",
    pb.OP_MBIND: "mbind",
    pb.OP_SET_MEMPOLICY: "set_mempolicy",
    pb.OP_GET_MEMPOLICY: "get_mempolicy",
    pb.OP_SET_MEMPOLICY_HOME_NODE: "set_mempolicy_home_node",
    pb.OP_MLOCK2: "mlock2",
    pb.OP_MLOCKALL: "mlockall",
    pb.OP_MUNLOCKALL: "munlockall",
    pb.OP_MSEAL: "mseal",
    pb.OP_SETRLIMIT: "setrlimit",
    pb.OP_WP_SHARED: "wp_shared",
    pb.OP_CLEAN_RECORD: "clean_record",
    pb.OP_KHUGEPAGED_SCAN: "khugepaged_scan",
}
ON_FILES = frozenset({pb.OP_FSYNC, pb.OP_FTRUNCATE, pb.OP_PUNCH, pb.OP_WP_SHARED, pb.OP_CLEAN_RECORD})
ON_MACHINE = frozenset(
    {pb.OP_KSM_SCAN, pb.OP_KHUGEPAGED_SCAN, pb.OP_UPROBE_REGISTER, pb.OP_UPROBE_UNREGISTER, pb.OP_OFFLINE_PAGE}
)
LENGTH_AT = {
    pb.OP_READ: 1,
    pb.OP_WRITE: 1,
    pb.OP_EXECUTE: 1,
    pb.OP_MOVE_PAGES: 1,
    pb.OP_UFFD_WRITEPROTECT: 1,
    pb.OP_UFFD_MOVE: 2,
    pb.OP_NUMA_SCAN: 1,
    pb.OP_PAGEMAP_SCAN: 1,
    pb.OP_IDLE_SCAN: 1,
    pb.OP_MBIND: 1,
}
"""Calls whose work grows with the addresses that they name: which of their arguments is the length."""
MADVISE_ADVICE = 2
"""Which of madvise's arguments is the advice."""
MBIND_FLAGS = 4
"""Which of mbind's arguments are the flags."""
INT_MASK = (1 << 32) - 1
"""An int is the lower half of what a message carries."""
OFFSET_MAX = (1 << 63) - 1
"""Greater offsets are negative ones."""
MMAP_FILE = 4
"""Which of mmap's arguments is the file."""
MESSAGE_OVERHEAD = 1024
"""Bytes of a message that are not the data that it carries."""

Answer = Callable[[pb.CallResult], None]


LABELS = [f"%s({', '.join(['%#x'] * count)}) of mm %d" for count in range(8)]


def label_of(name: str, mm: int, args: Sequence[int]) -> str:
    """How an operation is named to people: `munmap(0x7f0000000000, 0x1000) of mm 3`."""
    if len(args) < len(LABELS):
        return LABELS[len(args)] % (name, *args, mm)
    return f"{name}({len(args)} arguments) of mm {mm}"


class Calls:
    """Starts calls on the driver's memory and puts their results into messages."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._bus = driver.bus
        self._memory = driver.memory
        self._authority = driver.authority
        self._data_max = driver.settings.message_bytes_max - MESSAGE_OVERHEAD

    def start(self, call: pb.Call, session: Session | None, who: Principal, answer: Answer) -> None:
        """Start a call; answer is called once with its result, at once when nobody has to be waited for."""
        allowed = self._authority.open
        try:
            if not allowed:
                answer = self.driver.quotas.operation(who, answer)
                self._check(who, call)
                allowed = True
            name = self._check_limits(who, call)
            label = label_of(name, call.mm, call.args)
            tracing = self.driver.tracing
            wrap = tracing.following(call.traceparent, label) if tracing is not None and call.traceparent else None
            report = call.HasField("report")
            self.driver.submit(
                self._bus.call,
                0 if call.op in ON_MACHINE else call.mm,
                name,
                tuple(call.args),
                data=call.data,
                wrap=wrap,
                label=label,
                session=session,
                within=call.within,
                report=report and call.report.notifications,
                then=lambda operation: answer(self._result(call, operation, report, who)),
            )
        except (MmError, NotifyError) as error:
            result = pb.CallResult(id=call.id, error=self.call_error(error))
            if allowed:
                self._report_window(call, result)
            answer(result)

    async def run(self, call: pb.Call, session: Session | None, who: Principal) -> pb.CallResult:
        """Start a call and wait for its result. Cancellation: the call goes on; only its result is lost."""
        ended: asyncio.Future[pb.CallResult] = asyncio.get_running_loop().create_future()
        self.start(call, session, who, lambda result: None if ended.done() else ended.set_result(result))
        return await ended

    def _check(self, who: Principal, call: pb.Call) -> None:
        """Raises: MmError when it is not for this caller, as `Authority.check_mm` says."""
        op, args = call.op, call.args
        if op in ON_MACHINE:
            self._authority.check_administers(who, NAMES[op])
        elif call.mm or op not in ON_FILES:
            self._authority.check_mm(who, Role.OWN, call.mm)
        if op == pb.OP_MADVISE and len(args) > MADVISE_ADVICE:
            self.check_advice(who, args[MADVISE_ADVICE] & INT_MASK)
        if op == pb.OP_MBIND and len(args) > MBIND_FLAGS and args[MBIND_FLAGS] & MPOL_MF_MOVE_ALL:
            self._authority.check_administers(who, "MPOL_MF_MOVE_ALL")
        if op in ON_FILES and args:
            self._authority.check_file(who, Role.ACCESS, args[0])
        if op == pb.OP_MMAP and len(args) > MMAP_FILE and args[MMAP_FILE]:
            self._authority.check_file(who, Role.ACCESS, args[MMAP_FILE])

    def check_advice(self, who: Principal, advice: int) -> None:
        """Raises: RequestError EPERM: advice that takes frames out of use is for administrators."""
        if advice in ADMINISTRATORS:
            self._authority.check_administers(who, f"advice {advice}")

    def _range_fits(self, name: str, length: int) -> None:
        """Raises: MmError E2BIG when a call may not touch so many bytes at a time."""
        limit = self.driver.settings.touch_pages_max * PAGE_SIZE
        if length > limit:
            raise MmError("E2BIG", f"{name} touches at most {limit} bytes at a time (touch_pages_max), not {length}")

    def data_fits(self, length: int) -> None:
        """Raises: MmError EMSGSIZE when so many bytes do not fit a message."""
        if length > self._data_max:
            raise MmError(
                "EMSGSIZE",
                f"length {length}: one message carries at most {self._data_max} bytes; ask for less at a time",
            )

    def file_fits(self, size: int) -> None:
        """Raises: MmError EFBIG when a file may not be so long."""
        limit = self.driver.settings.file_bytes_max
        if size > limit:
            raise MmError("EFBIG", f"a file of {size} bytes is too long; at most {limit} are allowed (file_bytes_max)")

    def may_create(self, who: Principal) -> None:
        """Raises: MmError EAGAIN when there are as many address spaces as the configuration allows, or who has."""
        limit = self.driver.settings.address_spaces_max
        if len(self._memory.mms) >= limit:
            raise MmError(
                "EAGAIN",
                f"there are {limit} address spaces, which is the limit (address_spaces_max); let one exit first",
            )
        self.driver.quotas.check_address_space(who)

    def _check_limits(self, who: Principal, call: pb.Call) -> str:
        """Returns: the call's name. Raises: MmError when there is no such call or address space, or it is too much."""
        op = call.op
        name = NAMES.get(op)
        if name is None:
            raise MmError("ENOSYS", f"op {op}: there is no such call; see enum Op")
        if op not in ON_MACHINE and (call.mm or op not in ON_FILES):
            self._memory.mm(MmId(call.mm))
        if op == pb.OP_LOAD and len(call.args) == 2:
            self.data_fits(call.args[1])
        at = LENGTH_AT.get(op)
        if at is not None and len(call.args) > at:
            self._range_fits(name, call.args[at])
            if op == pb.OP_PAGEMAP_SCAN:
                self.data_fits(call.args[at] // PAGE_SIZE * REGION.size)
        if op == pb.OP_FTRUNCATE and len(call.args) == 2 and call.args[1] <= OFFSET_MAX:
            self.file_fits(call.args[1])
        if op == pb.OP_FORK:
            self.may_create(who)
        return name

    def _result(self, call: pb.Call, operation: Operation[object], report: bool, who: Principal) -> pb.CallResult:
        error = operation.error
        if error is not None:
            result = pb.CallResult(id=call.id, error=self.call_error(error))
        else:
            value = operation.result
            if isinstance(value, bytes):
                result = pb.CallResult(id=call.id, ret=len(value), data=value)
            else:
                assert isinstance(value, int), f"{operation.label} returned {value!r}"
                result = pb.CallResult(id=call.id, ret=value)
                if call.op == pb.OP_FORK:
                    self._authority.mm_created(who, value)
                    self.driver.quotas.forked(who, value)
        if report:
            self._report(call, operation, result)
        return result

    def call_error(self, error: BaseException) -> types_pb2.CallError:
        """The error of a call as an answer; a broken invariant rings the alarm."""
        found = look_up(error, self.driver.alarm)
        errno = "ESHUTDOWN" if isinstance(error, Draining) else found.metadata.get("errno", found.reason)
        self.driver.tally.failed_calls[errno] += 1
        return types_pb2.CallError(errno=errno, message=found.message)

    def _report(self, call: pb.Call, operation: Operation[object], result: pb.CallResult) -> None:
        if call.report.notifications:
            result.notifications.extend(map(notification_message, operation.reported))
        self._report_window(call, result)

    def _report_window(self, call: pb.Call, result: pb.CallResult) -> None:
        wanted = call.report
        mm = self._memory.mms.get(MmId(call.mm))
        if not wanted.window_end or mm is None:
            return
        result.mappings.extend(
            mapping_message(mm, mapping)
            for mapping in mm.mappings()
            if mapping.start < wanted.window_end and wanted.window_start < mapping.end
        )
        for first, end in mm.present(wanted.window_start, wanted.window_end):
            result.present.extend((first, end))
        for first, end in mm.swapped(wanted.window_start, wanted.window_end):
            result.swapped.extend((first, end))
        for first, end in mm.huge(wanted.window_start, wanted.window_end):
            result.huge.extend((first, end))
        if mm.soft_dirty_tracked:
            for first, end in mm.soft_dirty(wanted.window_start, wanted.window_end):
                result.soft_dirty.extend((first, end))
