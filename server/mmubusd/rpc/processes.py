"""The processes behind sessions that may map the frames: a pidfd tells when one has ended.

Nobody can unmap the frames from another process. So what a fenced client could still reach is held back until its
process has ended, or it says that it uses nothing any more. A process that has ended also answers nothing: nobody waits
for it until its budget is over.

A client names its process as "PID@NAMESPACE"; numbers of another PID namespace mean nothing here and are ignored.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from structlog.typing import FilteringBoundLogger

from mmubusd.notify import Session

__all__ = ["Processes"]


class Processes:
    """Watches the process of each session that named one.

    Args: died: called once with a session whose process has ended.
    """

    def __init__(self, died: Callable[[Session], None], log: FilteringBoundLogger) -> None:
        self._died = died
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._fds: dict[int, int] = {}
        self._namespace = os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else 0

    def watch(self, session: Session, process: str) -> None:
        """Watch the process that a session has named; a session that is resumed may have another one."""
        self.forget(session)
        pid, _, namespace = process.partition("@")
        if not pid.isdecimal() or namespace != str(self._namespace) or int(pid) == os.getpid():
            return
        try:
            fd = os.pidfd_open(int(pid))
        except (OSError, OverflowError):
            self._log.info("the process of a session cannot be watched", session=session.id, pid=pid)
            return
        self._fds[session.id] = fd
        self._loop.add_reader(fd, self._ended, session)

    def forget(self, session: Session) -> None:
        """The session has left. Idempotent."""
        fd = self._fds.pop(session.id, -1)
        if fd >= 0:
            self._loop.remove_reader(fd)
            os.close(fd)

    def close(self) -> None:
        """Watch nothing any more."""
        for fd in self._fds.values():
            self._loop.remove_reader(fd)
            os.close(fd)
        self._fds.clear()

    def _ended(self, session: Session) -> None:
        self.forget(session)
        self._died(session)
