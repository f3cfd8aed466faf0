"""Jobs as the dialects see them: submit, read, wait, cancel, retry, on canonical messages over TrainingService.

Owns no state: what is remembered here (callers' long inputs, queue figures) can be read again.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from likeness.inference.v1 import generation_job_pb2
from likeness.job.v1 import job_pb2
from likeness.training.v1 import training_job_pb2
from likeness.training.v1 import training_service_pb2 as pb

from services.adapters.telemetry import current_trace
from services.domain.errors import InvalidSpec, LikenessError, NotFound, QueueFull, Unavailable, WrongState
from services.domain.job import LONGEST_RETENTION_MS
from services.gateway.dialects.base import FINAL_STATES, Submission
from services.gateway.limits import QueueLimit

logger = logging.getLogger(__name__)

J = TypeVar("J", training_job_pb2.TrainingJob, generation_job_pb2.GenerationJob)

CALL_TIMEOUT_S = 2.5
"""Clients give up after 3 s, so the services behind get a little less."""
MAX_KEPT_VALUE = 64 * 1024
MAX_KEPT_INPUT = 1024 * 1024
"""What is echoed of an input, in characters of JSON: values that are longer can only be unknown keys'."""
MAX_LABEL_CHARS = 1000
POLL_S = 1.0
ANSWER_MARGIN_S = 0.1
"""A held request is answered at the end of its wait, not after it: the last read needs this much."""
PURGES_AT_ONCE = 16
QUEUE_FIGURES_S = 1.0


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a job belongs.

    Attributes:
        project: its owner.
        dialect: for instance "runpod".
        endpoint: for instance "dream-booth-v1".
    """

    project: str
    dialect: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a job is made of.

    Attributes:
        job_id: its id.
        submission: the training.
        given: the caller's input, kept for dialects that echo it.
        webhook: address that is told of the end; "" for none.
        policy: limits and rank.
        labels: small values that the dialect keeps with the job.
        scope: which events the webhook is told of.
    """

    job_id: str
    submission: Submission
    given: Mapping[str, Any]
    webhook: str
    policy: job_pb2.JobPolicy
    labels: Mapping[str, str]
    scope: job_pb2.WebhookScope = job_pb2.WEBHOOK_SCOPE_FINAL


def new_job_id(prefix: str = "") -> str:
    """A fresh random id."""
    return prefix + str(uuid.uuid4())


def job_options(
    origin: Origin,
    policy: job_pb2.JobPolicy,
    labels: Mapping[str, str],
    kept: Mapping[str, Any],
    webhook: str,
    scope: job_pb2.WebhookScope,
) -> job_pb2.JobOptions:
    """What comes with a job besides its specification; `kept` is what the dialect wants to read again."""
    options = job_pb2.JobOptions(policy=policy, traceparent=_traceparent())
    options.origin.dialect, options.origin.endpoint = origin.dialect, origin.endpoint
    options.origin.labels.update(labels)
    options.origin.request_json = _kept_input(kept)
    if webhook:
        options.webhook.url, options.webhook.scope = webhook, scope
    return options


