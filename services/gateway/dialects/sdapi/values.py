"""Reading values as real clients send them: numbers as strings, booleans as words, and null as the word "null".

One row a parameter and every fault collected, as in the other dialects; what differs is that much is converted. Unknown
keys are ignored, always.
"""

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from services.domain.addresses import parse_target
from services.domain.errors import EgressRefused, InvalidSpec, Violation
from services.domain.rules import Range

Kind = Literal[
    "text", "integer", "number", "numbers", "switch", "link", "links", "models", "opaque", "word", "picture"
]

NULLISH = frozenset({"", "null", "none", "undefined"})
"""Words that stand for an absent value, in any case, with or without surrounding space."""
NO_WEBHOOK = NULLISH | {"0", "no"}
NO_MODEL = NULLISH | {"no", "lora_model_id", "embeddings_model_id"}
"""The last two are placeholders of the documentation that clients paste unchanged."""
YES, NO = frozenset({"yes", "true", "1", "on"}), frozenset({"no", "false", "0", "off"})
MAX_NUMBER_CHARS = 40
MAX_TRACK_BYTES = 4096
"""A client packs its chat's id, a token and the prompt into `track_id`."""

_WORDS: Mapping[str, str] = {
    "text": "must be a string",
    "integer": "must be an integer",
    "number": "must be a number",
    "numbers": "must be a number, or several numbers separated by commas",
    "switch": "must be yes or no",
    "link": "must be an http or https address",
    "links": "must be a list of http or https addresses",
    "models": "must be an id, or several ids separated by commas",
    "picture": "must be an http or https address, or a picture in base64",
    "opaque": f"must be a string of at most {MAX_TRACK_BYTES} bytes, or a number",
}
_DATA_URI = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?[0-9]+(?:\.0*)?")


class Misfit(Exception):
    """A value that does not fit; its text is the rule as a sentence part, "" for the one of its kind."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as a request names it: by its address, or itself.

    Attributes:
        url: address; "": the bytes are here.
        data: a file of any type.
    """

    url: str = ""
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One field of a request.

    Attributes:
        name: the field.
        kind: what its value is read as.
        meaning: one sentence for the reference.
        default: what its absence stands for, for the reference; it is placed by whoever reads the result.
        required: it must be there.
        limit: allowed numbers.
        length: most characters of a text.
        aliases: further spellings, the first that is present wins.
    """

    name: str
    kind: Kind
    meaning: str
    default: Any = None
    required: bool = False
    limit: Range | None = None
    length: int = 4000
    aliases: tuple[str, ...] = ()

    def value_in(self, given: Mapping[str, Any]) -> Any:
        """What the caller sent for it under any spelling; None for everything that means nothing."""
        for name in (self.name, *self.aliases):
            if not self._is_nothing(given.get(name)):
                return given[name]
        return None

    def _is_nothing(self, value: Any) -> bool:
        if self.kind == "link" and not isinstance(value, (str, bool)) and value == 0:
            return True
        words = {"link": NO_WEBHOOK, "models": NO_MODEL}.get(self.kind, NULLISH)
        if isinstance(value, list):
            return not [item for item in value if not self._is_nothing(item)]
        return value is None or (isinstance(value, str) and value.strip().lower() in words)

    def read(self, value: Any) -> Any:
        """A value in the form of its kind.

        Raises:
            Misfit: it cannot be read so, or breaks a rule.
        """
        read = _READERS[self.kind](value)
        if isinstance(read, str) and self.kind == "text" and len(read) > self.length:
            raise Misfit(f"must have at most {self.length} characters")
        numbers = read if isinstance(read, list) else [read]
        if self.limit is not None and not all(self.limit.holds(number) for number in numbers):
            raise Misfit(self.limit.rule)
        return read

    def schema(self) -> dict[str, Any]:
        """JSON schema of the value in its plainest form."""
        kinds: dict[str, dict[str, Any]] = {
            "integer": {"type": ["integer", "string"]},
            "number": {"type": ["number", "string"]},
            "numbers": {"type": ["number", "string"]},
            "switch": {"type": ["string", "boolean"], "enum": ["yes", "no", True, False]},
            "links": {"type": "array", "items": {"type": "string", "format": "uri"}},
            "opaque": {"type": ["string", "number"]},
        }
        shown = kinds.get(self.kind, {"type": "string"}) | {"description": self.meaning}
        return shown | ({"default": self.default} if self.default is not None else {})


def text_of(value: Any) -> str:
    """A string that every encoding holds."""
    if not isinstance(value, str):
        raise Misfit
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise Misfit("must be valid Unicode")
    return value


def integer_of(value: Any) -> int:
    """512, 512.0, "512" and " 512.0 " are the same."""
    if isinstance(value, bool):
        raise Misfit
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and len(value) <= MAX_NUMBER_CHARS and _INTEGER.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0])
    if isinstance(value, int):
        return value
    raise Misfit


def number_of(value: Any) -> float:
    """7.5 and "7.5" are the same; infinities are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise Misfit
    try:
        number = float(value if not isinstance(value, str) else value[: MAX_NUMBER_CHARS + 1])
    except (ValueError, OverflowError) as error:
        raise Misfit from error
    if not math.isfinite(number) or (isinstance(value, str) and ("_" in value or not value.isascii())):
        raise Misfit
    return number


