"""What is shipped: the wheel's contents, and that its commands run from it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from source_tree import ROOT, all_modules

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as pip builds it from a clone (nothing generated is there yet), with the pinned build tools."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("client", "server", "proto"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    (tree / "gen" / "mmu").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "gen/mmu/py.typed"):
        shutil.copy(ROOT / name, tree / name)
    constraints = ROOT / "build-constraints.txt"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--build-constraint", str(constraints)]
    done = subprocess.run([*command, "--wheel-dir", str(out), str(tree)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.mark.slow
def test_wheel_holds_both_sides_the_contract_and_the_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"mmubus/py.typed", "mmubusd/py.typed", "mmu/py.typed"} <= names
    for proto in (ROOT / "proto" / "mmu" / "v1").glob("*.proto"):
        generated = {f"mmu/v1/{proto.stem}_pb2{ending}" for ending in (".py", ".pyi", "_grpc.py", "_grpc.pyi")}
        assert generated <= names
    for package, source in (("mmubus", "client"), ("mmubusd", "server")):
        modules = {str(path.relative_to(ROOT / source)) for path in (ROOT / source / package).rglob("*.py")}
        assert modules <= names
    outside = {name for name in names if name.split("/")[0] not in ("mmubus", "mmubusd", "mmu")}
    assert all(".dist-info/" in name for name in outside)
    assert any(name.endswith("licenses/LICENSE") for name in outside)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(PROJECT["project"]["scripts"]))
def test_commands_run_from_the_wheel(wheel: Path, tmp_path: Path, command: str) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    module, _, function = PROJECT["project"]["scripts"][command].partition(":")
    run = f"import {module}; print({module}.__file__); {module}.{function}()"
    program = f"import sys; sys.argv = ['{command}', '--help']; {run}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout.splitlines()[0], "it must run what the wheel holds"
    assert "usage" in done.stdout.lower()


@pytest.mark.parametrize("name", ["constraints.txt", "extras-constraints.txt", "build-constraints.txt"])
def test_constraints_are_hashed_and_name_no_registry(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    requirements = re.split(r"\n(?=[a-z0-9])", text)
    assert len(requirements) > 5
    assert [line.split()[0] for line in requirements if "==" not in line or "--hash=sha256:" not in line] == []


def test_npm_lock_names_no_registry() -> None:
    packages = json.loads((ROOT / "package-lock.json").read_text())["packages"]
    assert [name for name, entry in packages.items() if "resolved" in entry] == []
    assert all("integrity" in entry for name, entry in packages.items() if name)


def test_constraints_hold_every_dependency() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    assert {match.group() for text in wanted if (match := re.match(r"[a-z0-9-]+", text))} <= pinned


def test_everything_imported_is_a_dependency() -> None:
    """What a fresh installation would miss: third-party modules that no requirement brings."""
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(one for name in extras if name != "dev" for one in extras[name])]
    declared = {re.match(r"[a-zA-Z0-9-]+", text)[0].lower() for text in wanted}  # type: ignore[index]
    declared |= {"hiredis", "click"}  # of redis[hiredis] and typer
    providers = packages_distributions()
    roots = {name.split(".")[0] for module in all_modules() for name in module.imports() if "google.rpc" not in name}
    foreign = roots - sys.stdlib_module_names - {"mmubus", "mmubusd", "mmu", "google", "__future__", ""}
    names = {"nats": "nats-py", "redis": "redis", "zmq": "pyzmq", "hiredis": "hiredis", "matplotlib": "matplotlib"}
    missing = {
        root
        for root in foreign
        if not {one.lower().replace("_", "-") for one in providers.get(root, [names.get(root, root)])} & declared
    }
    assert missing == set()


def test_every_dependency_says_why() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    requirements = [line for line in lines if re.match(r'\s+"[a-z0-9-]+[><=]=', line)]
    assert len(requirements) > 20
    assert [line for line in requirements if not re.search(r"\",\s+# \S", line)] == []


def test_version_is_in_the_changelog() -> None:
    assert f"## [{PROJECT['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text()
