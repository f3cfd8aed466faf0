"""What all RunPod endpoints share: the request around the input, and every body that goes back.

`/v1` and `/v2` serve the same jobs and differ in the status body only: v1 echoes the input and names the GPU, v2
shows progress as the output of a running job. Only 200 is a success; every body is JSON.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from likeness.job.v1 import job_pb2
from likeness.training.v1 import training_job_pb2

from services.domain.addresses import parse_target
from services.domain.errors import (
    Cancelled,
    Conflict,
    DeadlineExceeded,
    EgressRefused,
    InvalidSpec,
    LikenessError,
    NotFound,
    PermissionDenied,
    QueueFull,
    RateLimited,
    Unauthenticated,
    row_of,
)
from services.domain.rules import Range
from services.gateway.dialects.base import FINAL_STATES, Answer, JobView
from services.gateway.dialects.strict_json import parse_json

DIALECT = "runpod"
Version = Literal["v1", "v2"]
MAX_RUN_BYTES = 10 * 1024 * 1024
MAX_RUNSYNC_BYTES = 20 * 1024 * 1024
DEFAULT_WAIT_MS = 90_000
DEFAULT_STREAM_HOLD_MS = 5_000
SHORTEST_WAIT_MS = 1_000
LONGEST_WAIT_MS = 300_000
SHORTEST_TTL_MS = 10_000
CANCELLED_STREAM_MS = 60_000
"""How long `/stream` answers for a cancelled job; after that a 404 ends clients that do not know CANCELLED."""
MAX_ERROR_CHARS = 2000

_WEEK_MS = 7 * 24 * 3600 * 1000
_TIMEOUT = Range("executionTimeout", 5_000, _WEEK_MS)
_TTL = Range("ttl", 10_000, _WEEK_MS)

STATUS_OF_STATE: Mapping[int, str] = {
    job_pb2.JOB_STATE_QUEUED: "IN_QUEUE",
    job_pb2.JOB_STATE_RUNNING: "IN_PROGRESS",
    job_pb2.JOB_STATE_SUCCEEDED: "COMPLETED",
    job_pb2.JOB_STATE_FAILED: "FAILED",
    job_pb2.JOB_STATE_CANCELLED: "CANCELLED",
    job_pb2.JOB_STATE_TIMED_OUT: "TIMED_OUT",
}
_STAGES: Mapping[int, str] = {
    job_pb2.JOB_STAGE_FETCHING: "downloading",
    job_pb2.JOB_STAGE_CLASS_IMAGES: "class_images",
    job_pb2.JOB_STAGE_TRAINING: "training",
    job_pb2.JOB_STAGE_EXPORTING: "uploading",
    job_pb2.JOB_STAGE_UPLOADING: "uploading",
    job_pb2.JOB_STAGE_DEPLOYING: "sampling",
    job_pb2.JOB_STAGE_SAMPLING: "sampling",
}


@dataclass(frozen=True, slots=True)
class Envelope:
    """A request without its endpoint's meaning.

    Attributes:
        given: the input object as sent.
        webhook: address that is told of the end; "" for none.
        policy: limits and rank.
    """

    given: Mapping[str, Any]
    webhook: str
    policy: job_pb2.JobPolicy


def read_envelope(body: bytes) -> Envelope:
    """Reads the body of `/run` and `/runsync`.

    Raises:
        InvalidSpec: with all faults of the envelope; their `field` is empty, the rule names the key.
    """
    request = parse_json(body)
    if not isinstance(request, dict):
        raise InvalidSpec("the body must be a JSON object")
    faults: list[str] = []
    given = request.get("input")
    if not isinstance(given, dict) or not given:
        faults.append("input must be a non-empty object")
    webhook = _read_webhook(request, faults)
    policy = _read_policy(request.get("policy"), faults)
    if request.get("s3Config") is not None:
        faults.append("s3Config is not available in this version")
    if faults:
        raise InvalidSpec("; ".join(faults))
    return Envelope(given if isinstance(given, dict) else {}, webhook, policy)


def _read_webhook(request: Mapping[str, Any], faults: list[str]) -> str:
    name = "webhook" if request.get("webhook") is not None else "webhookV2"
    url = request.get(name)
    if url is None or url == "":
        return ""
    if not isinstance(url, str):
        faults.append(f"{name} must be a string")
        return ""
    try:
        parse_target(url)
    except EgressRefused as error:
        faults.append(f"{name}: {error}")
    return url


def _read_policy(given: Any, faults: list[str]) -> job_pb2.JobPolicy:
    policy = job_pb2.JobPolicy()
    if given is None:
        return policy
    if not isinstance(given, dict):
        faults.append("policy must be an object")
        return policy
    for limit, target in ((_TIMEOUT, policy.execution_timeout), (_TTL, policy.ttl)):
        value = given.get(limit.field)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not limit.holds(value):
            faults.append(
                f"policy.{limit.field} must be an integer between {limit.low:.0f} and {limit.high:.0f} ms"
            )
        else:
            target.FromMilliseconds(value)
    low = given.get("lowPriority")
    if low is not None and not isinstance(low, bool):
        faults.append("policy.lowPriority must be true or false")
    elif low:
        policy.priority = job_pb2.JOB_PRIORITY_LOW
    return policy


def wait_ms(text: str | None, default: int) -> int:
    """Reads `?wait=`: out of range is clamped, anything but a number means the default."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        value = math.nan
    return default if math.isnan(value) else int(min(max(value, SHORTEST_WAIT_MS), LONGEST_WAIT_MS))