def numbers_of(value: Any) -> list[float]:
    """One number, or several as a list or as one text with commas; an empty place is 1."""
    if not isinstance(value, (str, list)):
        return [number_of(value)]
    parts = text_of(value).split(",") if isinstance(value, str) else value
    return [
        1.0 if part is None or str(part).strip().lower() in NULLISH else number_of(part) for part in parts
    ]


def switch_of(value: Any) -> bool:
    """Yes or no in any of the spellings that are seen."""
    word = str(value).strip().lower() if isinstance(value, (str, bool, int)) else ""
    if word in YES | NO:
        return word in YES
    raise Misfit


def link_of(value: Any) -> str:
    """An http or https address without credentials; where it leads is not looked at."""
    text = text_of(value).strip()
    try:
        parse_target(text)
    except EgressRefused as error:
        raise Misfit(address_rule(error)) from error
    return text


def address_rule(error: InvalidSpec) -> str:
    """The rule that an address breaks, as a sentence part."""
    return f"must be a usable address ({'; '.join(violation.rule for violation in error.violations)})"


def links_of(value: Any) -> list[str]:
    """A list of addresses; one string may hold several, parted by commas or white space."""
    parts = re.split(r"[,\s]+", text_of(value)) if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise Misfit
    return [link_of(part) for part in parts if part not in (None, "")]


def picture_of(value: Any) -> Picture:
    """An address, or a file in base64, with or without the prefix of a data URI."""
    text = text_of(value).strip()
    if re.match("https?:", text, re.IGNORECASE):
        return Picture(url=link_of(text))
    coded = "".join(_DATA_URI.sub("", text, count=1).split())
    try:
        data = base64.b64decode(coded + "=" * (-len(coded) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Misfit from error
    if not data:
        raise Misfit
    return Picture(data=data)


def models_of(value: Any) -> list[str]:
    """Ids, as a list or as one text with commas."""
    parts = text_of(value).split(",") if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise Misfit
    return [part for part in (text_of(part).strip() for part in parts) if part.lower() not in NO_MODEL]


def opaque_of(value: Any) -> str | int | float:
    """What is handed back unchanged, with its JSON type."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise Misfit
    if isinstance(value, str) and len(text_of(value).encode()) > MAX_TRACK_BYTES:
        raise Misfit
    if isinstance(value, int) and abs(value) >= 2**63:
        raise Misfit
    return value


def word_of(value: Any) -> str:
    """A word that is never wrong: what is not understood means nothing."""
    return value.strip().lower() if isinstance(value, str) else ""


_READERS: Mapping[str, Any] = {
    "word": word_of,
    "text": text_of,
    "integer": integer_of,
    "number": number_of,
    "numbers": numbers_of,
    "switch": switch_of,
    "link": link_of,
    "links": links_of,
    "models": models_of,
    "picture": picture_of,
    "opaque": opaque_of,
}


@dataclass(slots=True)
class Reading:
    """What came of reading one body.

    Attributes:
        values: what was sent and understood, by parameter name; what means nothing is not in it.
        missing: names of required parameters that are not there.
        faults: rules that values break.
    """

    values: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    faults: list[Violation] = field(default_factory=list)

    def fault(self, name: str, rule: str) -> None:
        """Adds a broken rule."""
        self.faults.append(Violation(name, rule))


def read_body(given: Mapping[str, Any], rows: Sequence[Parameter]) -> Reading:
    """Reads a body by a table.

    Args:
        given: the body as a mapping.
        rows: its parameters.

    Returns:
        Values and faults.
    """
    reading = Reading()
    for row in rows:
        value = row.value_in(given)
        if value is None:
            reading.missing += [row.name] if row.required else []
            continue
        try:
            reading.values[row.name] = row.read(value)
        except Misfit as error:
            reading.fault(row.name, str(error) or _WORDS[row.kind])
    return reading


def body_schema(rows: Sequence[Parameter]) -> dict[str, Any]:
    """JSON schema of a body with these parameters."""
    schema: dict[str, Any] = {"type": "object", "properties": {row.name: row.schema() for row in rows}}
    required = [row.name for row in rows if row.required]
    return schema | ({"required": required} if required else {})


def yes_no(value: bool) -> str:
    """How a switch is echoed."""
    return "yes" if value else "no"
