"""The contract's lint and its guard against breaking changes, by protoc's own descriptors: no other tool is needed.

`make check` runs buf as well where npm can bring it. The rules are those of buf's STANDARD and COMMENTS that matter
here.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    OneofDescriptorProto,
)
from source_tree import ROOT

PROTO = ROOT / "proto"
RELEASED = PROTO / "released.binpb"
FILES = sorted(str(path.relative_to(PROTO)) for path in (PROTO / "mmu" / "v1").glob("*.proto"))
# Field numbers of the parts of a descriptor, from descriptor.proto: a path of them names a declaration.
MESSAGES, ENUMS, SERVICES, NESTED_MESSAGES, NESTED_ENUMS, METHODS = 4, 5, 6, 3, 4, 2


@dataclass(frozen=True)
class Declaration:
    """A message, enum, service or rpc with the comment that stands before it."""

    kind: str
    name: str
    comment: str
    value: object


def compile_contract(directory: Path) -> FileDescriptorSet:
    """Run protoc over proto/, comments included."""
    out = directory / "contract.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", "--include_source_info", "--include_imports"]
    done = subprocess.run(
        [*command, f"--descriptor_set_out={out}", *FILES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "protoc warns"
    return FileDescriptorSet.FromString(out.read_bytes())


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorSet:
    return compile_contract(tmp_path_factory.mktemp("contract"))


def declarations(file: FileDescriptorProto) -> Iterator[Declaration]:
    """Everything in a file that must be documented."""
    comments = {tuple(location.path): location.leading_comments.strip() for location in file.source_code_info.location}

    def messages(
        found: list[DescriptorProto], path: tuple[int, ...], number: int, prefix: str
    ) -> Iterator[Declaration]:
        for i, message in enumerate(found):
            if message.options.map_entry:
                continue
            here = (*path, number, i)
            yield Declaration("message", prefix + message.name, comments.get(here, ""), message)
            yield from enums(list(message.enum_type), here, NESTED_ENUMS, f"{prefix}{message.name}.")
            yield from messages(list(message.nested_type), here, NESTED_MESSAGES, f"{prefix}{message.name}.")

    def enums(
        found: list[EnumDescriptorProto], path: tuple[int, ...], number: int, prefix: str
    ) -> Iterator[Declaration]:
        for i, enum in enumerate(found):
            yield Declaration("enum", prefix + enum.name, comments.get((*path, number, i), ""), enum)

    yield from messages(list(file.message_type), (), MESSAGES, "")
    yield from enums(list(file.enum_type), (), ENUMS, "")
    for i, service in enumerate(file.service):
        yield Declaration("service", service.name, comments.get((SERVICES, i), ""), service)
        for j, method in enumerate(service.method):
            comment = comments.get((SERVICES, i, METHODS, j), "")
            yield Declaration("rpc", f"{service.name}.{method.name}", comment, method)


def all_declarations(contract: FileDescriptorSet, kind: str) -> list[Declaration]:
    return [found for file in contract.file for found in declarations(file) if found.kind == kind]


def snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def test_files_lie_where_their_package_says(contract: FileDescriptorSet) -> None:
    assert len(contract.file) == len(FILES) > 0
    for file in contract.file:
        assert file.package == "mmu.v1"
        assert file.syntax == "proto3"
        assert file.name.startswith("mmu/v1/")
        assert re.fullmatch(r"[a-z][a-z0-9_]*\.proto", Path(file.name).name)


@pytest.mark.parametrize("kind", ["message", "enum", "service", "rpc"])
def test_everything_is_documented(contract: FileDescriptorSet, kind: str) -> None:
    found = all_declarations(contract, kind)
    assert found
    assert [each.name for each in found if not each.comment] == []


def test_names_of_messages_fields_and_enums(contract: FileDescriptorSet) -> None:
    wrong = []
    for declaration in all_declarations(contract, "message"):
        wrong += (
            [] if re.fullmatch(r"([A-Z][A-Za-z0-9]*\.)*[A-Z][A-Za-z0-9]*", declaration.name) else [declaration.name]
        )
        assert isinstance(declaration.value, DescriptorProto)
        wrong += [
            f"{declaration.name}.{field.name}"
            for field in [*declaration.value.field, *_oneofs(declaration.value)]
            if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name)
        ]
    for declaration in all_declarations(contract, "enum"):
        assert isinstance(declaration.value, EnumDescriptorProto)
        prefix = snake(declaration.name.split(".")[-1]).upper() + "_"
        values = declaration.value.value
        wrong += [value.name for value in values if not value.name.startswith(prefix) or not value.name.isupper()]
        if values[0].number != 0 or values[0].name != f"{prefix}UNSPECIFIED":
            wrong.append(f"{declaration.name} must begin with {prefix}UNSPECIFIED = 0")
    assert wrong == []


def _oneofs(message: DescriptorProto) -> list[OneofDescriptorProto]:
    """Those that are written in the contract; an optional field has one of its own that is not."""
    hidden = {field.oneof_index for field in message.field if field.proto3_optional}
    return [one for index, one in enumerate(message.oneof_decl) if index not in hidden]


def test_rpcs_have_requests_and_responses_of_their_own(contract: FileDescriptorSet) -> None:
    used: dict[str, str] = {}
    for file in contract.file:
        for service in file.service:
            assert service.name.endswith("Service")
            for method in service.method:
                assert method.input_type == f".mmu.v1.{method.name}Request"
                assert method.output_type == f".mmu.v1.{method.name}Response"
                for message in (method.input_type, method.output_type):
                    assert message not in used, f"{message} is used by {used[message]} and {method.name}"
                    used[message] = method.name


def shape(field: FieldDescriptorProto) -> tuple[object, ...]:
    """What a peer of another version relies on, on the wire and in JSON."""
    return field.name, field.type, field.type_name, field.label, field.HasField("oneof_index")


def breaking_changes(old: FileDescriptorSet, new: FileDescriptorSet) -> list[str]:
    """What a peer that was built with the old contract would stumble over."""
    found = []
    for kind in ("message", "enum", "rpc"):
        after = {each.name: each.value for each in all_declarations(new, kind)}
        for declaration in all_declarations(old, kind):
            was, now = declaration.value, after.get(declaration.name)
            match was, now:
                case _, None:
                    found.append(f"{kind} {declaration.name} is gone")
                case DescriptorProto(), DescriptorProto():
                    fields = {field.number: shape(field) for field in now.field}
                    kept = {number for span in now.reserved_range for number in range(span.start, span.end)}
                    found += [
                        f"{declaration.name}.{field.name} (number {field.number}) was changed or taken away"
                        for field in was.field
                        if fields.get(field.number) != shape(field) and field.number not in kept
                    ]
                case EnumDescriptorProto(), EnumDescriptorProto():
                    values = {value.number: value.name for value in now.value}
                    found += [
                        f"{v.name} was changed or taken away" for v in was.value if values.get(v.number) != v.name
                    ]
                case _:
                    if was != now:
                        found.append(f"{declaration.name} takes or gives something else")
    return found


def test_released_contract_still_holds(contract: FileDescriptorSet) -> None:
    """proto/released.binpb is what is out there; `make contract` replaces it when a break is meant."""
    assert breaking_changes(FileDescriptorSet.FromString(RELEASED.read_bytes()), contract) == []


def test_a_breaking_change_is_noticed(contract: FileDescriptorSet) -> None:
    changed = FileDescriptorSet()
    changed.CopyFrom(contract)
    file = next(file for file in changed.file if file.name.endswith("session.proto"))
    message = next(message for message in file.message_type if message.name == "Welcome")
    message.field[0].name += "_renamed"
    del file.message_type[-1]
    found = breaking_changes(contract, changed)
    assert any("Welcome.session" in change for change in found)
    assert any("is gone" in change for change in found)
