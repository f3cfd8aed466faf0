"""Rules that requests are checked against: ranges of numbers, lengths of texts, addresses, pages.

What checks a field of a specification returns violations instead of raising, so that a caller hears of all faults.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from services.domain.addresses import parse_target
from services.domain.errors import EgressRefused, InvalidSpec, Violation

MAX_SEED = 2**63 - 1
MAX_PAGE = 200
DEFAULT_PAGE = 50


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers a field may hold.

    Attributes:
        field: name of the field in its message.
        low: smallest value; None: no limit.
        high: largest value; None: no limit.
        above: `low` itself is not allowed.
        below: `high` itself is not allowed.
        multiple: allowed values are multiples of this; 0: any.
    """

    field: str
    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    multiple: int = 0

    def holds(self, value: float) -> bool:
        """The value is allowed; not-a-number never is."""
        low = float("-inf") if self.low is None else self.low
        high = float("inf") if self.high is None else self.high
        inside = (value > low if self.above else value >= low) and (
            value < high if self.below else value <= high
        )
        finite = value == value and abs(value) != float("inf")
        return inside and finite and (not self.multiple or value % self.multiple == 0)

    @property
    def rule(self) -> str:
        """The rule as a sentence part: "must be between 1 and 10"."""
        return "must be " + self._limits() + (f" and a multiple of {self.multiple}" if self.multiple else "")

    def _limits(self) -> str:
        if self.low is None and self.high is None:
            return "a finite number"
        if self.high is None:
            return f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        if self.low is None:
            return f"below {_number(self.high)}" if self.below else f"at most {_number(self.high)}"
        if self.above or self.below:
            low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
            return f"{low} and {'below' if self.below else 'at most'} {_number(self.high)}"
        return f"between {_number(self.low)} and {_number(self.high)}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def check_ranges(message: Any, ranges: Iterable[Range], path: str = "") -> list[Violation]:
    """Checks the fields of a message that are set.

    Args:
        message: any protobuf message.
        ranges: what its fields may hold.
        path: what names the message itself, put before field names.

    Returns:
        One violation a field out of range.
    """
    found = []
    for limit in ranges:
        field = message.DESCRIPTOR.fields_by_name[limit.field]
        if field.has_presence and not message.HasField(limit.field):
            continue
        if not limit.holds(getattr(message, limit.field)):
            found.append(Violation(path + limit.field, limit.rule))
    return found


def page_length(page_size: int) -> int:
    """Elements of one page of a listing.

    Args:
        page_size: what was asked for, 1..200; 0: 50.

    Raises:
        InvalidSpec: it is out of range.
    """
    if not 0 <= page_size <= MAX_PAGE:
        raise InvalidSpec(f"must be between 0 and {MAX_PAGE}", "page_size")
    return page_size or DEFAULT_PAGE


def check_text(field: str, text: str, at_most: int, at_least: int = 0) -> list[Violation]:
    """Checks the length of a text in characters; one that must not be empty must not be blank either."""
    if at_least and not text.strip():
        return [Violation(field, "is required")]
    if not at_least <= len(text) <= at_most:
        return [Violation(field, f"must have {at_least} to {at_most} characters")]
    return []


def check_url(field: str, url: str) -> list[Violation]:
    """Checks that a text is an http or https address without credentials; where it leads is not looked at."""
    try:
        parse_target(url)
    except EgressRefused as error:
        return [Violation(field, violation.rule) for violation in error.violations]
    return []


def check_enum(message: Any, field: str, path: str = "") -> list[Violation]:
    """Checks that an enumeration holds a value this version knows; proto3 lets any number pass."""
    kind = message.DESCRIPTOR.fields_by_name[field].enum_type
    if getattr(message, field) in kind.values_by_number:
        return []
    return [Violation(path + field, "is not a value that is known")]
