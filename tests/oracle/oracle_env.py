"""What a recording needs of the machine: a trace buffer of its own, the C helper, and settings that hold still."""

import atexit
import fcntl
import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRACING = Path("/sys/kernel/tracing")
THP = Path("/sys/kernel/mm/transparent_hugepage")
VM = Path("/proc/sys/vm")
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
SWAP_BYTES = 64 << 20
NEVER_MS = "1000000000"
EVERYTHING = "4194304"

HUGE_PAGES = {
    THP / "enabled": "madvise",
    THP / "defrag": "madvise",
    THP / "use_zero_page": "1",
}
SHMEM_ENABLED = THP / "shmem_enabled"
HUGETLB_POOL = 12
UNLIMITED = {VM / "overcommit_memory": "1", VM / "mmap_min_addr": "65536"}
"""What mmubus is: memory is promised at will, and low addresses are not mapped."""
SWAPPING = {VM / "page-cluster": "0", VM / "swappiness": "60"}


def tracefs() -> Path:
    """A tracing instance for this process alone, so that recordings may run side by side; removed at exit."""
    if not (TRACING / "trace_marker").exists():
        subprocess.run(["mount", "-t", "tracefs", "none", str(TRACING)], check=True)
    own = TRACING / "instances" / f"mm-oracle-{os.getpid()}"
    if not own.exists():
        own.mkdir()
        atexit.register(own.rmdir)
    return own


def build(source: str) -> str:
    """Compile one of the C helpers beside this file, unless that has been done."""
    out = Path(tempfile.gettempdir()) / "mm-oracle-extended" / Path(source).stem
    out.parent.mkdir(exist_ok=True)
    if not out.exists() or out.stat().st_mtime < (HERE / source).stat().st_mtime:
        subprocess.run(["gcc", "-O1", "-Wall", "-o", str(out), str(HERE / source)], check=True)
    return str(out)


def environment(folder: Path) -> dict[str, object]:
    """What a recording depends on beside the kernel's version."""
    dev = os.stat(folder).st_dev
    device = Path(f"/sys/dev/block/{os.major(dev)}:{os.minor(dev)}/queue/read_ahead_kb")
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    mount = max((m for m in mounts if os.path.realpath(folder).startswith(m[1])), key=lambda m: len(m[1]))
    return {
        "cpus": os.cpu_count(),
        "disk": mount[2],
        "read_ahead_kb": int(device.read_text()) if device.exists() else None,
        "swap": Path("/proc/swaps").read_text().count("\n") > 1,
    }


def chosen(text: str) -> str:
    """The value of a setting; of a list of choices the one in brackets."""
    return text.split("[")[1].split("]")[0] if "[" in text else text.strip()


@contextmanager
def settings(wanted: Mapping[Path, str]) -> Iterator[None]:
    """Change the kernel's settings for a while; what changed is put back, in reverse order."""
    before: dict[Path, str] = {}
    try:
        for path, value in wanted.items():
            now = chosen(path.read_text())
            if now != value:
                path.write_text(value)
                before[path] = now
        yield
    finally:
        for path, value in reversed(before.items()):
            path.write_text(value)


@contextmanager
def hugetlb_pool() -> Iterator[int]:
    """A pool of so many huge pages beyond those that earlier recordings have left reserved for ever.

    Returns: how many those are. mremap of a part of a mapping takes the whole mapping's reservation with it.
    """
    lost = int((POOL / "resv_hugepages").read_text())
    with settings({VM / "nr_hugepages": str(HUGETLB_POOL + lost), VM / "nr_overcommit_hugepages": "0"}):
        if int((POOL / "free_hugepages").read_text()) != HUGETLB_POOL + lost:
            raise RuntimeError("the huge pages cannot be had, or others use them")
        yield lost


def scheduled(pid: str) -> tuple[str, int]:
    """A task's state, and how often it has gone to sleep."""
    text = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    return fields["State"][0], int(fields["voluntary_ctxt_switches"])


@contextmanager
def khugepaged_asleep(patience_s: float = 120) -> Iterator[None]:
    """Let khugepaged scan once for good, before the recording: it must not collapse anything behind our back.

    While one process asks for huge pages (we do, with `asking`), the daemon sleeps between two scans for as long as the
    setting says, whoever joins. A write to the setting wakes it; then it scans and goes to sleep again. It is nice, so
    on a busy machine that takes a while.
    """
    name = "khugepaged"
    pid = next(p.parent.name for p in Path("/proc").glob("[0-9]*/comm") if p.read_text().strip() == name)
    asking = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    asking.madvise(mmap.MADV_HUGEPAGE)
    asking[0] = 1  # only a mapping that has an anon_vma counts
    _, slept = scheduled(pid)
    os.environ["KHUGEPAGED"] = pid  # for the runner, which may wake it for a pass over everything
    with settings({THP / "khugepaged/scan_sleep_millisecs": NEVER_MS}):
        until, calm = time.monotonic() + patience_s, 0
        while calm < 5:
            time.sleep(0.01)
            state, now = scheduled(pid)
            calm = calm + 1 if state == "S" and now > slept else 0
            if time.monotonic() > until:
                raise TimeoutError("khugepaged does not go to sleep")
        with settings({THP / "khugepaged/pages_to_scan": EVERYTHING}):
            yield
    asking.close()


@contextmanager
def machine_alone(patience_s: float = 600) -> Iterator[None]:
    """Swap belongs to the whole machine: wait until no other recording runs, and keep other swap recordings out."""
    with open(Path(tempfile.gettempdir()) / "oracle.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        until = time.monotonic() + patience_s
        while subprocess.run(["pgrep", "-x", "runner"], stdout=subprocess.DEVNULL).returncode == 0:
            if time.monotonic() > until:
                raise TimeoutError("another recording does not end")
            time.sleep(0.2)
        yield


@contextmanager
def tmpfs(folder: Path, huge: str) -> Iterator[Path]:
    """A mount of its own, whose files get huge pages as it says."""
    path = folder / "tmpfs"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=64m,huge={huge}", "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@contextmanager
def swap_file(folder: Path) -> Iterator[None]:
    """A swap file, in use for as long as the block runs."""
    path = folder / "swap"
    with open(path, "wb") as f:
        os.chmod(path, 0o600)
        for _ in range(SWAP_BYTES >> 20):
            f.write(bytes(1 << 20))
        os.fsync(f.fileno())
    subprocess.run(["mkswap", str(path)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with machine_alone():
            subprocess.run(["swapon", str(path)], check=True)
            try:
                yield
            finally:
                subprocess.run(["swapoff", str(path)], check=True)
    finally:
        path.unlink()