class Jobs:
    """The trainings of all projects, as far as a caller may see them."""

    def __init__(
        self,
        training: Any,
        queue_limit: QueueLimit = QueueLimit(),  # noqa: B008 - frozen
    ) -> None:
        """Takes a stub of TrainingService, and when a queue is full."""
        self._training = training
        self._queue_limit = queue_limit
        self._figures: dict[str, tuple[float, job_pb2.QueueStatus]] = {}
        self.stopping = asyncio.Event()
        """Set when the process ends: held requests are answered then."""

    async def check_queue(self, endpoint: str) -> None:
        """Raises QueueFull when an endpoint's queue is too long for one more job."""
        known = self._figures.get(endpoint)
        if known is None or known[0] < time.monotonic():
            status = await self.queue_status("", endpoint)
            known = self._figures[endpoint] = time.monotonic() + QUEUE_FIGURES_S, status
        status = known[1]
        waiting = status.queued_jobs + status.ready_jobs
        if self._queue_limit.is_full(waiting, status.idle_workers + status.busy_workers):
            raise QueueFull("queue is full")

    async def submit(self, origin: Origin, new: NewJob) -> training_job_pb2.TrainingJob:
        """Admits a training.

        Raises:
            InvalidSpec: the service found a fault that the dialect could not know of; in the caller's spelling.
            QueueFull, Unavailable: not now.
        """
        labels = {**new.labels, **_ignored_label(new.submission)}
        options = job_options(origin, new.policy, labels, new.given, new.webhook, new.scope)
        request = pb.CreateTrainingJobRequest(
            project_id=origin.project,
            job_id=new.job_id,
            spec=new.submission.spec,
            options=options,
        )
        try:
            response = await self._training.CreateTrainingJob(request, timeout=CALL_TIMEOUT_S)
        except InvalidSpec as error:
            raise new.submission.respelled(error) from error
        if new.submission.ignored:
            extra = {"job_id": new.job_id, "keys": options.origin.labels["ignored_keys"]}
            logger.info("unknown keys ignored", extra=extra)
        return _job(response)

    async def get(self, origin: Origin, job_id: str) -> training_job_pb2.TrainingJob:
        """Reads a job.

        Raises:
            NotFound: unknown, expired, somebody else's, or of another endpoint.
        """
        request = pb.GetTrainingJobRequest(job_id=job_id, project_id=origin.project)
        job = _job(await self._training.GetTrainingJob(request, timeout=CALL_TIMEOUT_S))
        found = job.options.origin
        if (found.dialect, found.endpoint) != (origin.dialect, origin.endpoint):
            raise NotFound("job not found")
        return job

    async def cancel(self, origin: Origin, job_id: str) -> training_job_pb2.TrainingJob:
        """Ends a job; one that has ended already is returned unchanged.

        Raises:
            NotFound: as :meth:`get`.
        """
        await self.get(origin, job_id)
        request = pb.CancelTrainingJobRequest(job_id=job_id, project_id=origin.project)
        return _job(await self._training.CancelTrainingJob(request, timeout=CALL_TIMEOUT_S))

    async def delete(self, origin: Origin, job_id: str) -> None:
        """Removes a job's record; one in progress is cancelled first.

        Raises:
            NotFound: as :meth:`get`.
        """
        await self.get(origin, job_id)
        request = pb.DeleteTrainingJobRequest(job_id=job_id, project_id=origin.project)
        await self._training.DeleteTrainingJob(request, timeout=CALL_TIMEOUT_S)

    async def shorten_retention(self, origin: Origin, job_id: str, keep_ms: int) -> None:
        """Lets a job that has ended go this many milliseconds from now, if it would stay longer.

        Raises:
            WrongState: it has not ended.
        """
        request = pb.ShortenTrainingJobRetentionRequest(job_id=job_id, project_id=origin.project)
        request.keep_for.FromMilliseconds(min(keep_ms, LONGEST_RETENTION_MS))
        await self._training.ShortenTrainingJobRetention(request, timeout=CALL_TIMEOUT_S)

    async def retry(self, origin: Origin, job_id: str) -> training_job_pb2.TrainingJob:
        """Starts a FAILED or TIMED_OUT job again.

        Raises:
            NotFound: as :meth:`get`.
            WrongState: it is in another state.
        """
        job = await self.get(origin, job_id)
        if job.state not in (job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_TIMED_OUT):
            raise WrongState("only failed jobs can be retried")
        request = pb.RetryTrainingJobRequest(job_id=job_id, project_id=origin.project)
        return _job(await self._training.RetryTrainingJob(request, timeout=CALL_TIMEOUT_S))

    async def wait(self, origin: Origin, job_id: str, seconds: float) -> training_job_pb2.TrainingJob:
        """Reads a job as soon as it has ended, and at the end of `seconds` in any case."""
        return await until_ended(
            lambda: self.get(origin, job_id),
            lambda job: self._training.WatchTrainingJob(
                pb.WatchTrainingJobRequest(
                    job_id=job_id, project_id=origin.project, after_sequence=job.sequence
                )
            ),
            seconds,
            self.stopping,
        )

    async def queue_status(self, project: str, endpoint: str) -> job_pb2.QueueStatus:
        """Figures of an endpoint's jobs, of one project or of all, and of the workers."""
        request = pb.GetTrainingQueueStatusRequest(project_id=project, endpoint=endpoint)
        response = await self._training.GetTrainingQueueStatus(request, timeout=CALL_TIMEOUT_S)
        status: job_pb2.QueueStatus = response.status
        return status

    async def purge(self, origin: Origin) -> int:
        """Cancels a project's queued jobs of an endpoint; returns how many there were."""
        queued = await self.listed(origin, [job_pb2.JOB_STATE_QUEUED])
        gate = asyncio.Semaphore(PURGES_AT_ONCE)

        async def remove(job_id: str) -> bool:
            async with gate:
                request = pb.CancelTrainingJobRequest(job_id=job_id, project_id=origin.project)
                job = _job(await self._training.CancelTrainingJob(request, timeout=CALL_TIMEOUT_S))
                return job.state == job_pb2.JOB_STATE_CANCELLED

        return sum(await asyncio.gather(*(remove(job.job_id) for job in queued)))

    async def listed(
        self, origin: Origin, states: Sequence[job_pb2.JobState] = (), most: int = 0
    ) -> list[training_job_pb2.TrainingJob]:
        """A project's jobs of an endpoint, newest first.

        Args:
            origin: whose, and of which endpoint.
            states: only jobs in these; none: in any.
            most: how many are enough; 0: all.
        """
        found: list[training_job_pb2.TrainingJob] = []
        token = ""
        while True:
            request = pb.ListTrainingJobsRequest(
                project_id=origin.project,
                page_size=min(most, 200) or 200,
                page_token=token,
                states=states,
                endpoint=origin.endpoint,
            )
            response = await self._training.ListTrainingJobs(request, timeout=CALL_TIMEOUT_S)
            found += [job for job in response.jobs if job.options.origin.dialect == origin.dialect]
            token = response.next_page_token
            if not token or 0 < most <= len(found):
                return found


