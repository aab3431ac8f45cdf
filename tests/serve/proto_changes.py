"""What in newer .proto files breaks a client of older ones. Additions never do."""

from collections.abc import Iterable, Iterator
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    ServiceDescriptorProto,
)

FIELD = ("name", "type", "type_name", "label", "proto3_optional")
METHOD = ("input_type", "output_type", "client_streaming", "server_streaming")
Found = Iterator[str]


def breaks(old: Iterable[FileDescriptorProto], new: Iterable[FileDescriptorProto]) -> list[str]:
    """Sentences about everything that is gone or has become something else."""
    files = {file.name: file for file in new}
    return [line for file in old for line in _file(file, files.get(file.name))]


def _file(old: FileDescriptorProto, new: FileDescriptorProto | None) -> Found:
    if new is None or new.package != old.package:
        yield f"{old.name} is gone, or has another package"
        return
    for name, (mine, other) in _pairs(old.message_type, new.message_type).items():
        yield from _message(name, mine, other)
    for name, (mine, other) in _pairs(old.enum_type, new.enum_type).items():
        yield from _enum(name, mine, other)
    for name, (mine, other) in _pairs(old.service, new.service).items():
        yield from _service(name, mine, other)


def _pairs(old: Iterable[Any], new: Iterable[Any], key: str = "name") -> dict[Any, tuple[Any, Any]]:
    """Each of the old ones with its newer self, or None."""
    newer = {getattr(each, key): each for each in new}
    return {getattr(each, key): (each, newer.get(getattr(each, key))) for each in old}


def _message(path: str, old: DescriptorProto, new: DescriptorProto | None) -> Found:
    if new is None:
        yield f"message {path} is gone"
        return
    for number, (mine, other) in _pairs(old.field, new.field, "number").items():
        where = f"{path}.{mine.name} = {number}"
        if other is None:
            yield f"{where} is gone"
        elif _group(old, mine) != _group(new, other):
            yield f"{where} is in another oneof"
        else:
            yield from _same(where, mine, other, FIELD)
    for name, (mine, other) in _pairs(old.nested_type, new.nested_type).items():
        yield from _message(f"{path}.{name}", mine, other)
    for name, (mine, other) in _pairs(old.enum_type, new.enum_type).items():
        yield from _enum(f"{path}.{name}", mine, other)


def _group(message: DescriptorProto, field: Any) -> str | None:
    return message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else None


def _enum(path: str, old: EnumDescriptorProto, new: EnumDescriptorProto | None) -> Found:
    known = {} if new is None else {value.name: value.number for value in new.value}
    for value in old.value:
        if known.get(value.name) != value.number:
            yield f"{path}.{value.name} = {value.number} is gone"


def _service(path: str, old: ServiceDescriptorProto, new: ServiceDescriptorProto | None) -> Found:
    for name, (mine, other) in _pairs(old.method, () if new is None else new.method).items():
        if other is None:
            yield f"rpc {path}.{name} is gone"
        else:
            yield from _same(f"rpc {path}.{name}", mine, other, METHOD)


def _same(where: str, old: Any, new: Any, names: Iterable[str]) -> Found:
    for name in names:
        if getattr(old, name) != getattr(new, name):
            yield f"{where} has another {name}: {getattr(new, name)} instead of {getattr(old, name)}"
