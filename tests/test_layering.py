"""The architecture, checked by parsing what imports what: docs/architecture.md, "Imports point one way"."""

import ast
import importlib
import subprocess
import sys
import warnings

import pytest
from source_tree import ROOT, Module, all_modules, closure, modules

ROOMS = ("mm", "notify", "state", "rpc")  # each may import itself and those before it
PURE = ("mm", "notify")
# What a pure room must not know of: loops, transports, clocks, chance, the machine it runs on, the contract's messages.
IMPURE = frozenset(
    """
    asyncio concurrent multiprocessing queue sched select selectors signal threading uvloop
    grpc google mmu mmubus pydantic structlog
    fcntl io logging os pathlib shutil socket ssl subprocess sys tempfile
    datetime time random secrets uuid
    """.split()
)
# The client package reaches the server in one place only: where `mmubus serve` and the embedded server start it. The
# benchmark stands apart: it times the server from inside, beside other systems.
DOOR = "mmubus.cli.embedded"
BENCHMARK = "mmubus.bench"
LINES_WARN, LINES_MAX = 450, 600
FUNCTION_LINES_MAX = 80
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers"}


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "mmubusd" and parts[1] in ROOMS else None


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def names(found: list[Module]) -> list[str]:
    return [module.name for module in found]


SERVER = list(modules("mmubusd").values())
CLIENT = list(modules("mmubus").values())
PURE_MODULES = [module for module in SERVER if room_of(module.name) in PURE]
EVERY = all_modules()


def test_there_is_something_to_check() -> None:
    assert {room_of(module.name) for module in SERVER} >= set(ROOMS)
    assert DOOR in names(CLIENT)
    assert len(CLIENT) > 5


@pytest.mark.parametrize("module", SERVER, ids=names(SERVER))
def test_rooms_import_one_way(module: Module) -> None:
    room = room_of(module.name)
    if room is None:
        return
    allowed = ROOMS[: ROOMS.index(room) + 1]
    wrong = {name for name in module.imports() if (other := room_of(name)) and other not in allowed}
    assert not wrong, f"{module.name} is in the room {room} and may import {allowed} only"


@pytest.mark.parametrize("module", PURE_MODULES, ids=names(PURE_MODULES))
def test_pure_rooms_know_no_loop_no_clock_and_no_machine(module: Module) -> None:
    """Also through what they import of ours: the packages around them count."""
    known = modules("mmubusd")
    wrong = {
        f"{name} imports {found}"
        for name in closure(module)
        for found in known[name].imports()
        if found.split(".")[0] in IMPURE
    }
    assert not wrong


def test_pure_rooms_load_without_loop_and_transport() -> None:
    """The same by running it: nothing below the rooms, numpy included, brings them in."""
    program = (
        f"import sys, importlib; [importlib.import_module(name) for name in {names(PURE_MODULES)}];"
        "print(*sorted({'asyncio', 'grpc', 'uvloop', 'structlog', 'pydantic', 'socket'} & set(sys.modules)))"
    )
    path = f"{ROOT / 'server'}"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {program}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("module", CLIENT, ids=names(CLIENT))
def test_client_knows_the_contract_and_nothing_else_of_the_server(module: Module) -> None:
    if module.name == DOOR or within(module.name, BENCHMARK):
        return
    assert {name for name in module.imports() if name.split(".")[0] == "mmubusd"} == set()
    if not within(module.name, "mmubus.cli"):
        assert {name for name in module.imports() if name == DOOR or within(name, BENCHMARK)} == set()


@pytest.mark.parametrize("module", SERVER, ids=names(SERVER))
def test_server_imports_nothing_of_the_client(module: Module) -> None:
    assert not {name for name in module.imports() if name.split(".")[0] == "mmubus"}


@pytest.mark.parametrize("start", sorted({"mmubus"} & set(modules("mmubus"))))
def test_import_mmubus_stays_light(start: str) -> None:
    """A driver that imports the library pays for grpc, protobuf and numpy, not for the command line or the server."""
    heavy = {"typer", "click", "rich", "pydantic", "pydantic_settings", "structlog", "mmubusd"}
    known = modules("mmubus")
    wrong = {
        f"{name} imports {found}"
        for name in closure(known[start])
        for found in known[name].imports()
        if found.split(".")[0] in heavy
    }
    assert not wrong


@pytest.mark.parametrize("module", EVERY, ids=names(EVERY))
def test_module_says_what_it_is_for(module: Module) -> None:
    doc = ast.get_docstring(module.tree)
    assert doc, f"{module.path.relative_to(ROOT)} needs a docstring"


@pytest.mark.parametrize("module", EVERY, ids=names(EVERY))
def test_sizes(module: Module) -> None:
    assert module.lines <= LINES_MAX, f"{module.name} has {module.lines} lines: split it by concept"
    if module.lines > LINES_WARN:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(f"{module.name} has {module.lines} lines", stacklevel=1)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, f"{module.name}.{node.name} has {length} lines"


@pytest.mark.parametrize("module", EVERY, ids=names(EVERY))
def test_module_is_named_after_its_concept(module: Module) -> None:
    vague = set(module.name.split(".")) & VAGUE
    assert not vague, f"{module.name}: a name says what is in it"


def top_level_names(tree: ast.Module) -> set[str]:
    """Names that a module binds at its top level, under `if` and `try` too."""
    bound: set[str] = set()
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        match node:
            case ast.Import() | ast.ImportFrom():
                bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bound.add(node.name)
            case ast.Assign():
                bound |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                bound.add(name)
            case ast.If() | ast.Try():
                pending += [*node.body, *node.orelse]
                if isinstance(node, ast.Try):
                    pending += [statement for handler in node.handlers for statement in handler.body]
    return bound


def declared_all(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            value = ast.literal_eval(node.value)
            return list(value)
    return None


def is_re_export(node: ast.stmt) -> bool:
    """What an __init__ may hold: imports, at once or on first use (PEP 562), and the tables for that."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name.startswith("_")
        case ast.FunctionDef(name=name):
            return name in ("__getattr__", "__dir__")
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return all(is_re_export(inner) for inner in node.body)
    return False


def ours(tree: ast.Module) -> set[str]:
    """Names that a module has from our own packages."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.level or (node.module or "").split(".")[0] in ("mmubus", "mmubusd"))
        for alias in node.names
    }


@pytest.mark.parametrize("module", EVERY, ids=names(EVERY))
def test_public_names_agree(module: Module) -> None:
    """__all__ names what is there, once; a package's __init__ re-exports and does nothing else."""
    declared = declared_all(module.tree)
    if declared is not None:
        assert len(declared) == len(set(declared))
        assert set(declared) <= top_level_names(module.tree)
    if module.is_package:
        assert [f"{module.name}:{node.lineno}" for node in module.tree.body if not is_re_export(node)] == []
        assert {name for name in ours(module.tree) if not name.startswith("_")} == set(declared or ())


PACKAGES = [module.name for module in EVERY if module.is_package]


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_can_be_had(package: str) -> None:
    found = importlib.import_module(package)
    assert [name for name in getattr(found, "__all__", ()) if not hasattr(found, name)] == []