def check_ttl(text: str | None) -> int | None:
    """Reads `?ttl=` of a status request, in milliseconds; None when it is absent.

    Raises:
        InvalidSpec: not a number, or below 10 000.
    """
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 15 or int(text) < SHORTEST_TTL_MS:
        raise InvalidSpec(f"ttl must be an integer of at least {SHORTEST_TTL_MS} ms")
    return int(text)


# --- bodies --------------------------------------------------------------------------------------------------


def status_of(job: training_job_pb2.TrainingJob) -> str:
    """The dialect's word for a job's state."""
    return STATUS_OF_STATE.get(job.state, "IN_QUEUE")


def accepted_body(job: training_job_pb2.TrainingJob) -> dict[str, Any]:
    """Answer of `/run` and `/retry`."""
    return {"id": job.job_id, "status": "IN_QUEUE"}


def status_body(view: JobView, version: Version, output: Any = None) -> dict[str, Any]:
    """Answer of everything that shows a job.

    Args:
        view: the job, the present, and the caller's input.
        version: which envelope.
        output: the endpoint's output of a job that has succeeded.
    """
    job = view.job
    body: dict[str, Any] = {"id": job.job_id, "status": status_of(job)}
    if job.state != job_pb2.JOB_STATE_QUEUED:
        body |= times_of(job, view.now_ms) | {"workerId": job.worker_id}
    if version == "v1":
        body |= _v1_fields(view)
    body |= _outcome(job, version, output)
    retries = job.run + max(0, job.attempt - 1)
    return body | ({"retries": retries} if retries else {})


def _v1_fields(view: JobView) -> dict[str, Any]:
    gpu = {} if view.job.state == job_pb2.JOB_STATE_QUEUED else {"gpu": gpu_of(view.job)}
    return gpu | {"input": view.given}


def _outcome(job: training_job_pb2.TrainingJob, version: Version, output: Any) -> dict[str, Any]:
    if job.state == job_pb2.JOB_STATE_RUNNING:
        progress = {"progress": progress_of(job)}
        return progress if version == "v1" else {"output": progress}
    if job.state == job_pb2.JOB_STATE_SUCCEEDED:
        return {"output": output}
    if job.state in (job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_TIMED_OUT):
        return {"error": error_text(job.error)}
    return {}


def times_of(job: training_job_pb2.TrainingJob, now_ms: int) -> dict[str, int]:
    """Waiting and execution of the present run, whole milliseconds.

    `delayTime` is all time spent in a queue, also between two phases; `executionTime` is the rest.
    """
    times = job.times
    queued = _milliseconds(times.queue_time)
    until = _milliseconds(times.end_time) if job.state in FINAL_STATES else max(now_ms, queued)
    if not times.HasField("start_time"):
        return {"delayTime": max(0, until - queued), "executionTime": 0}
    waited = max(0, _duration_ms(times.waiting_duration))
    return {"delayTime": waited, "executionTime": max(0, until - queued - waited)}


def _milliseconds(moment: Timestamp) -> int:
    return moment.seconds * 1000 + moment.nanos // 1_000_000


def _duration_ms(span: Duration) -> int:
    return span.seconds * 1000 + span.nanos // 1_000_000


def gpu_of(job: training_job_pb2.TrainingJob) -> str:
    """Memory of the device that trains, in GB as text; "0" on a CPU and before a trainer has the job."""
    return str(round((job.device_memory_bytes or job.result.device_memory_bytes) / 2**30))


