"""Who is registered where, and what each holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm.addr import PAGE_MASK, PAGE_SIZE, TASK_SIZE, MmId, Pfn
from mmubusd.mm.errno import MmError
from mmubusd.mm.memory import Memory
from mmubusd.mm.mm import Mm
from mmubusd.notify.chain import Chain, RmapChain
from mmubusd.notify.counters import Counters
from mmubusd.notify.dispatch import MM_OPS, RMAP_OPS, Plan, warnings
from mmubusd.notify.errors import LimitReached, RequestError
from mmubusd.notify.history import History, What
from mmubusd.notify.limits import Limits
from mmubusd.notify.notice import Op, RegistrationId
from mmubusd.notify.page_history import Taken
from mmubusd.notify.registration import Registration, Spec
from mmubusd.notify.round import Round
from mmubusd.notify.sanitizer import Breach, Sanitizer
from mmubusd.notify.session import Session
from mmubusd.notify.translation import Dropped, ExportTable, TranslationTable

Spans = Sequence[tuple[int, int]]
"""Half-open byte ranges."""


class Registry:
    """Lists, registrations and their tables.

    Attributes:
        chains: by address space, of those that have or had a notifier; rmap: the global list.
        registrations: by id. exiting: address spaces whose release has been raised.
        pages: what became of what they held.
    """

    def __init__(
        self, memory: Memory, limits: Limits, counters: Counters, history: History, sanitizer: Sanitizer
    ) -> None:
        self.sanitizer = sanitizer
        self.memory = memory
        self.limits = limits
        self.counters = counters
        self.history = history
        self.chains: dict[MmId, Chain] = {}
        self.rmap = RmapChain()
        self.registrations: dict[RegistrationId, Registration] = {}
        self.exiting: set[MmId] = set()
        self.pages = sanitizer.pages
        self._last_id = 0
        self._reporting: dict[MmId, int] = {}
        self._op_sets: dict[frozenset[Op], tuple[frozenset[Op], tuple[str, ...]]] = {}  # few, and shared by many
        self._reporting_all = 0

    # The lists.

    def register(self, session: Session, spec: Spec) -> Registration:
        """Raises: RequestError, LimitReached; nothing has changed then."""
        if len(session.registrations) >= self.limits.registrations_max:
            raise LimitReached("EMFILE", "registrations_max", self.limits.registrations_max)
        limits = self.limits
        if spec.ack_budget_s and not limits.ack_budget_min_s <= spec.ack_budget_s <= limits.ack_budget_max_s:
            raise RequestError(
                "EINVAL",
                f"an ack budget is {limits.ack_budget_min_s:g} to {limits.ack_budget_max_s:g} s",
                ack_budget_s=spec.ack_budget_s,
            )
        self._last_id += 1
        registration_id = RegistrationId(self._last_id)
        budget = spec.ack_budget_s or session.ack_budget_s
        if spec.mm:
            chain = self._chain(MmId(spec.mm))
            start, end = self._interval(spec)
            _check_ops(spec.ops, MM_OPS)
            if spec.ops not in self._op_sets:
                self._op_sets[spec.ops] = (spec.ops, warnings(spec.ops))
            ops, told = self._op_sets[spec.ops]
            registration = Registration(
                registration_id, session, spec, start=start, end=end, ack_budget_s=budget, table=TranslationTable(),
                warnings=told, as_of_seq=session.as_of_seq,
            )  # fmt: skip
            registration.ops = ops
            self.chains[chain.mm.id] = chain
            chain.add(registration)
            chain.mm.notified = True
        else:
            registration = Registration(
                registration_id, session, spec, start=0, end=0, ack_budget_s=budget, table=ExportTable(), warnings=(),
                as_of_seq=session.as_of_seq,
            )  # fmt: skip
            registration.ops = RMAP_OPS
            self.rmap.add(registration)
        self.registrations[registration_id] = registration
        session.registrations[registration_id] = registration
        if self.history.recording:
            self.history.note(
                What.REGISTERED, session=session.id, registration=registration_id, mm=spec.mm, start=registration.start,
                end=registration.end, text=" ".join(sorted(op.name.lower() for op in registration.ops)),
            )  # fmt: skip
        return registration

    def _chain(self, mm_id: MmId) -> Chain:
        try:
            mm = self.memory.mm(mm_id)
        except MmError as error:
            raise RequestError(error.errno, error.message, mm=mm_id) from error
        if mm_id in self.exiting or not mm.alive:
            raise RequestError("ESRCH", f"address space {mm_id} is exiting", mm=mm_id)
        chain = self.chains.get(mm_id)
        return Chain(mm) if chain is None else chain  # an empty one may still bar something

    def _interval(self, spec: Spec) -> tuple[int, int]:
        """Kernel: mmu_interval_notifier_insert() refuses an empty or overflowing one."""
        if spec.end == 0 and spec.start == 0:
            return 0, TASK_SIZE
        end = spec.end or TASK_SIZE
        if not 0 <= spec.start < end <= TASK_SIZE:
            raise RequestError(
                "EOVERFLOW" if end > TASK_SIZE else "EINVAL",
                f"[{spec.start:#x}, {end:#x}) is not an interval of an address space, which ends at {TASK_SIZE:#x}",
                start=spec.start,
                end=spec.end,
            )
        return spec.start & PAGE_MASK, (end + PAGE_SIZE - 1) & PAGE_MASK

    def remove(self, registration: Registration, because: str) -> None:
        """Take it off its list. What it held is void. Idempotent. Args: because: "it was unregistered", ..."""
        if not registration.alive:
            return
        registration.alive = False
        session = registration.session
        self.pages.end(registration, self.history.clock, because, self.withdraw(registration))
        del self.registrations[registration.id]
        del session.registrations[registration.id]
        if not registration.uncached:
            self._unlist(registration)

    def demote(self, registration: Registration) -> None:
        """Nobody waits for it, and it gets no translations, until it is promoted. What it held is void."""
        dropped = self.withdraw(registration)
        if dropped.pages:
            self.pages.take(
                Taken(
                    registration.id, 0, 1 << 64, "", 0, None, None, "it was demoted for being slow", dropped.entries,
                    dropped.generations,
                )
            )  # fmt: skip
        registration.uncached, registration.flushed_at = True, None
        self._unlist(registration)

    def promote(self, registration: Registration) -> None:
        """It has behaved well: back to its place on the list. Raises: RequestError ESRCH; nothing has changed then."""
        if not registration.mm:
            registration.uncached = False
            self.rmap.add(registration)
            return
        chain = self._chain(MmId(registration.mm))
        registration.uncached = False
        self.chains[chain.mm.id] = chain
        chain.add(registration)
        chain.mm.notified = True

    def _unlist(self, registration: Registration) -> None:
        if isinstance(registration.table, ExportTable):
            self.rmap.remove(registration)
            return
        chain = self.chains[MmId(registration.mm)]
        chain.remove(registration)
        if not len(chain):
            if not chain.rounds_open:
                del self.chains[chain.mm.id]
            self._refresh(chain.mm)

    def forget_chain_if_unused(self, chain: Chain) -> None:
        """Its last round has been closed."""
        if not chain.rounds_open and not len(chain) and self.chains.get(chain.mm.id) is chain:
            del self.chains[chain.mm.id]

    # mm.notified

    def report(self, mm: Mm | None, more: int) -> None:
        """An operation with a report, of mm or (None) of all address spaces, begins (1) or ends (-1)."""
        if mm is not None:
            self._reporting[mm.id] = self._reporting.get(mm.id, 0) + more
            if not self._reporting[mm.id]:
                del self._reporting[mm.id]
            self._refresh(mm)
            return
        self._reporting_all += more
        if self._reporting_all == (1 if more > 0 else 0):
            for one in self.memory.mms.values():
                self._refresh(one)

    def _refresh(self, mm: Mm) -> None:
        chain = self.chains.get(mm.id)
        mm.notified = bool((chain is not None and len(chain)) or self._reporting_all or self._reporting.get(mm.id))

    # What they hold.

    def void(self, registration: Registration, spans: Spans, round_: Round, acked_at: float | None) -> None:
        """The registration has let go of these ranges, or has no op for them (acked_at None)."""
        table = registration.table
        if not table.held:
            return
        assert isinstance(table, TranslationTable)
        generation = self.memory.frames.generation
        for start, end in spans:
            self._took(registration, start, end, table.drop(start, end, generation), round_, acked_at)

    def void_frames(self, registration: Registration, pfns: Iterable[Pfn], round_: Round, acked_at: float) -> None:
        """The registration has let go of these exported frames."""
        table = registration.table
        assert isinstance(table, ExportTable)
        generation = self.memory.frames.generation
        for pfn in pfns:
            dropped = table.drop(pfn, generation)
            if dropped.pages:
                self.memory.unexport(pfn, registration.id)
                self._took(registration, pfn, pfn + 1, dropped, round_, acked_at)

    def _took(
        self, registration: Registration, start: int, end: int, dropped: Dropped, round_: Round, acked_at: float | None
    ) -> None:
        if not dropped.pages:
            return
        registration.session.holding -= dropped.pages
        if acked_at is None:
            self.counters.slipped += dropped.pages
        else:
            self.counters.freed_before_ack += dropped.freed_before
        told = acked_at is not None
        self.pages.take(
            Taken(
                registration.id, start, end, round_.operation.label, round_.id, round_.opened_at if told else None,
                acked_at, "" if told else "this registration was not told: it has no op for that", dropped.entries,
                dropped.generations,
            )
        )  # fmt: skip
        if not told:
            self.sanitizer.page(
                Breach.SLIPPED, registration.session,
                f"{registration.name or 'a registration'} of {registration.session.name} was not told that "
                f"{round_.operation.label or 'an operation'} took {dropped.pages} pages which it held: "
                f"it has no op for {round_.kind.value}",
                registration.id, start, mm=registration.mm,
            )  # fmt: skip

    def withdraw(self, registration: Registration) -> Dropped:
        """All that it holds is void, and what it could write counts as written, since it will not say any more.

        Returns: what it held.
        """
        table = registration.table
        self._dirty(registration, table.writable(self.memory.frames.generation))
        if isinstance(table, ExportTable):
            pfns = table.pfns()
            dropped = table.drop_all(self.memory.frames.generation)
            for pfn in pfns:
                self.memory.unexport(Pfn(pfn), registration.id)
        else:
            dropped = table.drop_all(self.memory.frames.generation)
        registration.session.holding -= dropped.pages
        self.counters.freed_before_ack += dropped.freed_before
        if self.history.recording:
            self.history.note(What.WITHDRAWN, session=registration.session.id, registration=registration.id)
        return dropped

    def _dirty(self, registration: Registration, pfns: NDArray[np.int64]) -> None:
        """On the frames before anything waits no longer for this registration (rule DirtyIsNotLost)."""
        if not len(pfns):
            return
        self.memory.set_dirty(pfns)
        if self.history.recording:
            self.history.note(
                What.DIRTIED, session=registration.session.id, registration=registration.id, pfns=pfns.tolist()
            )

    def void_deaf(self, plan: Plan, spans: Spans, round_: Round) -> None:
        """Registrations that have no op for the notification lose what it names all the same."""
        for registration in plan.deaf:
            if self.history.recording:
                self.history.note(What.DEAF, round_id=round_.id, registration=registration.id, ranges=spans)
            self.void(registration, spans, round_, None)


def _check_ops(ops: frozenset[object], allowed: frozenset[object]) -> None:
    wrong = ops - allowed
    if wrong:
        names = ", ".join(sorted(str(getattr(op, "name", op)).lower() for op in wrong))
        raise RequestError("EINVAL", f"a notifier of an address space cannot implement {names}", ops=names)
    if not ops:
        raise RequestError("EINVAL", "a notifier implements at least one op", ops="")
