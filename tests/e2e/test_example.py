"""The example of deploy/ as the Kubernetes overlay with TLS runs it: its roles, and a certificate for each."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from e2e.conftest import COMMAND
from source_tree import ROOT

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
]

DOCUMENT = ROOT / "docs" / "deploy.md"
EXAMPLE = ROOT / "deploy" / "example"
ROLES = ROOT / "deploy" / "kubernetes" / "overlays" / "tls" / "roles.toml"
LIMIT_S = 60


class Certificates:
    """What the commands of docs/deploy.md make."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        blocks = re.findall(r"^```console\n(.+?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
        (block,) = [block for block in blocks if "openssl" in block]
        script = "set -eu\n" + "".join(line[2:] + "\n" for line in block.splitlines())
        done = subprocess.run(("bash", "-c", script), cwd=directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def of(self, name: str) -> Mapping[str, str]:
        """The environment of a client of that name."""
        at = self._directory
        files = {"MMUBUS_CA": f"{at}/ca.crt", "MMUBUS_CERT": f"{at}/{name}.crt", "MMUBUS_KEY": f"{at}/{name}.key"}
        return {**files, "MMUBUS_SERVER_NAME": "mmubus-0.mmubus"}


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@pytest.fixture
def secured(certificates: Certificates) -> Iterator[str]:
    """A server that takes callers with certificates only; its address."""
    files = certificates.of("server")
    tls = ("--tls-cert", files["MMUBUS_CERT"], "--tls-key", files["MMUBUS_KEY"], "--tls-client-ca", files["MMUBUS_CA"])
    command = (*COMMAND, "serve", "--listen", "localhost:0", *tls, "--roles", str(ROLES), "--log-level", "error")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        listening, _, address = process.stdout.readline().rstrip().rpartition(" ")
        assert listening == "listening on"
        try:
            yield address
        finally:
            process.terminate()
            assert process.wait(20) == 0


def start(address: str, identity: Mapping[str, str], program: str, *arguments: str) -> "subprocess.Popen[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MMUBUS_")}
    return subprocess.Popen(
        (sys.executable, str(EXAMPLE / program), *arguments),
        env={**clean, **identity, "MMUBUS_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_application_and_drivers_work_with_their_roles(secured: str, certificates: Certificates) -> None:
    kinds = ("hmm", "rdma")
    drivers = [start(secured, certificates.of(kind), "driver.py", kind, "--once") for kind in kinds]
    application = start(secured, certificates.of("application"), "application.py", "--turns", "2")
    try:
        said = {process: process.communicate(timeout=LIMIT_S)[0] for process in (application, *drivers)}
    finally:
        for process in (application, *drivers):
            process.kill()
            process.wait()
    assert application.returncode == 0, said
    assert "done: 2 turns" in said[application]
    for kind, driver in zip(kinds, drivers, strict=True):
        assert driver.returncode == 0, said[driver]
        assert f"read '{kind} has seen turn 2'" in said[application]
        assert "read 'turn 2' by DMA and answered" in said[driver]


def test_a_stranger_with_a_certificate_finds_no_application(secured: str, certificates: Certificates) -> None:
    """Nobody has granted it anything: to it there is no address space, and it waits."""
    application = start(secured, certificates.of("application"), "application.py")
    stranger = start(secured, certificates.of("server"), "driver.py", "hmm", "--once")
    try:
        assert application.stdout is not None
        assert "waiting for the drivers" in application.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            stranger.communicate(timeout=2)
    finally:
        for process in (application, stranger):
            process.kill()
            process.communicate()
