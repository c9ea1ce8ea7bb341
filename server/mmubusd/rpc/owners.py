"""Whose a thing is: who made it. Kept apart from the things, which know nobody who calls."""

from __future__ import annotations

from collections.abc import Container

from mmubusd.rpc.identity import Principal

__all__ = ["Owners"]


class Owners:
    """Owners of the things of one kind (address spaces, files, sessions) by number.

    Numbers are never given twice. What is gone is forgotten when there is more of it than of what stands.
    """

    def __init__(self) -> None:
        self._owners: dict[int, Principal] = {}
        self._things: dict[str, set[int]] = {}
        self._prune_at = 64

    def add(self, who: Principal, thing: int, standing: Container[int]) -> None:
        """Who made it owns it. Args: standing: what there is now."""
        self._owners[thing] = who
        self._things.setdefault(who.name, set()).add(thing)
        if len(self._owners) > self._prune_at:
            for gone in [one for one in self._owners if one not in standing]:
                self._forget(gone)
            self._prune_at = 2 * len(self._owners) + 64

    def of(self, thing: int) -> Principal | None:
        """The owner; None when nobody is known."""
        return self._owners.get(thing)

    def things(self, name: str, standing: Container[int]) -> set[int]:
        """What stands of a principal's things."""
        mine = self._things.get(name, set())
        for gone in [thing for thing in mine if thing not in standing]:
            self._forget(gone)
        return mine

    def count_below(self, name: str, limit: int, standing: Container[int]) -> bool:
        """Whether a principal has fewer than so many; what is gone is looked for only when it seems to have as many."""
        return len(self._things.get(name, ())) < limit or len(self.things(name, standing)) < limit

    def _forget(self, thing: int) -> None:
        name = self._owners.pop(thing).name
        mine = self._things[name]
        mine.discard(thing)
        if not mine:
            del self._things[name]
