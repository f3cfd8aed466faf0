"""The RunPod routes, without HTTP: a call comes in, an answer goes out; app.py does the rest.

Order of the checks: key, endpoint, size, envelope, input, rate, queue.
"""

import contextlib
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from likeness.job.v1 import job_pb2
from likeness.training.v1 import training_job_pb2

from services.domain.errors import (
    InvalidSpec,
    LikenessError,
    NotFound,
    Unauthenticated,
    WrongState,
    row_of,
)
from services.domain.job import ID_PATTERN
from services.gateway.auth import Authenticator, Caller
from services.gateway.calls import BodyTooLarge, reference_of
from services.gateway.dialects.base import FINAL_STATES, Answer, JobView, Submission, TrainingEndpoint
from services.gateway.dialects.runpod import envelope as wire
from services.gateway.files import Links
from services.gateway.jobs import Jobs, NewJob, Origin, given_input, new_job_id
from services.gateway.limits import RateLimiter
from services.gateway.streams import Batch, Streams


@dataclass(frozen=True, slots=True)
class Call:
    """One request.

    Attributes:
        version: which envelope.
        endpoint: name from the path.
        authorization: the header; None without one.
        base_url: scheme and host that addresses in the answer begin with.
        job_id: from the path; "" where the path has none.
        query: parameters of the address.
        read_body: reads the body up to a limit in bytes; raises BodyTooLarge.
    """

    version: wire.Version
    endpoint: str
    authorization: str | None
    base_url: str
    job_id: str
    query: Mapping[str, str]
    read_body: Callable[[int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class _Context:
    """A call whose key and endpoint are known."""

    call: Call
    caller: Caller
    endpoint: TrainingEndpoint

    @property
    def origin(self) -> Origin:
        return Origin(self.caller.project, wire.DIALECT, self.endpoint.ENDPOINT)

    @property
    def job_id(self) -> str:
        if not ID_PATTERN.match(self.call.job_id):
            raise NotFound("job not found")
        return self.call.job_id


class RunpodApi:
    """All operations of all RunPod endpoints."""

    def __init__(
        self,
        *,
        endpoints: Sequence[TrainingEndpoint],
        auth: Authenticator,
        jobs: Jobs,
        links: Links,
        streams: Streams,
        limiter: RateLimiter,
        check_url: Callable[[str], object],
        stream_hold_ms: int = wire.DEFAULT_STREAM_HOLD_MS,
    ) -> None:
        """Joins the parts.

        Args:
            endpoints: which endpoints are served.
            auth: knows the keys.
            jobs: submits and reads.
            links: makes addresses of files.
            streams: reads progress.
            limiter: counts requests.
            check_url: raises InvalidSpec for a webhook that would not be visited.
            stream_hold_ms: how long `/stream` waits for something to say.
        """
        self._endpoints = {endpoint.ENDPOINT: endpoint for endpoint in endpoints}
        self._auth, self._jobs, self._links, self._streams = auth, jobs, links, streams
        self._limiter, self._check_url, self._stream_hold_ms = limiter, check_url, stream_hold_ms
        self.operations: Mapping[str, Callable[[_Context], Awaitable[Answer]]] = {
            "run": self._run,
            "runsync": self._runsync,
            "status": self._status,
            "status-sync": self._status_sync,
            "stream": self._stream,
            "cancel": self._cancel,
            "retry": self._retry,
            "purge-queue": self._purge_queue,
            "health": self._health,
        }

    async def answer(self, operation: str, call: Call) -> Answer:
        """Answers a call; never raises."""
        try:
            context = await self._admitted(call)
            return await self.operations[operation](context)
        except BodyTooLarge:
            return wire.too_large_answer(_body_limit(operation))
        except LikenessError as error:
            if row_of(error).reason == "INTERNAL":
                return internal_answer(error)
            return wire.error_answer(error, "job" if call.endpoint in self._endpoints else "endpoint")
        except Exception as error:
            return internal_answer(error)

    async def _admitted(self, call: Call) -> _Context:
        caller = await self._auth.caller(call.authorization)
        endpoint = self._endpoints.get(call.endpoint)
        if endpoint is None:
            raise NotFound("endpoint not found")
        if not caller.may(wire.DIALECT, endpoint.ENDPOINT):
            raise Unauthenticated("the key has no right to this endpoint")
        return _Context(call, caller, endpoint)

    # --- submitting ------------------------------------------------------------------------------------------

    async def _run(self, context: _Context) -> Answer:
        new = await self._read(context, "run", new_job_id())
        with self._limiter.admitted(context.caller, context.endpoint.ENDPOINT, "run"):
            job = await self._submit(context, new)
        return Answer(200, wire.accepted_body(job))

    async def _runsync(self, context: _Context) -> Answer:
        new = await self._read(context, "runsync", new_job_id("sync-"))
        seconds = _wait_s(context.call, wire.DEFAULT_WAIT_MS)
        end = time.monotonic() + seconds
        with self._limiter.admitted(context.caller, context.endpoint.ENDPOINT, "runsync"):
            job = await self._submit(context, new)
            job = await self._jobs.wait(context.origin, job.job_id, max(0.0, end - time.monotonic()))
        return await self._shown(context, job)

    async def _read(self, context: _Context, operation: str, job_id: str) -> NewJob:
        body = await context.call.read_body(_body_limit(operation))
        request = wire.read_envelope(body)
        if request.webhook:
            self._check_webhook(request.webhook)
        submission = context.endpoint.read_input(request.given, _draw_seed)
        labels = {"version": context.call.version, "base_url": context.call.base_url}
        return NewJob(job_id, submission, request.given, request.webhook, request.policy, labels)

    def _check_webhook(self, url: str) -> None:
        try:
            self._check_url(url)
        except InvalidSpec as error:
            raise InvalidSpec(f"webhook: {error}") from error

    async def _submit(self, context: _Context, new: NewJob) -> training_job_pb2.TrainingJob:
        await self._jobs.check_queue(context.endpoint.ENDPOINT)
        return await self._jobs.submit(context.origin, new)

    # --- reading ---------------------------------------------------------------------------------------------

    async def _status(self, context: _Context) -> Answer:
        with self._limiter.admitted(context.caller, context.endpoint.ENDPOINT, "status"):
            ttl_ms = wire.check_ttl(context.call.query.get("ttl"))
            job = await self._jobs.get(context.origin, context.job_id)
            if ttl_ms is not None and job.state in FINAL_STATES:
                with contextlib.suppress(WrongState):  # retried meanwhile: it has not ended any more
                    await self._jobs.shorten_retention(context.origin, context.job_id, ttl_ms)
            return await self._shown(context, job)

    async def _status_sync(self, context: _Context) -> Answer:
        seconds = _wait_s(context.call, wire.DEFAULT_WAIT_MS)
        with self._limiter.admitted(context.caller, context.endpoint.ENDPOINT, "status"):
            return await self._shown(context, await self._jobs.wait(context.origin, context.job_id, seconds))

    async def _stream(self, context: _Context) -> Answer:
        hold_s = _wait_s(context.call, self._stream_hold_ms)
        with self._limiter.admitted(context.caller, context.endpoint.ENDPOINT, "status"):
            render = partial(self._stream_body, context)
            return Answer(200, await self._streams.read(context.origin, context.job_id, hold_s, render))

    async def _stream_body(self, context: _Context, batch: Batch) -> dict[str, object]:
        """More to come beyond this answer means IN_PROGRESS: clients stop at the first final status."""
        chunks: list[object] = [{"progress": wire.progress_body(report)} for report in batch.progress]
        if batch.pictures:
            urls = await self._urls(batch.job, context.call.base_url, context.endpoint)
            pictures = context.endpoint.render_pictures(batch.job, urls)
            chunks += pictures[batch.pictures.start : batch.pictures.stop]
        status = "IN_PROGRESS" if batch.more else wire.status_of(batch.job)
        return wire.stream_body(batch.job.job_id, status, chunks)

    async def _shown(self, context: _Context, job: training_job_pb2.TrainingJob) -> Answer:
        output = None
        if job.state == job_pb2.JOB_STATE_SUCCEEDED:
            output = await self._output(job, context.call.base_url, context.endpoint)
        view = _view_of(job, context.endpoint)
        return Answer(200, wire.status_body(view, context.call.version, output))

    async def _output(
        self, job: training_job_pb2.TrainingJob, base_url: str, endpoint: TrainingEndpoint
    ) -> object:
        return endpoint.render_output(job, await self._urls(job, base_url, endpoint))

    async def _urls(
        self, job: training_job_pb2.TrainingJob, base_url: str, endpoint: TrainingEndpoint
    ) -> Mapping[str, str]:
        return await self._links.urls(job.project_id, endpoint.files_of(job), base_url)

    # --- steering --------------------------------------------------------------------------------------------

    async def _cancel(self, context: _Context) -> Answer:
        with self._limiter.admitted(context.caller, context.endpoint.ENDPOINT, "cancel"):
            return await self._shown(context, await self._jobs.cancel(context.origin, context.job_id))

    async def _retry(self, context: _Context) -> Answer:
        with self._limiter.admitted(context.caller, context.endpoint.ENDPOINT, "cancel"):
            try:
                job = await self._jobs.retry(context.origin, context.job_id)
            except WrongState:
                status = wire.status_of(await self._jobs.get(context.origin, context.job_id))
                text = f"only FAILED or TIMED_OUT jobs can be retried; this one is {status}"
                return Answer(400, {"error": text})
        return Answer(200, wire.accepted_body(job))

    async def _purge_queue(self, context: _Context) -> Answer:
        with self._limiter.admitted(context.caller, context.endpoint.ENDPOINT, "purge-queue"):
            return Answer(200, wire.purge_body(await self._jobs.purge(context.origin)))

    async def _health(self, context: _Context) -> Answer:
        with self._limiter.admitted(context.caller, context.endpoint.ENDPOINT, "health"):
            status = await self._jobs.queue_status(context.caller.project, context.endpoint.ENDPOINT)
            return Answer(200, wire.health_body(status))

    # --- telling ---------------------------------------------------------------------------------------------

    async def webhook_document(self, job: training_job_pb2.TrainingJob, public_url: str) -> bytes:
        """The body of a job's webhook.

        Args:
            job: the job at the event.
            public_url: base of addresses; "": the one that the submitting request came to.

        Raises:
            NotFound: its endpoint is not served any more.
        """
        labels = job.options.origin.labels
        endpoint = self._endpoints.get(job.options.origin.endpoint)
        if endpoint is None:
            raise NotFound("endpoint not found")
        output = None
        if job.state == job_pb2.JOB_STATE_SUCCEEDED:
            output = await self._output(job, public_url or labels.get("base_url", ""), endpoint)
        version: wire.Version = "v1" if labels.get("version") == "v1" else "v2"
        view = _view_of(job, endpoint)
        return json.dumps(wire.webhook_body(view, version, output, job.options.webhook.url)).encode()


def _view_of(job: training_job_pb2.TrainingJob, endpoint: TrainingEndpoint) -> JobView:
    """A job as its caller sees it, with the field that is to blame in his spelling."""
    given = given_input(job)
    if job.error.field and isinstance(given, dict):
        with contextlib.suppress(InvalidSpec):  # what was kept of a long input, or what an older version took
            job.error.CopyFrom(_respelled(job.error, endpoint.read_input(given, _draw_seed)))
    return JobView(job, _now_ms(), given=given)


def _respelled(error: job_pb2.JobError, submission: Submission) -> job_pb2.JobError:
    name = submission.caller_path(error.field)
    told = job_pb2.JobError()
    told.CopyFrom(error)
    told.field = name
    if error.message.startswith(error.field):
        told.message = name + error.message.removeprefix(error.field)
    return told


def internal_answer(error: BaseException) -> Answer:
    """The answer to a bug, with a reference that the log has too."""
    return wire.internal_answer(reference_of(error))


def _body_limit(operation: str) -> int:
    return wire.MAX_RUNSYNC_BYTES if operation == "runsync" else wire.MAX_RUN_BYTES


def _wait_s(call: Call, default_ms: int) -> float:
    return wire.wait_ms(call.query.get("wait"), default_ms) / 1000


def _draw_seed() -> int:
    return secrets.randbelow(2**32)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
