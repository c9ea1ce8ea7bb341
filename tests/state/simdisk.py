"""A disk that remembers everything that was done to it, and what it would hold had the machine stopped at any point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

Image = dict[str, bytes]
"""Files by name."""


@dataclass(frozen=True)
class Step:
    """One operation on the disk: create, write, sync, cut, rename, remove, or sync of the names ("names")."""

    kind: str
    name: str = ""
    data: bytes = b""
    to: str = ""
    size: int = 0


@dataclass
class _Inode:
    data: bytearray = field(default_factory=bytearray)
    kept: bytes = b""  # what was synced


class SimDisk:
    """As `mmubusd.state.Disk`. Args: image: what is there at the beginning, kept.

    Attributes: log: every step; fails: called with each step before it is done, to raise OSError.
    """

    def __init__(self, image: Image | None = None) -> None:
        self._names = {name: _Inode(bytearray(data), data) for name, data in (image or {}).items()}
        self.kept_names = dict(self._names)
        self.log: list[Step] = []
        self.fails = lambda step: None

    def _do(self, step: Step) -> None:
        self.fails(step)
        self.log.append(step)
        self.play(step)

    def play(self, step: Step) -> None:
        """Do a step without noting it."""
        match step.kind:
            case "create":
                self._names[step.name] = _Inode()
            case "write":
                self._names[step.name].data += step.data
            case "sync":
                inode = self._names[step.name]
                inode.kept = bytes(inode.data)
            case "cut":
                del self._names[step.name].data[step.size :]
            case "rename":
                self._names[step.to] = self._names.pop(step.name)
            case "remove":
                del self._names[step.name]
            case "names":
                self.kept_names = dict(self._names)

    # mmubusd.state.Disk

    def names(self) -> list[str]:
        return sorted(self._names)

    def read(self, name: str) -> bytes:
        return bytes(self._names[name].data)

    def create(self, name: str) -> SimFile:
        self._do(Step("create", name))
        return SimFile(self, name)

    def open(self, name: str) -> SimFile:
        assert name in self._names
        return SimFile(self, name)

    def rename(self, name: str, to: str) -> None:
        self._do(Step("rename", name, to=to))

    def remove(self, name: str) -> None:
        self._do(Step("remove", name))

    def sync(self) -> None:
        self._do(Step("names"))

    # What a restart would find.

    def killed(self) -> Image:
        """The process was killed: the system has everything."""
        return {name: bytes(inode.data) for name, inode in self._names.items()}

    def power_lost(self) -> Iterator[tuple[str, Image]]:
        """The machine lost its power: what was synced, and of the rest nothing, some, or room without contents."""
        for how, names in (("names as synced", self.kept_names), ("names as they were", self._names)):
            yield f"{how}, synced bytes", {name: inode.kept for name, inode in names.items()}
            if any(bytes(inode.data) != inode.kept for inode in names.values()):
                yield f"{how}, half of the rest", {name: _some(inode, False) for name, inode in names.items()}
                yield f"{how}, zeros for the rest", {name: _some(inode, True) for name, inode in names.items()}


def _some(inode: _Inode, zeros: bool) -> bytes:
    more = bytes(inode.data[len(inode.kept) :])
    if len(inode.data) < len(inode.kept):
        return bytes(inode.data)
    return inode.kept + (bytes(len(more)) if zeros else more[: len(more) // 2])


class SimFile:
    def __init__(self, disk: SimDisk, name: str) -> None:
        self._disk = disk
        self._name = name

    def write(self, data: bytes) -> None:
        self._disk._do(Step("write", self._name, data))

    def sync(self) -> None:
        self._disk._do(Step("sync", self._name))

    def cut(self, size: int) -> None:
        self._disk._do(Step("cut", self._name, size=size))

    def close(self) -> None:
        return


def crashes(log: list[Step], since: int = 0) -> Iterator[tuple[int, str, Image]]:
    """Every point at which the machine may stop: how many steps were done, in which way, and what a restart finds."""
    disk = SimDisk()
    for at in range(len(log) + 1):
        if at >= since:
            yield at, "killed", disk.killed()
            for how, image in disk.power_lost():
                yield at, f"power lost: {how}", image
        if at == len(log):
            return
        step = log[at]
        if step.kind == "write" and at >= since:
            before = disk.killed()
            for size in sorted({1, 19, 21, len(step.data) // 2, len(step.data) - 1}):
                if size < len(step.data):
                    torn = before | {step.name: before[step.name] + step.data[:size]}
                    yield at, f"killed after {size} of {len(step.data)} bytes to {step.name}", torn
        disk.play(step)
