"""What a dialect of the HTTP edge is: pure functions between a caller's words and the canonical messages.

A dialect's endpoint is a module with the functions of :class:`TrainingEndpoint`. It knows no network, no clock and no
storage: addresses of files are made by the caller beforehand, random numbers are drawn by a function it is given.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from likeness.job.v1 import job_pb2
from likeness.training.v1 import training_job_pb2

from services.domain.errors import InvalidSpec, Violation


@dataclass(frozen=True, slots=True)
class Submission:
    """A request for a training, understood.

    Attributes:
        spec: what to train, with all defaults resolved.
        ignored: paths of keys that the endpoint does not know and does not mind.
        spelled: the caller's path of each field, by its path in the specification; others are the same in both.
    """

    spec: training_job_pb2.TrainingSpec
    ignored: tuple[str, ...] = ()
    spelled: Mapping[str, str] = field(default_factory=dict)

    def respelled(self, error: InvalidSpec) -> InvalidSpec:
        """The same faults of `spec` in the caller's spelling."""
        faults = error.violations
        return type(error)([Violation(self.caller_path(fault.field), fault.rule) for fault in faults])

    def caller_path(self, path: str) -> str:
        """What the caller calls a field; where it has no spelling of its own, the part that has one is respelled."""
        known = path
        while known and known not in self.spelled:
            known = known[: max(known.rfind("."), known.rfind("["), 0)]
        return self.spelled[known] + path[len(known) :] if known else path


@dataclass(frozen=True, slots=True)
class File:
    """A stored file that an answer names by an address.

    Attributes:
        key: artifact key.
        name: file name in the address.
    """

    key: str
    name: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back over HTTP.

    Attributes:
        status: HTTP status.
        body: JSON value.
        headers: besides the content type.
    """

    status: int
    body: Any
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobView:
    """A job with what the renderer needs beside it.

    Attributes:
        job: the job.
        now_ms: the present, milliseconds since 1970.
        urls: address of each file, by artifact key.
        given: the caller's input as it was sent; None where it is not echoed.
    """

    job: training_job_pb2.TrainingJob
    now_ms: int
    urls: Mapping[str, str] = field(default_factory=dict)
    given: Any = None


class TrainingEndpoint(Protocol):
    """One endpoint of a dialect that trains."""

    @property
    def ENDPOINT(self) -> str:
        """Its name in addresses, in `JobOrigin.endpoint` and in the queue's figures."""
        ...

    def read_input(self, given: Mapping[str, Any], draw_seed: Callable[[], int]) -> Submission:
        """Translates the caller's input.

        Args:
            given: the input object as parsed from JSON.
            draw_seed: gives a random seed, for callers who ask for one.

        Raises:
            InvalidSpec: with every fault, in the caller's spelling.
        """
        ...

    def files_of(self, job: training_job_pb2.TrainingJob) -> list[File]:
        """The files that the output of this job names."""
        ...

    def render_pictures(self, job: training_job_pb2.TrainingJob, urls: Mapping[str, str]) -> list[Any]:
        """The pictures of a finished job's samples as JSON values, one each, in order."""
        ...

    def render_output(self, job: training_job_pb2.TrainingJob, urls: Mapping[str, str]) -> Any:
        """The output of a finished job as a JSON value."""
        ...

    def input_schema(self) -> dict[str, Any]:
        """JSON schema of the input, with an example that is accepted."""
        ...


FINAL_STATES = frozenset(
    {
        job_pb2.JOB_STATE_SUCCEEDED,
        job_pb2.JOB_STATE_FAILED,
        job_pb2.JOB_STATE_CANCELLED,
        job_pb2.JOB_STATE_TIMED_OUT,
    }
)
"""States in which a job rests."""
