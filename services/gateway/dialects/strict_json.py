"""Reading a body as JSON, strictly: what is taken here can be stored, echoed and encoded everywhere behind."""

import json
import math
from typing import Any

from services.domain.errors import InvalidSpec

MAX_DEPTH = 100
"""Lists and objects within each other; what is nested deeper could be read here and fail elsewhere."""


def parse_json(body: bytes) -> Any:
    """Reads JSON strictly: UTF-8, finite numbers, bounded depth.

    Raises:
        InvalidSpec: it is not that.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidSpec("the body must be valid JSON") from error
    if not _is_shallow(value):
        raise InvalidSpec(f"the body must not be nested deeper than {MAX_DEPTH} levels")
    return value


def _is_shallow(value: Any) -> bool:
    """Walks level by level, without recursion."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
    return not level


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("number out of range")
    return value
