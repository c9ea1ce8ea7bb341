"""The project's own Python modules as syntax trees: what the tests of the architecture look at."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = {"mmubusd": ROOT / "server", "mmubus": ROOT / "client"}


@dataclass(frozen=True, eq=False)
class Module:
    """One module: its dotted name, its file and its tree."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def package(self) -> str:
        """The package that its relative imports start from."""
        return self.name if self.is_package else self.name.rpartition(".")[0]

    @cache  # noqa: B019 - modules live as long as the tests
    def imports(self) -> frozenset[str]:
        """Every module that it imports, anywhere in it, under TYPE_CHECKING too; `from a import b` gives a and a.b."""
        return frozenset(self._imports())

    def _imports(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = self.package.split(".")
                    parents = parents[: len(parents) - node.level + 1]
                    base = ".".join([*parents, base] if base else parents)
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)


def read(path: Path, source: Path) -> Module:
    """Parse one file below source."""
    text = path.read_text()
    parts = path.relative_to(source).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(name, path, ast.parse(text, str(path)), text.count("\n"))


@cache
def modules(package: str) -> dict[str, Module]:
    """All modules of mmubusd or mmubus, by name."""
    found = (read(path, SOURCES[package]) for path in sorted((SOURCES[package] / package).rglob("*.py")))
    return {module.name: module for module in found}


def all_modules() -> list[Module]:
    """All modules of both packages."""
    return [module for package in SOURCES for module in modules(package).values()]


@cache
def imported_ours(module: Module) -> set[str]:
    """Those of our modules that importing this one runs directly: what it names, and the packages around those."""
    known = {**modules("mmubusd"), **modules("mmubus")}
    found = set()
    for name in [*module.imports(), module.name]:
        parts = name.split(".")
        found |= {prefix for i in range(1, len(parts) + 1) if (prefix := ".".join(parts[:i])) in known}
    return found - {module.name}


def closure(module: Module) -> set[str]:
    """All of our modules that importing this one runs, itself included."""
    known = {**modules("mmubusd"), **modules("mmubus")}
    seen, pending = {module.name}, [module.name]
    while pending:
        for name in imported_ours(known[pending.pop()]) - seen:
            seen.add(name)
            pending.append(name)
    return seen
