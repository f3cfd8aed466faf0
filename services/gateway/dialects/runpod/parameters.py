"""Reading JSON values by a table: one row a parameter, every fault collected, nothing converted silently.

The rules of the dialect: null for an optional key is the key's absence; integers stand for floats, never the other
way round; strings and booleans never stand for numbers; unknown keys are left over for the endpoint to judge.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from services.domain.addresses import parse_target
from services.domain.errors import EgressRefused, Violation
from services.domain.rules import Range

Kind = Literal["integer", "number", "boolean", "text", "texts", "url", "choice", "seed"]

_WORDS: dict[str, str] = {
    "integer": "must be an integer",
    "number": "must be a number",
    "boolean": "must be true or false",
    "text": "must be a string",
    "texts": "must be a list of strings",
    "url": "must be a string with an http or https address",
    "choice": "must be a string",
    "seed": "must be an integer",
}
_TYPES: dict[str, str] = {"number": "number", "boolean": "boolean", "texts": "array"} | dict.fromkeys(
    ("integer", "seed"), "integer"
)
SEED_LIMIT = 2**32 - 1
"""Largest seed that the dialect knows."""
NO_CHOICES: Mapping[Any, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Parameter:
    """One key of an input object.

    Attributes:
        name: the key.
        kind: what its value must be; of a seed -1 asks for a random one.
        target: field of the canonical message it sets, or "" where the endpoint places it itself.
        meaning: one sentence for the reference.
        default: value that its absence stands for, for the reference.
        limit: allowed numbers.
        choices: allowed values and what they mean; empty: the value is meant as it stands.
        length: fewest and most characters of a text.
        most: most elements of a list.
        required: it must be present and not null.
        aliases: further spellings, looked at in this order when the name itself is absent.
        absence: a word that stands for the key's absence, as null does.
    """

    name: str
    kind: Kind
    target: str
    meaning: str
    default: Any = None
    limit: Range | None = None
    choices: Mapping[Any, Any] = field(default_factory=lambda: NO_CHOICES)
    length: tuple[int, int] = (0, 8192)
    most: int = 0
    required: bool = False
    aliases: tuple[str, ...] = ()
    absence: str | None = None

    def spelling_in(self, given: Mapping[str, Any]) -> str:
        """The spelling that is present with a value other than null; the name itself when none is."""
        return next((name for name in (self.name, *self.aliases) if given.get(name) is not None), self.name)

    def check(self, value: Any) -> str:
        """The rule that a value breaks, as a sentence part; "" when it breaks none."""
        if not self._has_kind(value):
            return _WORDS[self.kind]
        if isinstance(value, list):
            return self._check_texts(value)
        if isinstance(value, str):
            return self._check_text(value)
        if self.choices and value not in self.choices:
            return self._rule_of_choices()
        return "" if self.limit is None or self.limit.holds(value) else self.limit.rule

    def _has_kind(self, value: Any) -> bool:
        if self.kind == "boolean":
            return isinstance(value, bool)
        if self.kind == "texts":
            return isinstance(value, list) and all(isinstance(element, str) for element in value)
        if self.kind in ("text", "url", "choice"):
            return isinstance(value, str)
        if isinstance(value, bool):
            return False
        if self.kind in ("integer", "seed"):
            return isinstance(value, int)
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))

    def _rule_of_choices(self) -> str:
        return "must be one of " + ", ".join(str(choice) for choice in self.choices)

    def _check_texts(self, value: Sequence[str]) -> str:
        if len(value) > self.most:
            return f"must have at most {self.most} elements"
        faults = [(index, self._check_text(text)) for index, text in enumerate(value)]
        return "; ".join(f"element {index} {fault}" for index, fault in faults if fault)

    def _check_text(self, value: str) -> str:
        if any("\ud800" <= character <= "\udfff" for character in value):
            return "must be valid Unicode"
        if self.kind == "choice":
            return "" if value in self.choices else self._rule_of_choices()
        if self.kind == "url":
            return _check_address(value)
        least, most = self.length
        if least and not value.strip():
            return "must not be empty"
        return "" if len(value) <= most else f"must have {least} to {most} characters"

    def schema(self) -> dict[str, Any]:
        """JSON schema of the value."""
        schema: dict[str, Any] = {"type": _TYPES.get(self.kind, "string"), "description": self.meaning}
        if self.default is not None:
            schema["default"] = self.default
        if self.choices and self.kind != "boolean":
            schema["enum"] = list(self.choices)
        if self.kind == "url" and self.absence is None:
            schema["format"] = "uri"
        lengths = {"minLength": self.length[0], "maxLength": self.length[1]}
        if self.kind == "text":
            schema |= lengths
        if self.kind == "texts":
            schema |= {"maxItems": self.most, "items": {"type": "string"} | lengths}
        return schema | _limits_of(self.limit)


def integer(name: str, target: str, low: int, high: int, default: int | None, meaning: str) -> Parameter:
    """A whole number between two others."""
    return Parameter(name, "integer", target, meaning, default, Range(target, low, high))


def number(name: str, target: str, limit: Range, default: float | None, meaning: str) -> Parameter:
    """A number."""
    return Parameter(name, "number", target, meaning, default, limit)


def switch(
    name: str,
    target: str,
    default: bool | None,
    meaning: str,
    choices: Mapping[bool, Any] = NO_CHOICES,
) -> Parameter:
    """True or false; `choices` where that means something else in canonical words."""
    return Parameter(name, "boolean", target, meaning, default, choices=choices)


def seed(target: str, default: int | None, meaning: str) -> Parameter:
    """A seed that may be -1."""
    return Parameter("seed", "seed", target, meaning, default, Range(target, -1, SEED_LIMIT))


def _check_address(value: str) -> str:
    try:
        parse_target(value)
    except EgressRefused as error:
        return "; ".join(violation.rule for violation in error.violations)
    return ""


def _limits_of(limit: Range | None) -> dict[str, Any]:
    if limit is None:
        return {}
    found: dict[str, Any] = {}
    if limit.low is not None:
        found["exclusiveMinimum" if limit.above else "minimum"] = limit.low
    if limit.high is not None:
        found["exclusiveMaximum" if limit.below else "maximum"] = limit.high
    return found | ({"multipleOf": limit.multiple} if limit.multiple else {})


@dataclass(slots=True)
class Reading:
    """What came of reading one object.

    Attributes:
        values: accepted values by parameter name.
        spelled: the spelling each parameter was found under, or its name.
        faults: every broken rule, with the caller's path.
        unknown: paths of keys that no row names.
    """

    values: dict[str, Any] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    faults: list[Violation] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def read_object(
    given: Mapping[str, Any], rows: Sequence[Parameter], path: str = "", known: Iterable[str] = ()
) -> Reading:
    """Reads an object by a table.

    Args:
        given: the object as parsed from JSON.
        rows: its parameters.
        path: what names the object, put before its keys: ``samples[0].``.
        known: further keys that the caller reads itself.

    Returns:
        Values, faults and unknown keys.
    """
    reading = Reading()
    for row in rows:
        name = row.spelling_in(given)
        reading.spelled[row.name] = name
        value = given.get(name)
        if value is None or (row.absence is not None and value == row.absence):
            if row.required:
                reading.faults.append(Violation(path + name, "is required"))
            continue
        fault = row.check(value)
        if fault:
            reading.faults.append(Violation(path + name, fault))
        else:
            reading.values[row.name] = value
    names = {name for row in rows for name in (row.name, *row.aliases)} | set(known)
    reading.unknown = [path + printable(key) for key in given if key not in names]
    return reading


def printable(key: str) -> str:
    """A caller's key as it may stand in a log or a label: cut, and without characters that no encoding holds."""
    return key[:100].encode("ascii", "backslashreplace").decode()


def object_schema(rows: Sequence[Parameter]) -> dict[str, Any]:
    """JSON schema of an object with these parameters."""
    properties = {row.name: row.schema() for row in rows}
    required = [row.name for row in rows if row.required]
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})
