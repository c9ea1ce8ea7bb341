"""The frames' file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from mmubusd.rpc.store import FrameStore


def test_memory_without_a_name_is_reached_by_path() -> None:
    with FrameStore(4) as store:
        store.map[4096:4100] = b"page"
        with open(store.path, "rb") as other:
            assert os.pread(other.fileno(), 4, 4096) == b"page"
            assert os.fstat(other.fileno()).st_size == 4 * 4096


def test_named_file_is_ours_alone_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    with FrameStore(4, path) as store:
        assert store.path == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(FileExistsError):
            FrameStore(4, path)
        assert path.exists()
    assert not path.exists()


def test_is_sparse() -> None:
    with FrameStore(1 << 24) as store:
        store.map[0:1] = b"x"
        assert os.stat(store.path).st_blocks * 512 <= 1 << 21


def test_close_twice_and_with_a_view() -> None:
    store = FrameStore(1)
    view = memoryview(store.map)
    store.close()
    store.close()
    assert view[0] == 0
