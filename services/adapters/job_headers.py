"""The headers of a job's revision: enough to index an ended job without its body.

A replay of the log asks for headers only and fetches the bodies of the jobs that still live; of the ended ones it
hands out what :func:`headline` keeps.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Final

from services.domain.job import FINAL_STATES, JobRecord, JobState

STATE: Final = "L-State"
KIND: Final = "L-Kind"
CREATED: Final = "L-Created"
EVENT: Final = "L-Event"
READY: Final = "L-Ready"
LINE: Final = "L-Line"

RESTING_STATES: Final = FINAL_STATES | {JobState.DELETED}
_BODY_ONLY: Final = ("spec", "prepared", "trained", "result", "checkpoint", "error")
_MAX_WHY_CHARS: Final = 200


def headline(record: JobRecord) -> JobRecord:
    """The record without its specification, inputs, outputs and the caller's own request: what headers carry."""
    return replace(
        record,
        options=_without_request(record.options),
        spec={},
        prepared=None,
        trained=None,
        result=None,
        checkpoint=None,
        error=None,
        why=record.why[:_MAX_WHY_CHARS],
    )


def _without_request(options: Mapping[str, Any]) -> Mapping[str, Any]:
    if "origin" not in options:
        return options
    kept = {name: value for name, value in options["origin"].items() if name != "request_json"}
    return {**options, "origin": kept}


def headers_of(record: JobRecord) -> dict[str, str]:
    """The headers that go with a revision; values are ASCII without line breaks."""
    line = {name: value for name, value in asdict(headline(record)).items() if name not in _BODY_ONLY}
    return {
        STATE: record.state.value,
        KIND: record.kind.value,
        CREATED: str(record.times.created),
        EVENT: "1" if record.event else "0",
        READY: "1" if record.ready else "0",
        LINE: json.dumps(line, separators=(",", ":")),
    }


def record_of(headers: Mapping[str, Any]) -> JobRecord:
    """The headline that a revision's headers carry.

    Raises:
        KeyError, ValueError: the headers are not those of a revision.
    """
    return JobRecord.from_json(str(headers[LINE]).encode())
