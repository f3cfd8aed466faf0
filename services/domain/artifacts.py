"""Names of stored things: artifact keys, references, media types, size limits. The only file that spells a key."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Final

from services.domain.errors import InvalidSpec

SHARED_SCOPE: Final = "shared"
CHUNK_BYTES: Final = 1024 * 1024
MAX_DOCUMENT_BYTES: Final = 64 * 1024
SINGLE_FILE_NAME: Final = "model.safetensors"
"""Where the weights of a single-file model lie in its folder."""
SINGLE_FILE_CONFIG: Final = "config"
"""Folder beside them: configs, tokenizer and scheduler, laid out as a diffusers folder."""
ADAPTER_PATTERN: Final = "lora-*.safetensors"
"""LoRA files in the folder of a model's part: the loader adds them to its weights, in the order of their names."""
HUB_REPOSITORY: Final = re.compile(r"[A-Za-z0-9_-][\w.-]*/[A-Za-z0-9_-][\w.-]*", re.ASCII)
"""A repository of the model hub: `OWNER/NAME`."""
MEDIA_TYPES: Final = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".safetensors": "application/octet-stream",
    ".txt": "text/plain",
    ".zip": "application/zip",
}

_PROJECT: Final = re.compile(r"^[a-z0-9-]{1,40}\Z")
_DIGEST: Final = re.compile(r"^[0-9a-f]{64}\Z")
_REF_KIND: Final = re.compile(r"^[a-z_]{1,32}\Z")
_REF_NAME: Final = re.compile(r"^(?!\.)[A-Za-z0-9_.-]{1,128}\Z")
_KEY: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+")
_BLOB_KEY: Final = re.compile(
    r"^(?:shared|projects/(?P<project>[a-z0-9-]{1,40}))/blobs/sha256/(?P<digest>[0-9a-f]{64})\Z"
)


def scope(project: str) -> str:
    """The prefix of everything a project owns; the shared catalogue for "".

    Raises:
        InvalidSpec: not a project id.
    """
    if not project:
        return SHARED_SCOPE
    if not _PROJECT.match(project):
        raise InvalidSpec("must be 1 to 40 lower-case letters, digits or '-'", "project_id")
    return f"projects/{project}"


def blob_key(project: str, digest: str) -> str:
    """The key of a blob with this SHA-256, lower-case hexadecimal."""
    if not _DIGEST.match(digest):
        raise InvalidSpec("must be a SHA-256 in lower-case hexadecimal", "digest")
    return f"{scope(project)}/blobs/sha256/{digest}"


def digest_of_key(key: str) -> str:
    """The SHA-256 that a blob's key promises.

    Raises:
        InvalidSpec: not the key of a blob.
    """
    return _match_blob(key)["digest"]


def project_of_key(key: str) -> str:
    """The project that owns a blob; "" for the shared catalogue."""
    return _match_blob(key)["project"] or ""


def is_blob_key(key: str) -> bool:
    """The text is well formed as a blob's key."""
    return _BLOB_KEY.match(key) is not None


def ref_key(project: str, kind: str, name: str) -> str:
    """The key of a reference document.

    Raises:
        InvalidSpec: kind or name is malformed.
    """
    if not _REF_KIND.match(kind):
        raise InvalidSpec("must be 1 to 32 lower-case letters or '_'", "ref.kind")
    if not _REF_NAME.match(name):
        raise InvalidSpec("must be 1 to 128 letters, digits, '_', '.' or '-'", "ref.name")
    return f"{scope(project)}/refs/{kind}/{name}"


def is_ref_name(name: str) -> bool:
    """The text can name a reference, a model, or a file in a link."""
    return _REF_NAME.match(name) is not None


def ref_prefix(project: str, kind: str) -> str:
    """What the keys of all references of a kind begin with."""
    return f"{scope(project)}/refs/{kind}/"


def checked_key(key: str) -> str:
    """The key itself, when a store may use it as a path: no part is empty or begins with a dot.

    Raises:
        InvalidSpec: it is not such a key.
    """
    if len(key) > 512 or not _KEY.fullmatch(key):
        raise InvalidSpec("is not an artifact key", "key")
    return key


def media_type_of(file_name: str) -> str:
    """Media type by the name's ending; application/octet-stream for the rest."""
    dot = file_name.rfind(".")
    return MEDIA_TYPES.get(file_name[dot:].lower(), "application/octet-stream")


def adapter_name(number: int) -> str:
    """File name of a part's LoRA, counted from 0 in the order of training."""
    return f"lora-{number:03d}.safetensors"


def is_adapter(path: str) -> bool:
    """A file of a model, by its path there, is a LoRA."""
    return PurePosixPath(path).match(ADAPTER_PATTERN)


def newest_adapter(paths: Sequence[str]) -> str:
    """The LoRA that a model was trained to, among the paths of its files; "": there is none.

    Those with lower numbers belong to what it was trained from.
    """
    adapters = [path for path in paths if is_adapter(path)]
    return max(adapters, key=lambda path: PurePosixPath(path).name, default="")


def _match_blob(key: str) -> re.Match[str]:
    found = _BLOB_KEY.match(key)
    if found is None:
        raise InvalidSpec("is not the key of a blob", "key")
    return found
