"""What a service manager is told."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mmubusd.rpc.supervisor import READY, tell

SERVER = (sys.executable, "-c", "import sys; from mmubusd.rpc import main; sys.exit(main())")


@pytest.mark.slow
@pytest.mark.parametrize("abstract", [False, True])
def test_ready_when_it_listens_and_stopping_when_it_drains(tmp_path: Path, abstract: bool) -> None:
    name = f"@mmubus-test-{os.getpid()}" if abstract else f"{tmp_path}/notify"
    listen = tmp_path / "mmubus.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0"))
        manager.settimeout(30)
        environment = {**os.environ, "NOTIFY_SOCKET": name}
        with subprocess.Popen(
            (*SERVER, "--listen", f"unix:{listen}", "--log-level", "error"), env=environment
        ) as server:
            try:
                assert manager.recv(4096).decode().splitlines() == [READY, f"STATUS=listening on unix:{listen}"]
                assert listen.is_socket()
                server.send_signal(signal.SIGTERM)
                assert manager.recv(4096) == b"STOPPING=1"
                assert server.wait(20) == 0
            finally:
                server.kill()


def test_nobody_needs_to_listen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not tell(READY)
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/gone")
    assert not tell(READY)
