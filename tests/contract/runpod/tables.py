"""What the tests of the endpoints share: cases from data files, and a look into messages by path."""

import json
import re
from functools import reduce
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def cases(name: str) -> Any:
    """A data file of this folder."""
    return json.loads((HERE / name).read_text())


def edges(name: str) -> list[tuple[str, str, Any, bool]]:
    """Place, parameter, value, and whether it is accepted, of rows [place, parameter, inside, outside]."""
    return [
        (place, parameter, value, accepted)
        for place, parameter, inside, outside in cases(name)
        for accepted, values in ((True, inside), (False, outside))
        for value in values
    ]


def at(message: Any, path: str) -> Any:
    """The value at `samples[0].seed`; enumerations by name, lists as such."""
    *parents, last = re.split(r"\.", re.sub(r"\[(\d+)\]", r".\1", path))
    holder = reduce(
        lambda part, key: part[int(key)] if key.isdigit() else getattr(part, key), parents, message
    )
    value = getattr(holder, last)
    field = holder.DESCRIPTOR.fields_by_name[last]
    if field.enum_type:
        return field.enum_type.values_by_number[value].name
    return list(value) if field.is_repeated else value
