"""What all endpoints of this dialect share: how a body is read, how errors look, which words every answer carries.

The dialect is that of stablediffusionapi.com. It spells a word `messege` on older routes and `message` on newer ones;
here every object that has one of them has both. An error is an answer with status 200 unless `strict` is asked for.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from services.domain.errors import (
    InvalidSpec,
    LikenessError,
    NotFound,
    PermissionDenied,
    QueueFull,
    RateLimited,
    Unauthenticated,
    Violation,
    WrongState,
    row_of,
)
from services.gateway.dialects.base import Answer
from services.gateway.dialects.sdapi.values import NULLISH
from services.gateway.dialects.strict_json import parse_json

DIALECT = "sdapi"
MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_FORM_FIELDS = 1000
MAX_FAULTS = 50
RETRY_AFTER_S = 5

_LISTED = re.compile(r"(\w+)\[[0-9]*\]")


class BadBody(InvalidSpec):
    """The body is neither JSON nor a form."""


class MissingFields(InvalidSpec):
    """Required fields are not there; each violation's rule is empty."""


@dataclass(frozen=True, slots=True)
class Told:
    """An error whose sentence is part of the contract.

    Attributes:
        message: the sentence.
        http_status: status in strict mode.
    """

    message: str
    http_status: int


BAD_KEY = Told("Invalid Api Key", 401)
NO_MODEL = Told("Model id not found", 404)
NO_TRAINING = Told("Training id not found", 404)
NO_REQUEST = Told("Request id not found", 404)


def read_body(body: bytes) -> dict[str, Any]:
    """Reads a body as JSON whatever its content type says, else as a form; an empty one has no fields.

    Raises:
        BadBody: it is neither.
    """
    text = body.strip()
    if not text:
        return {}
    try:
        given = parse_json(text)
    except InvalidSpec as error:
        if text[:1] in b'{["' or b"=" not in text:
            raise BadBody("Invalid JSON body") from error
        return _read_form(text)
    if not isinstance(given, dict):
        raise BadBody("Invalid JSON body")
    return given


def _read_form(text: bytes) -> dict[str, Any]:
    """`images[]=`, `images[0]=` and a repeated `images=` are all lists."""
    try:
        pairs = parse_qsl(text.decode(), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS)
    except ValueError as error:
        raise BadBody("Invalid JSON body") from error
    found: dict[str, Any] = {}
    for key, value in pairs:
        listed = _LISTED.fullmatch(key)
        name = listed[1] if listed else key
        if listed or name in found:
            before = found.get(name, [])
            found[name] = [*(before if isinstance(before, list) else [before]), value]
        else:
            found[name] = value
    return found


def authorization_of(given: Mapping[str, Any], header: str | None) -> str | None:
    """The key as an Authorization header: the body's if it has one, else the header itself."""
    key = given.get("key")
    if key is None or (isinstance(key, str) and key.strip().lower() in NULLISH):
        return header
    return f"Bearer {key}" if isinstance(key, str) else "Bearer"


def check_fields(missing: list[str], faults: list[Violation]) -> None:
    """Raises what is wrong with a request: first all missing fields, then all broken rules.

    Raises:
        MissingFields: fields are missing.
        InvalidSpec: values break rules.
    """
    if missing:
        raise MissingFields([Violation(name, "") for name in missing])
    if faults:
        raise InvalidSpec(faults[:MAX_FAULTS])


def spoken(message: Any) -> dict[str, Any]:
    """A message under both spellings."""
    return {"messege": message, "message": message}


def error_body(message: Any, **more: Any) -> dict[str, Any]:
    """The body of every error."""
    return {"status": "error", **spoken(message), **more}


def told_answer(told: Told, strict: bool, **more: Any) -> Answer:
    """The answer to an error whose sentence is part of the contract."""
    return Answer(told.http_status if strict else 200, error_body(told.message, **more))


def error_answer(error: LikenessError, not_found: Told, strict: bool) -> Answer:
    """The dialect's answer to an error of the table.

    Args:
        error: what was raised.
        not_found: what a NotFound is about.
        strict: use HTTP statuses that say what the body says.
    """
    if isinstance(error, (Unauthenticated, PermissionDenied)):
        return told_answer(BAD_KEY, strict, tip="Send the key of your project as `key` in the body.")
    if isinstance(error, NotFound):
        return told_answer(not_found, strict)
    if isinstance(error, (RateLimited, QueueFull)):
        return _busy_answer(error, strict)
    if isinstance(error, BadBody):
        body = error_body(str(error), tip="Send a JSON object, or form fields.")
        return Answer(400 if strict else 200, body)
    if isinstance(error, (InvalidSpec, WrongState)):
        message = fields_of(error.violations) if isinstance(error, InvalidSpec) else str(error)
        return Answer(400 if strict else 200, error_body(message))
    status = 500 if row_of(error).http_status == 500 else 503
    return Answer(status, error_body("internal error" if status == 500 else "service unavailable"))


def _busy_answer(error: LikenessError, strict: bool) -> Answer:
    tips = "Wait for requests that are under way, or send fewer in ten seconds."
    body = error_body("Rate limit exceeded", tips=tips, retry_after=RETRY_AFTER_S)
    return Answer(429 if strict else 200, body, {"Retry-After": str(RETRY_AFTER_S)})


def fields_of(violations: tuple[Violation, ...]) -> dict[str, list[str]] | str:
    """Broken rules as sentences by field; one text where no field is to blame."""
    if not all(violation.field for violation in violations):
        return "; ".join(str(violation) for violation in violations)
    found: dict[str, list[str]] = {}
    for violation in violations:
        words = violation.field.replace("_", " ")
        rule = violation.rule or "field is required"
        found.setdefault(violation.field, []).append(f"The {words} {rule}.")
    return found


def internal_answer(reference: str) -> Answer:
    """The answer to a bug; the log line with the same reference says what happened."""
    return Answer(500, error_body("internal error", tip=f"ref {reference}"))


def too_large_answer() -> Answer:
    """The answer to a body over the limit."""
    return Answer(413, error_body(f"The body exceeds {MAX_BODY_BYTES // 2**20} MB"))


def whole_seconds(seconds: float) -> int:
    """Seconds to wait as clients read them: an integer, at least 1."""
    return max(1, math.ceil(seconds)) if math.isfinite(seconds) else 1
