"""The files under deploy/, judged by the tools that people use for them; none of them needs a container engine."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from mmubusd.rpc.config import Settings, load
from source_tree import ROOT

DEPLOY = ROOT / "deploy"
TOOLS = Path(sys.executable).parent


def run(*command: str | Path) -> str:
    """Run a tool from the virtual environment; what it prints when it finds nothing wrong."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_container_file_passes_hadolint() -> None:
    assert run(TOOLS / "hadolint", DEPLOY / "Containerfile") == ""


def test_hadolint_finds_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "Containerfile"
    bad.write_text("FROM debian\nRUN cd /tmp && sudo true\n")
    with pytest.raises(AssertionError, match="DL3004"):
        run(TOOLS / "hadolint", bad)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.state.yaml"])
def test_compose_file_passes_its_schema(name: str) -> None:
    run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / name)


def test_a_state_is_kept_where_the_server_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """In compose on a volume that the image has made for its user, in systemd in the service's own directory."""
    server = yaml.safe_load((DEPLOY / "compose.state.yaml").read_text())["services"]["server"]
    (volume,) = server["volumes"]
    mounted = volume.split(":")[1]
    assert server["environment"]["MMUBUS_STATE"].startswith(f"{mounted}/")
    assert f"--mode=0700 {mounted}\n" in (DEPLOY / "Containerfile").read_text()
    toml = (DEPLOY / "systemd" / "mmubusd.toml").read_text()
    assert f'\n# state = "/var/lib/{unit()["StateDirectory"]}/' in toml
    assert tomllib.loads(toml.replace("# state", "state"))["state"].startswith("/var/lib/")


def test_compose_schema_finds_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "compose.yaml"
    bad.write_text((DEPLOY / "compose.yaml").read_text().replace("read_only:", "readonly:"))
    with pytest.raises(AssertionError, match="readonly"):
        run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", bad)


def test_image_takes_only_files_that_are_there_and_not_ignored() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [source for line in copied for source in line.split()]
    assert len(sources) > 5
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == name or source.startswith(f"{name}/") for name in allowed), f"{source} is in .dockerignore"


def test_image_says_which_version_it_is() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"ARG VERSION={version}\n" in (DEPLOY / "Containerfile").read_text()


def test_compose_file_confines_everybody() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"server", "application", "hmm", "rdma"}
    for name, service in services.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["network_mode"] == "none"
        assert service.keys() >= {"mem_limit", "cpus", "pids_limit"}, name
        if name != "server":
            assert service["depends_on"] == {"server": {"condition": "service_healthy"}}


def test_image_pins_what_the_tests_ran_with() -> None:
    def pins(name: str) -> set[str]:
        return set(re.findall(r"^([a-z0-9-]+==\S+)", (ROOT / name).read_text(), re.MULTILINE))

    assert pins("deploy/constraints.txt") <= pins("constraints.txt")


def unit() -> dict[str, str]:
    """The systemd unit's assignments, of all its sections; later ones win."""
    text = (DEPLOY / "systemd" / "mmubusd.service").read_text()
    return dict(line.split("=", 1) for line in text.splitlines() if re.match(r"\w+=", line))


def service_settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in [name for name in os.environ if name.startswith("MMUBUS_")]:
        monkeypatch.delenv(name)
    return load(["--config", str(DEPLOY / "systemd" / "mmubusd.toml")])


def verify(directory: Path, text: str) -> str:
    """What systemd says of a unit; the program need not be installed here."""
    path = directory / "mmubusd.service"
    path.write_text(text.replace(unit()["ExecStart"].split()[0], "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, check=False, timeout=60
    )
    return done.stderr + ("" if done.returncode == 0 else f"status {done.returncode}")


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (package systemd)"
)
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "mmubusd.service").read_text()
    assert verify(tmp_path, text) == ""
    assert "ProtectSytem" in verify(tmp_path, text.replace("ProtectSystem=", "ProtectSytem="))


def test_unit_gives_the_server_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, assigned = service_settings(monkeypatch), unit()
    assert float(assigned["TimeoutStopSec"]) > settings.drain_s + 2
    (socket,) = [address for address in settings.listen if address.startswith("unix:")]
    assert socket == f"unix:/run/{assigned['RuntimeDirectory']}/mmubus.sock"
    assert assigned["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert assigned["ExecStart"].endswith(f"--config /etc/{assigned['ConfigurationDirectory']}/mmubusd.toml")


def test_scripts_are_sound() -> None:
    for script in [*DEPLOY.glob("*.sh"), ROOT / ".ci" / "run"]:
        run("bash", "-n", script)
