"""What an answer makes void: who has answered all that it was told in a round holds nothing of it any more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mmubusd.mm.addr import Pfn
from mmubusd.notify.clock import Clock
from mmubusd.notify.dispatch import Kind
from mmubusd.notify.history import What
from mmubusd.notify.notice import Notice, Op, Result, Targets
from mmubusd.notify.registration import Registration
from mmubusd.notify.registry import Registry
from mmubusd.notify.round import Round
from mmubusd.notify.session import Session
from mmubusd.notify.translation import ExportTable


class Voiding:
    """Takes what was answered for out of the tables of those who held it."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock
        self._history = registry.history

    def void(
        self, session: Session, round_: Round, notice: Notice, targets: Targets, result: Result | None, without: Targets
    ) -> None:
        """Args: without: registrations that have not answered, but are gone."""
        if round_.kind is Kind.RMAP:
            self._void_frames(round_, notice.pages, targets, result)
            return
        refused = session in round_.refusers
        if len(round_.plan.steps) > 1:  # several ops: all whom any of them went to
            targets = tuple(
                {one for _, steps in round_.plan.steps for who, several in steps if who is session for one in several}
            )
        for registration in self.registrations(targets):
            if registration.id in without:
                continue
            if self._history.recording:
                what = What.REFUSED if refused else What.ACKED
                text = Op.INVALIDATE_RANGE_START.name.lower() if round_.refusers.get(session) else ""
                self._history.note(
                    what, round_id=round_.id, session=session.id, registration=registration.id, text=text
                )
            if not refused:
                self._registry.void(registration, round_.spans, round_, self._clock.time)

    def _void_frames(self, round_: Round, pages: Sequence[int], targets: Targets, result: Result | None) -> None:
        refused: set[int] = set()
        if result is not None and (result.refused or result.refused_pages):
            refused = set(result.refused_pages or pages) & set(pages)
        for registration in self.registrations(targets):
            table = registration.table
            kept = {pfn for pfn in refused if isinstance(table, ExportTable) and table.get(pfn) is not None}
            round_.refused_pfns |= {Pfn(pfn) for pfn in kept}
            dropped = [Pfn(pfn) for pfn in pages if pfn not in kept]
            if self._history.recording:
                self._history.note(
                    What.ACKED,
                    round_id=round_.id,
                    session=registration.session.id,
                    registration=registration.id,
                    pfns=dropped,
                )
            self._registry.void_frames(registration, dropped, round_, self._clock.time)

    def registrations(self, targets: Iterable[int]) -> list[Registration]:
        """Those of them that there are."""
        registrations = self._registry.registrations
        return [registrations[target] for target in targets if target in registrations]  # type: ignore[index]
