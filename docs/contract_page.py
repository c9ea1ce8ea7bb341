"""The page reference/contract.md, made from the comments of the contract while mkdocs builds."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc
from mkdocs.structure.files import File, Files

PROTO = Path(__file__).resolve().parent.parent / "proto"
PAGE = "reference/contract.md"
INTRODUCTION = """# The contract

Package `mmu.v1`, made from the comments of `proto/mmu/v1`. Client and server share it and nothing else; a client in any
language is made from these files. Addresses and lengths are bytes, ranges half-open, pages 4096 bytes.
"""
Comments = dict[tuple[int, ...], str]


def on_files(found: Files, config: Any) -> Files:
    """Called by mkdocs: adds the page."""
    found.append(File.generated(config, PAGE, content=page()))
    return found


def page() -> str:
    """The page as Markdown."""
    return "\n".join([INTRODUCTION, *(line for file in _contract() for line in _file(file))])


def _contract() -> list[FileDescriptorProto]:
    sources = sorted(PROTO.glob("mmu/v1/*.proto"))
    with tempfile.NamedTemporaryFile(suffix=".binpb") as out:
        arguments = [f"-I{PROTO}", f"-I{files('grpc_tools') / '_proto'}", "--include_source_info"]
        if protoc.main(["protoc", *arguments, f"--descriptor_set_out={out.name}", *map(str, sources)]):
            raise RuntimeError("protoc could not read the contract")
        return list(FileDescriptorSet.FromString(Path(out.name).read_bytes()).file)


def _file(file: FileDescriptorProto) -> Iterator[str]:
    comments: Comments = {tuple(one.path): one.leading_comments for one in file.source_code_info.location}
    detached = [
        text
        for one in file.source_code_info.location
        if tuple(one.path) == (12,)
        for text in one.leading_detached_comments
    ]
    yield f"\n## {file.name.removeprefix('mmu/v1/')}\n"
    yield _prose("\n".join([*detached, comments.get((12,), "")]))
    for number, service in enumerate(file.service):
        yield f"\n### {service.name}\n\n{_prose(comments.get((6, number), ''))}\n\n| call | what it does |\n|---|---|"
        for at, rpc in enumerate(service.method):
            stream = "stream of " if rpc.client_streaming else ""
            answer = "stream of " if rpc.server_streaming else ""
            asks = f"{stream}{_link(rpc.input_type)} → {answer}{_link(rpc.output_type)}"
            yield f"| **{rpc.name}**<br>{asks} | {_cell(comments.get((6, number, 2, at), ''))} |"
    for number, enum in enumerate(file.enum_type):
        yield from _enum(enum, (5, number), comments)
    for number, message in enumerate(file.message_type):
        yield from _message(message, (4, number), comments)


def _message(message: DescriptorProto, path: tuple[int, ...], comments: Comments, outer: str = "") -> Iterator[str]:
    name = f"{outer}{message.name}"
    yield f"\n### {name}\n\n{_prose(comments.get(path, ''))}\n"
    entries = {one.name: one for one in message.nested_type if one.options.map_entry}
    if message.field:
        yield "| field | type | |\n|---|---|---|"
        for number, field in enumerate(message.field):
            said = _cell(comments.get((*path, 2, number), ""))
            yield f"| `{field.name}` = {field.number} | {_type(field, entries)} | {said} |"
    for number, enum in enumerate(message.enum_type):
        yield from _enum(enum, (*path, 4, number), comments, f"{name}.")
    for number, inner in enumerate(message.nested_type):
        if not inner.options.map_entry:
            yield from _message(inner, (*path, 3, number), comments, f"{name}.")


def _enum(enum: EnumDescriptorProto, path: tuple[int, ...], comments: Comments, outer: str = "") -> Iterator[str]:
    yield f"\n### {outer}{enum.name}\n\n{_prose(comments.get(path, ''))}\n\n| value | |\n|---|---|"
    for number, value in enumerate(enum.value):
        yield f"| `{value.name}` = {value.number} | {_cell(comments.get((*path, 2, number), ''))} |"


def _type(field: FieldDescriptorProto, entries: dict[str, DescriptorProto]) -> str:
    short = field.type_name.rsplit(".", 1)[-1]
    if short in entries:
        key, value = entries[short].field
        return f"map of {_type(key, {})} to {_type(value, {})}"
    name = _link(field.type_name) if field.type_name else FieldDescriptorProto.Type.Name(field.type)[5:].lower()
    return f"repeated {name}" if field.label == FieldDescriptorProto.LABEL_REPEATED else name


def _link(name: str) -> str:
    if not name.startswith(".mmu.v1."):
        return f"`{name.lstrip('.')}`"
    short = name.removeprefix(".mmu.v1.")
    return f"[{short}](#{re.sub(r'[^a-z0-9_-]', '', short.lower())})"


def _prose(text: str) -> str:
    return "\n".join(line.removeprefix(" ") for line in text.strip("\n").splitlines()).replace("<", "&lt;").strip()


def _cell(text: str) -> str:
    return " ".join(_prose(text).split()).replace("|", "\\|")
