"""Whatever changes a core is noted: a new input that nobody notes would make another state after a restart."""

from __future__ import annotations

import ast
import inspect

import pytest
from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.memory import Memory
from mmubusd.state import Core, Entry, ObservedFrames, RecordedCore
from source_tree import modules

LOOKS = frozenset({"ack_latency", "clock", "next_deadline", "session_by_token", "drain_ready", "start"})
"""Methods of a core that change nothing that counts; `start` takes a generator, and only `call` may call it."""
CHANGES = frozenset(
    """
    create_mm create_file new_shared_memory unlink destroy_file write_file ftruncate punch fsync finish_reads set_dirty
    export unexport pin unpin adopt munmap mprotect mremap madvise store load touch fork exit settle send_again take
    take_batch acknowledge
    """.split()
)
"""Methods of what is below a core that must not be called around it."""
ROOM_ABOVE = [module for name, module in sorted(modules("mmubusd").items()) if name.startswith("mmubusd.rpc.")]
CHAOS = "mmubusd.rpc.chaos"
"""Makes operations of its own; a server with a state has none."""


def test_every_input_is_noted() -> None:
    public = {
        name
        for name, _ in inspect.getmembers(Core, inspect.isfunction)
        if not name.startswith("_") and name not in LOOKS
    }
    assert {name for name in public if name not in vars(RecordedCore)} == set()


def test_work_that_is_no_input_is_not_begun() -> None:
    """It would be missing when the inputs are played again; found by a test that raised notifications by itself."""
    memory = Memory(frames_nr=64, frame_table=ObservedFrames)
    core = RecordedCore(memory)
    noted: list[Entry] = []
    core.note = noted.append
    mm = core.create_mm("program")
    with pytest.raises(AssertionError, match="begins with an input"):
        core.start(mm.mmap(0, PAGE_SIZE, 3, 0x22), 1.0)
    assert core.counters.operations == 0
    core.call(mm.id, "mmap", (0, PAGE_SIZE, 3, 0x22, 0, 0), 1.0)
    assert ([entry[0] for entry in noted], core.counters.operations) == (["create_mm", "call"], 1)


def receiver(node: ast.Attribute) -> str:
    """What a method is called on, its last name: `_memory` of `self._memory.unlink`."""
    value = node.value
    return value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""


@pytest.mark.parametrize("module", ROOM_ABOVE, ids=[module.name for module in ROOM_ABOVE])
def test_the_room_above_changes_nothing_around_the_core(module: object) -> None:
    tree, name = module.tree, module.name  # type: ignore[attr-defined]
    wrong = [
        f"{name}:{node.lineno} calls {receiver(node)}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (
            (
                node.attr in CHANGES
                and receiver(node) in ("_memory", "memory", "frames", "mm", "outbox", "session", "file")
            )
            or (node.attr == "start" and receiver(node) in ("_bus", "bus"))
        )
    ]
    assert name == CHAOS or wrong == []
