"""The moving numbers of jobs: what workers say in beats, as the share of the whole, at a pace the log can bear.

Loss is harmless. At most one message a second and a quarter of a percent goes out for a job; what was held back goes
out with the next tick, so that the last numbers of a stage are not lost to the pace.
"""

from dataclasses import dataclass
from typing import Final

from google.protobuf.json_format import MessageToDict
from likeness.job.v1.job_pb2 import JobStage, Progress

from services.domain.job import JobRecord, JobRef, Stage, whole_fraction
from services.domain.ports import Clock, ProgressEntry, ProgressLog

STEP: Final = 0.0025
PACE_S: Final = 1.0
FORGOTTEN_S: Final = 600.0
"""Seconds after its last message that a job is forgotten whose end another told, or nobody."""

_PREFIX: Final = "JOB_STAGE_"


def stage_of(value: "JobStage | int", default: Stage) -> Stage:
    """The domain's stage for the wire's; `default` for an unknown or unset one."""
    name = JobStage.Name(value) if value in JobStage.values() else ""
    short = name.removeprefix(_PREFIX)
    return Stage(short) if short in Stage.__members__ else default


@dataclass(slots=True)
class _Published:
    """What went out last for one run of a job."""

    round: int
    floor: float
    told_at: float
    at: float = -PACE_S
    stage: int = 0
    pending: Progress | None = None


class ProgressBoard:
    """Publishes progress for this replica's workers."""

    def __init__(self, log: ProgressLog, clock: Clock) -> None:
        """Writes to a log at the pace of a clock."""
        self._log = log
        self._clock = clock
        self._jobs: dict[tuple[str, str], _Published] = {}

    async def tell(self, record: JobRecord, progress: Progress) -> None:
        """Takes one message of a worker; publishes it now, with a later tick, or never.

        Args:
            record: the job it is about.
            progress: numbers within the stage; the fraction of the whole is computed here and never falls in a run.
        """
        job = await self._published(record)
        job.told_at = self._clock.monotonic()
        stage = stage_of(progress.stage, record.stage)
        message = Progress()
        message.CopyFrom(progress)
        message.MergeFrom(Progress(stage=f"{_PREFIX}{stage.value}"))
        message.fraction = max(job.floor, whole_fraction(stage, progress.step, progress.total_steps))
        message.report_time.FromMilliseconds(self._clock.now_ms())
        job.pending = message
        await self._send_if_due(record.project, record.id, job)

    async def show(self, ref: JobRef, image_key: str, message: str) -> None:
        """Publishes that a picture became ready.

        Args:
            ref: the job it belongs to.
            image_key: artifact key of the picture.
            message: its name.
        """
        body = {"image_key": image_key, "message": message}
        await self._log.publish_progress(ref.project, ref.id, body)

    async def flush(self) -> None:
        """Publishes what was held back and is due by now."""
        for (project, job_id), job in list(self._jobs.items()):
            await self._send_if_due(project, job_id, job)
            if self._clock.monotonic() - job.told_at > FORGOTTEN_S:
                self._jobs.pop((project, job_id), None)

    def forget(self, record: JobRecord) -> None:
        """Drops what is remembered of a job that has ended or moved on."""
        self._jobs.pop((record.project, record.id), None)

    async def _published(self, record: JobRecord) -> _Published:
        key = record.project, record.id
        known = self._jobs.get(key)
        if known is None or known.round != record.round:
            entry = await self._log.last_progress(*key)
            floor = _floor(entry, record.times.queued)
            known = self._jobs[key] = _Published(record.round, floor, self._clock.monotonic())
        return known

    async def _send_if_due(self, project: str, job_id: str, job: _Published) -> None:
        message = job.pending
        if message is None or self._clock.monotonic() - job.at < PACE_S:
            return
        ended = message.step == message.total_steps > 0 and message.fraction > job.floor
        moved = message.stage != job.stage or message.fraction - job.floor >= STEP or ended
        if not moved:
            return
        job.pending, job.at = None, self._clock.monotonic()
        job.stage, job.floor = int(message.stage), message.fraction
        await self._log.publish_progress(project, job_id, progress_json(message))


def progress_json(progress: Progress) -> dict[str, object]:
    """A message as the progress log keeps it."""
    return dict(MessageToDict(progress, preserving_proto_field_name=True))


def _floor(entry: ProgressEntry | None, since_ms: int) -> float:
    """The fraction published last, unless it was for an earlier run."""
    if entry is None or "fraction" not in entry.body:
        return 0.0
    from_this_run = _report_ms(entry) >= since_ms
    return float(entry.body["fraction"]) if from_this_run else 0.0


def _report_ms(entry: ProgressEntry) -> int:
    progress = Progress()
    if "report_time" not in entry.body:
        return 0
    progress.report_time.FromJsonString(entry.body["report_time"])
    return progress.report_time.ToMilliseconds()
