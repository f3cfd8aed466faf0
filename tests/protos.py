"""The protos as descriptors with their comments, which the generated stubs do not keep."""

import tempfile
from functools import cache
from pathlib import Path

import grpc_tools
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

ROOT = Path(__file__).parents[1] / "protos"
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))

_WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


def compiled(root: Path, files: list[str]) -> FileDescriptorSet:
    """Compiles protos to descriptors with source info."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set.binpb"
        arguments = [
            "protoc",
            f"-I{root}",
            f"-I{_WELL_KNOWN}",
            "--include_source_info",
            f"--descriptor_set_out={out}",
            *files,
        ]
        assert protoc.main(arguments) == 0, "the protos do not compile"
        return FileDescriptorSet.FromString(out.read_bytes())


@cache
def files_by_name() -> dict[str, FileDescriptorProto]:
    """All files of the project by their paths below `protos`."""
    return {file.name: file for file in compiled(ROOT, FILES).file}


def comments(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """The comment before each thing of a file, by its path in the source info; things without one are left out."""
    return {
        tuple(location.path): location.leading_comments.strip()
        for location in file.source_code_info.location
        if location.leading_comments.strip()
    }
