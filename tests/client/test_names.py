"""The public face: every name there, documented, and cheap to import."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import mmubus
import pytest

MODULES = [found.name for found in pkgutil.iter_modules(mmubus.__path__, "mmubus.") if not found.ispkg]


@pytest.mark.parametrize("name", mmubus.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(mmubus, name) is not None


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mmubus.nothing  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_every_public_thing_is_documented(module: str) -> None:
    imported = importlib.import_module(module)
    assert imported.__doc__
    for name in imported.__all__:
        thing = getattr(imported, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        assert thing.__doc__, name
        for method_name, method in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isfunction(method) and not method_name.startswith("_"):
                assert inspect.getdoc(getattr(thing, method_name)), f"{name}.{method_name}"


def test_importing_the_package_imports_neither_grpc_nor_numpy_nor_the_server() -> None:
    code = "import mmubus, sys; print([name for name in ('grpc', 'numpy', 'google', 'mmubusd') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_client_never_imports_the_server() -> None:
    code = "import mmubus.sync, sys; print('mmubusd' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_linux_s_numbers_are_python_s() -> None:
    import mmap

    for name in mmubus.__all__:
        if name.startswith(("PROT_", "MAP_", "MADV_")) and hasattr(mmap, name):
            assert getattr(mmubus, name) == getattr(mmap, name), name


def test_the_contract_s_numbers_are_ours() -> None:
    from mmu.v1 import address_space_pb2, types_pb2

    assert {f"OP_{op.name}": op.value for op in mmubus.Op} == dict(address_space_pb2.Op.items()[1:])
    assert {f"REASON_{reason.name}": reason.value for reason in mmubus.Reason} == dict(types_pb2.Reason.items())
    ops = {f"NOTIFIER_OP_{op.name}": op.value for op in mmubus.NotifierOp}
    assert ops == dict(types_pb2.NotifierOp.items())
    kinds = {f"FILE_KIND_{kind.name}": kind.value for kind in mmubus.FileKind}
    assert kinds == dict(address_space_pb2.FileKind.items()[1:])
