"""The memory manager with the notifier calls taken out of its source: what the mechanism costs those who do not use it.

    import mmubus.bench.unnotified
    from unnotified.mmubusd.mm.memory import Memory        # a second copy, beside the real one, in the same process

The copy is made of the same files. Taken out are the statements that notify, and the tests that guard them: `if
mm.notified: …`, `if …frames.exports: …`, yields of notifications, and calls of functions that only notify.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType

__all__ = ["PREFIX", "without_notifiers"]

PREFIX = "unnotified"
ONLY_NOTIFY = frozenset({"announce_splits", "tell"})
NOTIFICATIONS = frozenset({"InvalidateRange", "InvalidatePage", "RmapInvalidatePage", "Release"})


class _Remover(ast.NodeTransformer):
    """Takes the statements out, and lets imports of the package point to the copy."""

    def __init__(self) -> None:
        self.removed_nr = 0

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        guarded = node.test
        if isinstance(guarded, ast.Attribute) and guarded.attr in ("notified", "exports"):
            self.removed_nr += 1
            return node.orelse or ast.Pass()
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        value = node.value
        notifies = (isinstance(value, ast.Yield) and _called(value.value) in NOTIFICATIONS) or (
            isinstance(value, ast.YieldFrom) and _called(value.value) in ONLY_NOTIFY
        )
        if not notifies:
            return node
        self.removed_nr += 1
        return ast.Pass()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        was_generator = _is_generator(node)
        self.generic_visit(node)
        if was_generator and not _is_generator(node):
            # It must stay one: its callers say `yield from`.
            never = ast.parse("if False:\n    yield").body[0]
            node.body.append(never)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.module and node.module.split(".")[0] == "mmubusd":
            node.module = f"{PREFIX}.{node.module}"
        return node


def _called(node: ast.expr | None) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _is_generator(function: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(function))


def without_notifiers(source: str) -> tuple[ast.Module, int]:
    """Returns: the source's tree with the notifier calls taken out, and how many statements that were."""
    remover = _Remover()
    tree = ast.fix_missing_locations(remover.visit(ast.parse(source)))
    return tree, remover.removed_nr


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        # Not through the cache of compiled files, which has the original's.
        tree, _removed_nr = without_notifiers(self.get_data(self.path).decode())
        code: CodeType = compile(tree, self.path, "exec")
        return code


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        first, _, original = fullname.partition(".")
        if first != PREFIX:
            return None
        found = importlib.util.find_spec(original) if original else None
        if found is None and original:
            return None
        if found is None or found.origin is None:  # a package that has no file
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = []
            return spec
        loader = _Loader(fullname, found.origin)
        packages: list[str] | None = [] if found.submodule_search_locations is not None else None
        return importlib.util.spec_from_file_location(
            fullname, found.origin, loader=loader, submodule_search_locations=packages
        )


sys.meta_path.insert(0, _Finder())
