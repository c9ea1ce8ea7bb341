"""The core without notifier calls is the core, but for the notifier calls."""

from __future__ import annotations

import ast
import importlib

import pytest
from mmubus.bench.core import finish
from mmubus.bench.unnotified import PREFIX, without_notifiers
from mmubusd.mm.memory import Memory

BASE, PAGE = 0x10_0000_0000, 4096
SOURCE = """
from mmubusd.mm.notification import InvalidateRange
import os

def munmap(mm, start, end):
    gather = zap(mm)
    if mm.notified:
        gather.quarantine()
        yield InvalidateRange(mm, start, end)
    if memory.frames.exports:
        yield from evict(gather)
    else:
        gather.free()
    if mm.split_blocks:
        yield from announce_splits(mm)
    yield LockWait(mm)

def tells(mm):
    if mm.notified:
        yield InvalidateRange(mm, 0, 1)
"""
EXPECTED = """
from unnotified.mmubusd.mm.notification import InvalidateRange
import os

def munmap(mm, start, end):
    gather = zap(mm)
    pass
    gather.free()
    if mm.split_blocks:
        pass
    yield LockWait(mm)

def tells(mm):
    pass
    if False:
        yield
"""


def test_takes_out_what_notifies_and_nothing_else() -> None:
    tree, removed_nr = without_notifiers(SOURCE)
    assert ast.unparse(tree) == ast.unparse(ast.parse(EXPECTED))
    assert removed_nr == 6  # those inside others count too


def test_the_copy_does_the_same_and_never_tells() -> None:
    copy = importlib.import_module(f"{PREFIX}.mmubusd.mm.memory").Memory
    assert copy is not Memory
    for make in (Memory, copy):
        memory = make(frames_nr=64)
        mm = memory.create_mm("m")
        finish(mm.mmap(BASE, 8 * PAGE, 3, 0x32))
        finish(mm.touch(BASE, 8 * PAGE, "write"))
        assert mm.resident_pages() == 8
        mm.notified = True
        if make is Memory:
            with pytest.raises(AssertionError, match="waits for InvalidateRange"):
                finish(mm.munmap(BASE, 8 * PAGE))
        else:
            finish(mm.munmap(BASE, 8 * PAGE))
            assert memory.frames.free_nr == 63