async def until_ended(
    read: Callable[[], Awaitable[J]],
    watch: Callable[[J], AsyncIterable[Any]],
    seconds: float,
    stopping: asyncio.Event,
) -> J:
    """Reads a job as soon as it has ended, and at the end of `seconds` in any case.

    Args:
        read: reads the job, a training or a drawing.
        watch: follows its events from the revision given.
        seconds: longest wait.
        stopping: set when the process ends, which ends the wait.
    """
    end = time.monotonic() + seconds - ANSWER_MARGIN_S
    job = await read()
    if job.state in FINAL_STATES:
        return job
    waiting = [asyncio.create_task(_ended(read, watch, job)), asyncio.create_task(stopping.wait())]
    try:
        timeout = max(0.0, end - time.monotonic())
        await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    return await read()


async def _ended(read: Callable[[], Awaitable[J]], watch: Callable[[J], AsyncIterable[Any]], job: J) -> None:
    """Returns when a job has ended: told by its events, and by looking where these break off."""
    while job.state not in FINAL_STATES:
        try:
            async for response in watch(job):
                if response.event.state in FINAL_STATES:
                    return
        except LikenessError as error:
            logger.info("watching broke off", extra={"job_id": job.job_id, "detail": str(error)})
        await asyncio.sleep(POLL_S)
        try:
            job = await read()
        except Unavailable:
            continue


def _job(response: Any) -> training_job_pb2.TrainingJob:
    job: training_job_pb2.TrainingJob = response.job
    return job


def given_input(job: training_job_pb2.TrainingJob | generation_job_pb2.GenerationJob) -> Any:
    """What was kept of the caller's input; None when nothing was."""
    text = job.options.origin.request_json
    return json.loads(text) if text else None


def _kept_input(given: Mapping[str, Any]) -> str:
    text = _compact(given)
    if len(text) <= MAX_KEPT_INPUT:
        return text
    short = {key: value for key, value in given.items() if len(_compact(value)) <= MAX_KEPT_VALUE}
    text = _compact(short)
    return text if len(text) <= MAX_KEPT_INPUT else "{}"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _traceparent() -> str:
    trace = current_trace()
    return trace.traceparent if trace is not None else ""


def _ignored_label(submission: Submission) -> dict[str, str]:
    text = ", ".join(submission.ignored)
    return {"ignored_keys": text[:MAX_LABEL_CHARS]} if text else {}
