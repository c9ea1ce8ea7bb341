"""Every scenario is judged: whatever a test is about, the rules of the design must hold in it."""

from collections.abc import Iterator

import pytest
from notify.transcript import World, assert_rules


@pytest.fixture(autouse=True)
def rules_hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    worlds: list[World] = []
    begin = World.__init__

    def remember(self: World, *args: object, **options: object) -> None:
        begin(self, *args, **options)  # type: ignore[arg-type]
        worlds.append(self)

    monkeypatch.setattr(World, "__init__", remember)
    yield
    for world in worlds:
        assert_rules(world, over=False)