def progress_of(job: training_job_pb2.TrainingJob) -> dict[str, Any]:
    """The progress object of a running job; zeros before the stage's first report."""
    current = job.progress.stage in (job.stage, job_pb2.JOB_STAGE_UNSPECIFIED)
    progress = job_pb2.Progress(stage=job.stage)
    if current and job.HasField("progress"):
        progress.MergeFrom(job.progress)
    return progress_body(progress)


def progress_body(progress: job_pb2.Progress) -> dict[str, Any]:
    """The progress object: the place within a stage; `percent` is the stage's, `total_percent` the job's."""
    total = progress.total_steps
    percent = 100 * min(1.0, progress.step / total) if total > 0 else 0.0
    body: dict[str, Any] = {
        "stage": _STAGES.get(progress.stage, "downloading"),
        "step": progress.step,
        "total_steps": total,
        "percent": round(percent, 1),
        "total_percent": round(100 * progress.fraction, 1),
    }
    for name in ("loss", "learning_rate", "seconds_left"):
        if progress.HasField(name) and math.isfinite(getattr(progress, name)):
            body[name] = getattr(progress, name)
    return body


def error_text(error: job_pb2.JobError) -> str:
    """Why a job ended without a result: one sentence, the field first where one is to blame."""
    text = error.message or "the job ended without a result"
    if error.field and not text.startswith(error.field):
        text = f"{error.field}: {text}"
    return text[:MAX_ERROR_CHARS]


def webhook_body(view: JobView, version: Version, output: Any, url: str) -> dict[str, Any]:
    """What a webhook receives: the status body with input and webhook, and the GPU for v1."""
    body = status_body(view, "v1", output) | {"webhook": url}
    if version == "v2":
        body.pop("gpu", None)
    return body


def stream_body(job_id: str, status: str, chunks: Sequence[Any]) -> dict[str, Any]:
    """Answer of `/stream`: each chunk under the key `output`."""
    return {"id": job_id, "status": status, "stream": [{"output": chunk} for chunk in chunks]}


def health_body(status: job_pb2.QueueStatus) -> dict[str, Any]:
    """Answer of `/health`."""
    return {
        "jobs": {
            "completed": status.succeeded_jobs,
            "failed": status.failed_jobs,
            "inProgress": status.running_jobs,
            "inQueue": status.queued_jobs,
            "retried": status.retried_jobs,
        },
        "workers": {
            "idle": status.idle_workers,
            "initializing": 0,
            "ready": status.idle_workers + status.busy_workers,
            "running": status.busy_workers,
            "throttled": 0,
            "unhealthy": 0,
        },
    }


def purge_body(removed: int) -> dict[str, Any]:
    """Answer of `/purge-queue`."""
    return {"removed": removed, "status": "completed"}


# --- errors --------------------------------------------------------------------------------------------------


def error_answer(error: LikenessError, subject: str = "job") -> Answer:
    """The dialect's answer to an error of the table.

    Args:
        error: what was raised.
        subject: what a NotFound is about.
    """
    if isinstance(error, (Unauthenticated, PermissionDenied)):
        return Answer(401, {"error": "unauthorized"}, {"WWW-Authenticate": "Bearer"})
    if isinstance(error, NotFound):
        return Answer(404, {"error": f"{subject} not found"})
    if isinstance(error, QueueFull):
        return Answer(429, {"error": "queue is full"}, {"Retry-After": "2"})
    if isinstance(error, RateLimited):
        return Answer(429, {"error": "too many requests"}, {"Retry-After": "1"})
    if isinstance(error, InvalidSpec):
        return Answer(400, _invalid_body(error))
    passing = isinstance(error, (Cancelled, Conflict, DeadlineExceeded))
    status = 503 if passing else row_of(error).http_status
    text = "service unavailable" if status == 503 else str(error)
    return Answer(status, {"error": text})


def _invalid_body(error: InvalidSpec) -> dict[str, Any]:
    if any(violation.field for violation in error.violations):
        return {"error": "invalid input", "details": [str(violation) for violation in error.violations]}
    return {"error": str(error)}


def internal_answer(reference: str) -> Answer:
    """The answer to a bug; the log line with the same reference says what happened."""
    return Answer(500, {"error": "internal error", "details": [f"ref {reference}"]})


def too_large_answer(limit_bytes: int) -> Answer:
    """The answer to a body over the limit."""
    return Answer(413, {"error": f"request body exceeds {limit_bytes // 2**20} MB"})
