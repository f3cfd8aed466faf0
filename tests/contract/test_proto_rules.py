"""The rules that the protos follow, read from their descriptors: names, shapes, numbers and comments."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from tests.protos import FILES, comments, compiled, files_by_name

MESSAGE_NAME = re.compile(r"([A-Z][a-z0-9]*)+")
FIELD_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
VALUE_NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")

# Numbers of the descriptor's own fields, as paths in the source info spell them.
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
_MESSAGE_FIELD, _MESSAGE_NESTED, _MESSAGE_ENUM, _ENUM_VALUE, _SERVICE_METHOD = 2, 3, 4, 2, 2


@dataclass(frozen=True)
class Item:
    """One commented thing: where it is in the source info, its full name, its descriptor."""

    path: tuple[int, ...]
    name: str
    descriptor: object


def messages(file: descriptor_pb2.FileDescriptorProto) -> Iterator[Item]:
    def nested(path: tuple[int, ...], prefix: str, message: descriptor_pb2.DescriptorProto) -> Iterator[Item]:
        yield Item(path, prefix + message.name, message)
        for index, inner in enumerate(message.nested_type):
            if not inner.options.map_entry:
                yield from nested((*path, _MESSAGE_NESTED, index), f"{prefix}{message.name}.", inner)

    for index, message in enumerate(file.message_type):
        yield from nested((_MESSAGE, index), "", message)


def enums(file: descriptor_pb2.FileDescriptorProto) -> Iterator[Item]:
    for index, enum in enumerate(file.enum_type):
        yield Item((_ENUM, index), enum.name, enum)
    for item in messages(file):
        assert isinstance(item.descriptor, descriptor_pb2.DescriptorProto)
        for index, enum in enumerate(item.descriptor.enum_type):
            yield Item((*item.path, _MESSAGE_ENUM, index), f"{item.name}.{enum.name}", enum)


def fields(file: descriptor_pb2.FileDescriptorProto) -> Iterator[Item]:
    for item in messages(file):
        assert isinstance(item.descriptor, descriptor_pb2.DescriptorProto)
        for index, field in enumerate(item.descriptor.field):
            yield Item((*item.path, _MESSAGE_FIELD, index), f"{item.name}.{field.name}", field)


def values(file: descriptor_pb2.FileDescriptorProto) -> Iterator[Item]:
    for item in enums(file):
        assert isinstance(item.descriptor, descriptor_pb2.EnumDescriptorProto)
        for index, value in enumerate(item.descriptor.value):
            yield Item((*item.path, _ENUM_VALUE, index), f"{item.name}.{value.name}", value)


def services(file: descriptor_pb2.FileDescriptorProto) -> Iterator[Item]:
    for index, service in enumerate(file.service):
        yield Item((_SERVICE, index), service.name, service)


def methods(file: descriptor_pb2.FileDescriptorProto) -> Iterator[Item]:
    for item in services(file):
        assert isinstance(item.descriptor, descriptor_pb2.ServiceDescriptorProto)
        for index, method in enumerate(item.descriptor.method):
            yield Item((*item.path, _SERVICE_METHOD, index), f"{item.name}.{method.name}", method)


def faults_of(file: descriptor_pb2.FileDescriptorProto) -> list[str]:
    """Every broken rule of one file, as `name: rule`."""
    return [
        *_package_faults(file),
        *_name_faults(file),
        *_method_faults(file),
        *_enum_faults(file),
        *_comment_faults(file),
        *_job_id_faults(file),
    ]


def _package_faults(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    if file.package != file.name.rpartition("/")[0].replace("/", "."):
        yield f"{file.name}: the package is the directory"
    if not re.fullmatch(r"likeness\.[a-z]+\.v[1-9][0-9]*", file.package):
        yield f"{file.name}: the package ends in its version"
    if file.syntax != "proto3":
        yield f"{file.name}: the syntax is proto3"


def _name_faults(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    for item in [*messages(file), *enums(file), *services(file), *methods(file)]:
        if not MESSAGE_NAME.fullmatch(item.name.rpartition(".")[2]):
            yield f"{item.name}: the name is in PascalCase"
    for item in services(file):
        if not item.name.endswith("Service"):
            yield f"{item.name}: a service ends in Service"
    for item in fields(file):
        if not FIELD_NAME.fullmatch(item.name.rpartition(".")[2]):
            yield f"{item.name}: a field is in lower_snake_case"


def _method_faults(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    """Each method has a request and a response of its own, in its own package."""
    for item in methods(file):
        method = item.descriptor
        assert isinstance(method, descriptor_pb2.MethodDescriptorProto)
        for found, suffix in ((method.input_type, "Request"), (method.output_type, "Response")):
            if found != f".{file.package}.{method.name}{suffix}":
                yield f"{item.name}: takes and gives its own {method.name}{suffix}"


def _enum_faults(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    for item in enums(file):
        enum = item.descriptor
        assert isinstance(enum, descriptor_pb2.EnumDescriptorProto)
        prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", enum.name).upper() + "_"
        if enum.value[0].number != 0 or enum.value[0].name != f"{prefix}UNSPECIFIED":
            yield f"{item.name}: value 0 is {prefix}UNSPECIFIED"
        for value in enum.value:
            if not value.name.startswith(prefix) or not VALUE_NAME.fullmatch(value.name):
                yield f"{item.name}.{value.name}: a value is upper case with the prefix {prefix}"


def _comment_faults(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    commented = comments(file)
    items = [messages(file), enums(file), fields(file), values(file), services(file), methods(file)]
    for item in (item for kind in items for item in kind):
        if item.path not in commented:
            yield f"{item.name}: has no leading comment"


def _job_id_faults(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    for item in messages(file):
        assert isinstance(item.descriptor, descriptor_pb2.DescriptorProto)
        numbers = {field.name: field.number for field in item.descriptor.field}
        is_resource = item.name.endswith("Job") or item.name == "JobEvent"
        if is_resource and numbers.get("job_id") != 1:
            yield f"{item.name}: job_id is field 1"


FOREIGN = {"likeness/scaling/v1/external_scaler.proto"}
"""Protocols of other projects, whose names are not ours to choose."""


@pytest.mark.parametrize("name", sorted(set(FILES) - FOREIGN))
def test_the_file_keeps_every_rule(name: str) -> None:
    assert faults_of(files_by_name()[name]) == []


def test_a_message_name_is_used_once_in_a_package() -> None:
    names = [f"{file.package}.{item.name}" for file in files_by_name().values() for item in messages(file)]
    assert sorted(names) == sorted(set(names))


BROKEN = """
syntax = "proto3";
package likeness.other.v1;
message lower { string Name = 1; }
// A job.
message PaintJob {
  // Its state.
  Colour colour = 1;
}
// A colour.
enum Colour {
  // Red.
  RED = 0;
}
// Paints.
service Painter {
  // Paints.
  rpc Paint(PaintJob) returns (PaintJob);
}
"""


def test_a_file_that_breaks_the_rules_is_reported_rule_by_rule(tmp_path: Path) -> None:
    path = tmp_path / "likeness" / "paint" / "v1" / "paint.proto"
    path.parent.mkdir(parents=True)
    path.write_text(BROKEN)
    (file,) = compiled(tmp_path, ["likeness/paint/v1/paint.proto"]).file
    assert sorted(faults_of(file)) == [
        "Colour.RED: a value is upper case with the prefix COLOUR_",
        "Colour: value 0 is COLOUR_UNSPECIFIED",
        "PaintJob: job_id is field 1",
        "Painter.Paint: takes and gives its own PaintRequest",
        "Painter.Paint: takes and gives its own PaintResponse",
        "Painter: a service ends in Service",
        "likeness/paint/v1/paint.proto: the package is the directory",
        "lower.Name: a field is in lower_snake_case",
        "lower.Name: has no leading comment",
        "lower: has no leading comment",
        "lower: the name is in PascalCase",
    ]
