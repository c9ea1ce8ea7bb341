"""Whether two cores are alike: everything that can be reached from them, in the order in which it is reached.

Two cores that give the same digest answer every input in the same way. Operations under way count with the line that
each of their generators stands at, and with its local variables.
"""

from __future__ import annotations

import hashlib
import struct
from enum import Enum
from itertools import count
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
from mmubusd.mm.frame_bytes import WRITTEN
from mmubusd.notify import Operation, Session
from mmubusd.notify.clock import Clock
from mmubusd.notify.history import History
from mmubusd.notify.round import Round
from mmubusd.state import ObservedFrames, RecordedCore
from mmubusd.state.inputs import _Numbered

LEFT_OUT = {
    RecordedCore: {"note"},
    ObservedFrames: {"store", "data", "live", "inside", "_shared", "_looks_nr", "_played", "_seen"},
    Operation: {"tag", "result"},
    Session: {"in_ready"},
    Round: {"heard", "traceparent"},
}
"""What belongs to one run, by class. An operation's result is its caller's. So does what the codec has made, of all."""


class _Walk:
    def __init__(self) -> None:
        self.sum = hashlib.blake2b(digest_size=16)
        self.met: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no number of an object is used again

    def add(self, *parts: object) -> None:
        self.sum.update("\0".join(map(str, parts)).encode() + b"\1")

    def walk(self, root: Any) -> None:
        todo = [root]
        while todo:
            self._one(todo.pop(), todo)

    def _one(self, one: Any, todo: list[Any]) -> None:
        if one is None or isinstance(one, bool | str | Enum | ModuleType | type | FunctionType | BuiltinFunctionType):
            self.add(getattr(one, "__qualname__", one))
        elif isinstance(one, _Numbered | int):
            self.add(int(one))
        elif isinstance(one, float):
            self.sum.update(struct.pack("<d", one))
        elif isinstance(one, np.generic):
            self.add(one.tobytes().hex())  # bytes(one) of a number is as many zeros
        elif isinstance(one, bytes | bytearray):
            self.add(one.hex())
        elif isinstance(one, memoryview):
            todo.append(one.obj)
        elif isinstance(one, frozenset):  # who shares one with whom says nothing, nor does it of a tuple
            self.add("frozenset", len(one), *sorted(map(str, one)))
        elif isinstance(one, tuple):
            self.add(type(one).__qualname__, len(one))
            todo += one
        elif id(one) in self.met:
            self.add("again", self.met[id(one)])
        else:
            self.met[id(one)] = len(self.met)
            self.kept.append(one)
            self._object(one, todo)

    def _object(self, one: Any, todo: list[Any]) -> None:
        self.add(type(one).__qualname__)
        if isinstance(one, np.ndarray):
            self.sum.update(one.tobytes())
        elif isinstance(one, dict):
            self.add(len(one))
            for key, value in one.items():
                todo += (value, key)
        elif isinstance(one, set):
            simple = all(isinstance(each, int | str | tuple) for each in one)
            self.add(len(one), *(sorted(map(str, one)) if simple else ()))
        elif isinstance(one, GeneratorType):
            self._generator(one, todo)
        elif isinstance(one, MethodType):
            todo += (one.__self__, one.__func__)
        elif isinstance(one, History):
            pass
        elif isinstance(one, Clock):  # deadlines that were moved are dropped when somebody looks
            due = [entry for entry in sorted(one._heap, key=lambda entry: entry[:2]) if entry[2].armed_at == entry[0]]
            todo += (due, one.time, one.stalled_s, one.seen)
        elif isinstance(one, count):
            self.add(repr(one))
        elif isinstance(one, list) or hasattr(one, "popleft"):
            self.add(len(one))
            todo += one
        elif isinstance(one, BaseException):
            todo += (one.args, vars(one))
        else:
            self._fields(one, todo)

    def _fields(self, one: Any, todo: list[Any]) -> None:
        names = dict.fromkeys(getattr(one, "__dict__", {}))
        for kind in type(one).__mro__:
            names |= dict.fromkeys(getattr(kind, "__slots__", ()))
        for name in sorted(names):
            if name != "encoded" and name not in LEFT_OUT.get(type(one), ()) and hasattr(one, name):
                todo += (getattr(one, name), name)

    def _generator(self, one: Any, todo: list[Any]) -> None:
        frame = one.gi_frame
        self.add("ended" if frame is None else f"{one.__qualname__} {frame.f_lineno}")
        if frame is not None:
            todo.append({name: frame.f_locals[name] for name in sorted(frame.f_locals)})
            todo.append(one.gi_yieldfrom)


def digest(core: RecordedCore, but: frozenset[int] = frozenset()) -> str:
    """What the core is like. Iterators in generators' variables count by their kind only.

    Args: but: frames whose bytes do not count.
    """
    walk = _Walk()
    frames = core.frames
    walk.walk(core)
    written = np.array([pfn for pfn in np.flatnonzero(frames.flags & np.uint32(WRITTEN)).tolist() if pfn not in but])
    walk.sum.update(written.tobytes())
    walk.sum.update(frames.data[written.astype(np.int64)].tobytes())
    return walk.sum.hexdigest()
