"""Every stream and every subject of the job core: the only file that spells one.

    job.<kind>.<project>.<id>      a job's revisions                         stream JOBS
    idem.<project>.<hash>          what an idempotency key stands for        stream IDEM
    hook.<project>.<id>            how far a job's webhook has come          stream HOOKS
    beat.<kind>.<worker>           a worker's signs of life                  stream LIVE
    prog.<project>.<id>            a job's progress                          stream LIVE
    cur.<project>.<id>             how far a reader of it has come           stream LIVE

Tokens are checked before any of them reaches a subject: a dot or a star in one would name another subject.
"""

from typing import Final

from services.domain.errors import InvalidSpec
from services.domain.job import ID_PATTERN, JobKind, JobRef

JOBS: Final = "JOBS"
IDEM: Final = "IDEM"
HOOKS: Final = "HOOKS"
LIVE: Final = "LIVE"

STREAM_SUBJECTS: Final = {
    JOBS: ("job.*.*.*",),
    IDEM: ("idem.*.*",),
    HOOKS: ("hook.*.*",),
    LIVE: ("beat.*.*", "prog.*.*", "cur.*.*"),
}

CLUSTER_PING: Final = "$SYS.REQ.SERVER.PING.JSZ"
"""Asks every server of a cluster for its JetStream configuration; needs the system account."""


def checked_token(field: str, value: str) -> str:
    """One part of a subject.

    Args:
        field: name of the part, for the message.
        value: 1 to 64 letters, digits, `_` or `-`.

    Raises:
        InvalidSpec: anything else.
    """
    if not ID_PATTERN.match(value):
        raise InvalidSpec("must be 1 to 64 letters, digits, '_' or '-'", field)
    return value


def job(ref: JobRef) -> str:
    """The subject of a job's revisions."""
    return f"job.{ref.kind.value}.{_project(ref.project)}.{_job(ref.id)}"


def jobs(kind: JobKind | None = None) -> str:
    """The filter for all jobs, or those of a kind."""
    return f"job.{kind.value}.>" if kind else "job.>"


def ref_of(subject: str) -> JobRef:
    """The job whose revisions lie under a subject.

    Raises:
        ValueError: not the subject of a job.
    """
    head, kind, project, job_id = subject.split(".")
    if head != "job":
        raise ValueError(f"{subject} is not the subject of a job")
    return JobRef(JobKind(kind), project, job_id)


def idempotency(project: str, key_hash: str) -> str:
    """The subject of an idempotency key, given by its SHA-256 in hexadecimal."""
    return f"idem.{_project(project)}.{checked_token('key_hash', key_hash)}"


def hook(project: str, job_id: str) -> str:
    """The subject of a job's webhook cursor."""
    return f"hook.{_project(project)}.{_job(job_id)}"


def beat(kind: JobKind, worker: str) -> str:
    """The subject of a worker's signs of life."""
    return f"beat.{kind.value}.{checked_token('worker_id', worker)}"


def beats(kind: JobKind) -> str:
    """The filter for the signs of life of all workers of a kind."""
    return f"beat.{kind.value}.*"


def progress(project: str, job_id: str) -> str:
    """The subject of a job's progress."""
    return f"prog.{_project(project)}.{_job(job_id)}"


def cursor(project: str, job_id: str) -> str:
    """The subject of a reader's position in a job's progress."""
    return f"cur.{_project(project)}.{_job(job_id)}"


def stream_api(verb: str, stream: str) -> str:
    """The request subject for a verb on a stream: INFO, CREATE, PURGE, MSG.GET."""
    return f"$JS.API.STREAM.{verb}.{stream}"


def direct_get(stream: str) -> str:
    """The request subject for reads that any replica may answer."""
    return f"$JS.API.DIRECT.GET.{stream}"


def create_consumer(stream: str, name: str, filter_subject: str) -> str:
    """The request subject that makes a consumer."""
    return f"$JS.API.CONSUMER.CREATE.{stream}.{name}.{filter_subject}"


def delete_consumer(stream: str, name: str) -> str:
    """The request subject that removes a consumer."""
    return f"$JS.API.CONSUMER.DELETE.{stream}.{name}"


def next_messages(stream: str, name: str) -> str:
    """The request subject that pulls from a consumer."""
    return f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}"


def _project(value: str) -> str:
    return checked_token("project_id", value)


def _job(value: str) -> str:
    return checked_token("job_id", value)
