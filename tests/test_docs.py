"""What the documents name exists: tests, functions, files, make's verbs."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from limits_table import limits_table
from source_tree import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
TEST_ID = re.compile(r"`(tests/[\w/]+\.py)((?:::\w+)+)(?:\[[^\]`]*\])?`")
CODE_NAME = re.compile(r"`((?:server|client|tests|proto|deploy)/[\w/.]+\.\w+):([\w.]+)`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
PATH = re.compile(r"`((?:server|client|tests|proto|docs|deploy|gen)/[\w/.-]*)`")
VERB = re.compile(r"`make ([a-z]+)`")


@cache
def defined(path: Path) -> frozenset[str]:
    """Dotted names of the classes, functions, methods and attributes that a Python file defines."""
    found: set[str] = set()

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    found.add(prefix + name)
                    walk(child, f"{prefix}{name}.")
                case ast.AnnAssign(target=ast.Name(id=name)):
                    found.add(prefix + name)
                case ast.Assign(targets=targets):
                    found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))
                case ast.If() | ast.Try() | ast.With():
                    walk(child, prefix)

    walk(ast.parse(path.read_text()), "")
    return frozenset(found)


def names_something(path: Path, name: str) -> bool:
    """Whether the file defines the name; in a file that is not Python, whether the word occurs."""
    if path.suffix == ".py":
        return name in defined(path)
    return re.search(rf"\b{re.escape(name.split('.')[-1])}\b", path.read_text()) is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_every_test_named_exists(document: Path) -> None:
    missing = []
    for match in TEST_ID.finditer(document.read_text()):
        path, name = ROOT / match[1], match[2].lstrip(":").replace("::", ".")
        if not path.is_file() or name not in defined(path):
            missing.append(match[0])
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_every_function_named_exists(document: Path) -> None:
    missing = []
    for match in CODE_NAME.finditer(document.read_text()):
        path = ROOT / match[1]
        if not path.is_file() or not names_something(path, match[2]):
            missing.append(match[0])
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_every_file_named_exists(document: Path) -> None:
    text = document.read_text()
    missing = [path for path in LINK.findall(text) if not (document.parent / path).exists()]
    missing += [path for path in PATH.findall(text) if not path.startswith("gen/") and not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_every_verb_named_exists(document: Path) -> None:
    verbs = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(VERB.findall(document.read_text())) <= verbs


def test_limits_are_told_with_their_defaults() -> None:
    """The README's table has every number of the configuration, as it is."""
    assert limits_table() in (ROOT / "README.md").read_text(), "run: .venv/bin/python tests/limits_table.py"


def test_the_seed_is_covered() -> None:
    """docs/seed.md has a word on every name that the seed's core patch brought in, and shows a test for most."""
    text = (ROOT / "docs" / "seed.md").read_text()
    names = """
        mmu_notifier mmu_notifier_head mmu_notifier_ops release age_page invalidate_page invalidate_range invalidate_all
        mmu_rmap_notifier mmu_rmap_notifier_ops __mmu_notifier_register mmu_notifier_register mmu_notifier_unregister
        mmu_notifier_release mmu_notifier_age_page mmu_notifier_head_init mmu_notifier() mmu_rmap_notifier()
        mmu_rmap_notifier_register mmu_rmap_notifier_unregister mmu_rmap_notifier_list mmu_notifier_list_lock
        PG_external_rmap PageExternalRmap SetPageExternalRmap ClearPageExternalRmap CONFIG_MMU_NOTIFIER CONFIG_64BIT
        synchronize_rcu call_rcu exit_mmap mm_init hlist_for_each_entry_safe_rcu
        EXPORT_SYMBOL EXPORT_SYMBOL_GPL mmap_sem
    """.split()
    assert [name for name in names if f"`{name}`" not in text] == []
    assert len(TEST_ID.findall(text)) >= 30
