"""A core as bytes, and back: what a checkpoint holds.

Two things of a core cannot be written down: operations under way, which are generators, and what belongs to this run of
the server (callbacks, a recording). So a core is frozen when it is quiet, and the rest is left out. Only classes of the
rooms below, and the few of the standard library and numpy that they use, are taken when bytes are thawed.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from types import GeneratorType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.frame_bytes import POISON, SOILED, WRITTEN
from mmubusd.notify.history import History
from mmubusd.notify.operation import Operation
from mmubusd.state.errors import StateError
from mmubusd.state.inputs import RecordedCore

__all__ = ["dumps", "freeze", "loads", "thaw"]

T = TypeVar("T")

PROTOCOL = 5
PAGES_AT_ONCE = 256
"""Frames whose bytes are in one record."""
TRIMMED_BYTES = 4096
"""Arrays longer than this are written without the zeros at their end: most of a frame table is untouched."""
DEPTH_MAX = 200_000
STACK_BYTES = 512 << 20
"""Objects point to each other in long chains, and the pickler follows them one inside another."""

ROOMS = ("mmubusd.mm.", "mmubusd.notify.", "mmubusd.state.")
OTHERS = {
    ("builtins", name)
    for name in ("bytearray", "complex", "frozenset", "getattr", "int", "list", "range", "set", "slice", "tuple")
} | {
    ("collections", "Counter"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("collections", "deque"),
    ("copyreg", "__newobj__"),
    ("copyreg", "_reconstructor"),
    ("itertools", "count"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}


class _Pickler(pickle.Pickler):
    """Leaves out what belongs to one run, and writes arrays and views of them so that they are one again."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, memoryview):
            assert isinstance(obj.obj, np.ndarray), "a view of an array"
            assert obj.nbytes == obj.obj.nbytes, "of the whole of it"
            return _view, (obj.obj,)
        if isinstance(obj, np.ndarray) and obj.ndim == 1 and obj.nbytes > TRIMMED_BYTES and obj.base is None:
            used = np.flatnonzero(obj)
            end = int(used[-1]) + 1 if len(used) else 0
            return _array, (obj.dtype.str, len(obj), obj[:end].tobytes())
        if isinstance(obj, GeneratorType):
            if obj.gi_frame is not None:
                raise StateError(f"{obj.__qualname__} is under way")
            return _ended, ()
        if isinstance(obj, Operation):
            state = vars(obj) | {"tag": None, "result": None}
            return copyreg.__newobj__, (Operation,), state  # type: ignore[attr-defined]
        if isinstance(obj, Exception):
            return _error, (type(obj), obj.args), vars(obj)
        if isinstance(obj, History):
            return History, ()
        if isinstance(obj, count):
            return count, (int(repr(obj).removeprefix("count(").removesuffix(")")),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.".startswith(ROOMS) or (module, name) in OTHERS:
            return super().find_class(module, name)
        raise StateError(f"it names {module}.{name}, which no state is made of")


def _view(array: NDArray[Any]) -> memoryview:
    return array.data


def _array(dtype: str, length: int, used: bytes) -> NDArray[Any]:
    array = np.zeros(length, np.dtype(dtype))
    given = np.frombuffer(used, array.dtype)
    array[: len(given)] = given
    return array


def _error(kind: type[Exception], args: tuple[Any, ...]) -> Exception:
    """Its fields come after: an initialiser may take other arguments than the base class keeps."""
    return kind.__new__(kind, *args)


def _ended() -> Any:
    """A generator that has ended."""
    generator = _nothing()
    next(generator, None)
    return generator


def _nothing() -> Iterator[None]:
    return
    yield


def dumps(value: object) -> bytes:
    """Plain values, and those of the rooms below, as bytes."""
    return pickle.dumps(value, PROTOCOL)


def loads(data: bytes) -> Any:
    """The opposite of dumps. Raises: StateError."""
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, TypeError, ValueError) as error:
        raise StateError(f"it cannot be read: {error}") from error


def freeze(core: RecordedCore) -> Iterator[bytes]:
    """Everything of a quiet core: first its objects, then the bytes of its frames.

    Raises: StateError when an operation is under way.
    """
    if not core.quiet:
        raise StateError("an operation is under way")

    def write() -> bytes:
        held = io.BytesIO()
        _Pickler(held, PROTOCOL).dump(core)
        return held.getvalue()

    yield _deeply(write)
    frames = core.frames
    written = np.flatnonzero(frames.flags & np.uint32(WRITTEN))
    for at in range(0, len(written), PAGES_AT_ONCE):
        pfns = written[at : at + PAGES_AT_ONCE].astype(np.int64)
        yield dumps((pfns.tobytes(), frames.data[pfns].tobytes()))


def thaw(records: Sequence[bytes], store: memoryview) -> RecordedCore:
    """The core that was frozen. Args: store: zero-filled, for the bytes of its frames. Raises: StateError."""
    core = _deeply(lambda: loads(records[0]))
    if not isinstance(core, RecordedCore):
        raise StateError("it holds no core")
    frames = core.frames
    if len(store) != frames.frames_nr * PAGE_SIZE:
        raise StateError(f"it has {frames.frames_nr} frames, not {len(store) // PAGE_SIZE}")
    frames.attach(store)
    for record in records[1:]:
        numbers, data = loads(record)
        pfns = np.frombuffer(numbers, np.int64)
        frames.data[pfns] = np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)
    soiled = np.flatnonzero(frames.flags & np.uint32(WRITTEN | SOILED) == SOILED)
    frames.data[soiled] = POISON
    frames.live = False
    return core


def _deeply(work: Callable[[], T]) -> T:
    """Do something that goes deep, on a thread with room for it."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    depth, stack = sys.getrecursionlimit(), threading.stack_size(STACK_BYTES)
    sys.setrecursionlimit(DEPTH_MAX)
    try:
        thread = threading.Thread(target=run, name="deep")
        thread.start()
        thread.join()
    finally:
        sys.setrecursionlimit(depth)
        threading.stack_size(stack)
    if failed:
        raise failed[0]
    return done[0]
