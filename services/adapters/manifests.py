"""Messages as JSON documents with one spelling, so that equal messages have equal digests.

Model and dataset manifests are stored in this form and named by the SHA-256 of these bytes. Fields keep the names
they have in the protos; fields with their default value are left out; unknown fields of a newer version are ignored.
"""

import hashlib
import json
from typing import TypeVar

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message

from services.domain.errors import BadInput

M = TypeVar("M", bound=Message)


def to_json(message: Message) -> bytes:
    """Writes a message: keys sorted, no spaces, UTF-8."""
    content = MessageToDict(message, preserving_proto_field_name=True)
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def from_json(data: bytes, kind: type[M]) -> M:
    """Reads a message back.

    Args:
        data: what :func:`to_json` wrote.
        kind: class of the message.

    Raises:
        BadInput: not such a document.
    """
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ParseError("not an object")
        return ParseDict(content, kind(), ignore_unknown_fields=True)
    except (ValueError, ParseError) as error:
        raise BadInput(f"the document is not a {kind.DESCRIPTOR.name}") from error


def digest_of(data: bytes) -> str:
    """SHA-256 of some bytes, lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()
