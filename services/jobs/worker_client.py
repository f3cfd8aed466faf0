"""The worker's side of WorkerService: take jobs, keep saying that they live, give account of them.

Owns the beats and the numbering of reports; what is done for a job, and the watchdog that ends a child which makes no
progress, belong to the worker. A job is named in every beat from its taking until its last report.

    async with WorkerClient(channel, worker_id, beat_s=settings.beat_s) as client:
        async for job in client.jobs(free_slots=lambda: 1, warm_models=cache.digests):
            await job.stage(Stage.TRAINING, "training")
            job.progress(Progress(stage=..., step=10, total_steps=200))
            await job.trained(result)
"""

import asyncio
import logging
import os
import random
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Self

from google.protobuf.duration_pb2 import Duration
from likeness.inference.v1.generation_job_pb2 import GenerationResult
from likeness.job.v1.job_pb2 import JobError, Progress
from likeness.training.v1.training_job_pb2 import CheckpointRef, PreviewImage, TrainingResult
from likeness.worker.v1 import worker_service_pb2 as pb
from likeness.worker.v1.worker_service_pb2_grpc import WorkerServiceStub

from services.adapters.grpc_client import Channel
from services.domain.errors import (
    OUTAGES,
    Conflict,
    Internal,
    InvalidSpec,
    LikenessError,
    NotFound,
    QueueFull,
    StaleEpoch,
    public_text,
    row_of,
)
from services.domain.job import JobFailure, Stage

logger = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 2.0
REPORT_TIMEOUT_S: Final = 10.0
MAX_UNFORESEEN: Final = 10
"""Times a report is repeated after an answer INTERNAL before the worker gives up on it."""

_UNCLEAR: Final[tuple[type[LikenessError], ...]] = (*OUTAGES, Internal, QueueFull, Conflict)
"""Answers after which the report may or may not have been accepted, or will be later, when the log has room or is less
busy: the same number is sent again."""


def new_worker_id(kind: str) -> str:
    """A name for this worker process: what it does, where, which process, and a random part.

    Args:
        kind: "trainer" or "inference".
    """
    host = "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname())[:32]
    return f"{kind}-{host}-{os.getpid()}-{secrets.token_hex(3)}"


class JobHandle:
    """A job that was given to this worker, until its last report.

    Attributes:
        assignment: what the api gave.
        stopped: set when the job does not belong to this worker any more: drop it, its reports are refused.
    """

    def __init__(self, client: "WorkerClient", assignment: pb.Assignment) -> None:
        """Made by the client only."""
        self.assignment = assignment
        self.stopped = asyncio.Event()
        self._client = client
        self._number = assignment.accepted_reports
        self._one_at_a_time = asyncio.Lock()
        self._ended = False
        self._progress: Progress | None = None
        self._heard_at = client.now()

    @property
    def job_id(self) -> str:
        """The job."""
        return self.assignment.job_id

    @property
    def project_id(self) -> str:
        """Its owner."""
        return self.assignment.project_id

    @property
    def epoch(self) -> int:
        """Fencing number of this taking."""
        return self.assignment.epoch

    @property
    def attempt(self) -> int:
        """Times a worker has begun in this run, this one counted."""
        return self.assignment.attempt

    @property
    def checkpoint_ref(self) -> CheckpointRef | None:
        """Latest checkpoint of an earlier attempt; None when there is none."""
        return self.assignment.checkpoint if self.assignment.HasField("checkpoint") else None

    @property
    def time_left_s(self) -> float:
        """Seconds the job might still execute when it was given."""
        return self.assignment.time_left.ToTimedelta().total_seconds()

    @property
    def is_surely_ours(self) -> bool:
        """The api has confirmed the job within the lease. False proves nothing: only a report decides."""
        return not self.stopped.is_set() and self._client.now() - self._heard_at < self._client.lease_s

    @property
    def has_ended(self) -> bool:
        """The last report was accepted or refused."""
        return self._ended

    def progress(self, progress: Progress) -> None:
        """Notes the latest numbers; the next beat carries them. `fraction` may be left out: the api computes it."""
        self._progress = progress
        self._client.wake()

    async def stage(self, stage: Stage, message: str = "") -> None:
        """Reports that another stage has begun.

        Raises:
            StaleEpoch: the job is not this worker's any more (also from every other report).
        """
        await self._report(stage=pb.StageReport(stage=f"JOB_STAGE_{stage.value}", message=message))

    async def checkpoint(self, manifest_key: str, step: int) -> None:
        """Reports a stored checkpoint: another attempt goes on from there."""
        reference = CheckpointRef(manifest_key=manifest_key, step=step)
        await self._report(checkpoint=pb.CheckpointReport(checkpoint=reference))

    async def previews(self, previews: Sequence[PreviewImage]) -> None:
        """Reports stored pictures of the training that goes on, 1..64."""
        await self._report(previews=pb.PreviewsReport(previews=previews))

    async def version(self, model: str, step: int) -> None:
        """Reports a registered version of the model of the training that goes on."""
        await self._report(version=pb.VersionReport(model=model, step=step))

    async def trained(self, result: TrainingResult) -> None:
        """Reports a training done and its model registered. The last report."""
        await self._report_last(trained=pb.TrainedReport(result=result))

    async def finished(self, result: GenerationResult) -> None:
        """Reports a drawing done. The last report."""
        await self._report_last(finished=pb.FinishedReport(result=result))

    async def failed(self, error: BaseException | JobFailure, *, retryable: bool | None = None) -> None:
        """Reports that the job cannot be done, or not this time. The last report.

        Args:
            error: what went wrong; text that is not for callers stays here.
            retryable: another attempt may succeed; None: the error table decides, and a bare failure is final.
        """
        failure = error if isinstance(error, JobFailure) else _failure_of(error)
        if retryable is None:
            retryable = not isinstance(error, JobFailure) and row_of(error).retry_job
        message = JobError(reason=failure.reason, message=failure.message, field=failure.field)
        await self._report_last(failed=pb.FailedReport(error=message, retryable=retryable))

    async def yielded(self, message: str = "") -> None:
        """Gives the job back; the attempt is not counted. The last report."""
        await self._report_last(yielded=pb.YieldReport(message=message))

    async def _report_last(self, **report: Any) -> None:
        try:
            await self._report(**report)
        except InvalidSpec:
            if (
                not {"trained", "finished"} & report.keys()
            ):  # of a result that is refused the failure can be told
                self._end()
            raise
        except LikenessError:
            self._end()
            raise
        self._end()

    async def _report(self, **report: Any) -> None:
        """Sends one report to its end, even when the caller is cancelled meanwhile: half a report helps nobody."""
        await asyncio.shield(self._client.spawn(self._send(report)))

    async def _send(self, report: dict[str, Any]) -> None:
        async with self._one_at_a_time:
            if self.stopped.is_set() or self._ended:
                raise StaleEpoch(f"job {self.job_id} is not this worker's any more")
            request = pb.ReportRequest(
                job_id=self.job_id,
                project_id=self.project_id,
                epoch=self.epoch,
                number=self._number + 1,
                worker_id=self._client.worker_id,
                **report,
            )
            await self._send_until_answered(request)
            self._number += 1
            self._heard_at = self._client.now()

    async def _send_until_answered(self, request: pb.ReportRequest) -> None:
        pause_s, unforeseen = FIRST_PAUSE_S, 0
        while True:
            try:
                await self._client.stub.Report(request, timeout=REPORT_TIMEOUT_S, retry=False)
                return
            except (StaleEpoch, NotFound) as error:
                self.drop(str(error))
                raise StaleEpoch(str(error)) from error
            except _UNCLEAR as error:
                unforeseen += isinstance(error, Internal)
                if unforeseen >= MAX_UNFORESEEN:
                    raise
                logger.info("report is repeated", extra={"job_id": self.job_id, "detail": str(error)})
            if self.stopped.is_set():
                raise StaleEpoch(f"job {self.job_id} is not this worker's any more")
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def drop(self, why: str) -> None:
        """Notes that the job is not this worker's any more."""
        if not self.stopped.is_set():
            logger.info("job must stop", extra={"job_id": self.job_id, "epoch": self.epoch, "detail": why})
        self.stopped.set()
        self._client.forget(self)

    def beat(self) -> pb.JobBeat:
        """The job's part of the next beat; takes the noted numbers with it."""
        message = pb.JobBeat(job_id=self.job_id, project_id=self.project_id, epoch=self.epoch)
        if self._progress is not None:
            message.progress.CopyFrom(self._progress)
            self._progress = None
        return message

    def confirm(self, sent_at: float) -> None:
        """Notes that a beat sent at this moment was answered without stopping the job."""
        self._heard_at = max(self._heard_at, sent_at)

    @property
    def is_reporting(self) -> bool:
        """A report is on its way: its answer, not a beat's, says whose the job is."""
        return self._one_at_a_time.locked()

    def _end(self) -> None:
        self._ended = True
        self._client.forget(self)


def _failure_of(error: BaseException) -> JobFailure:
    field = ""
    for violation in getattr(error, "violations", ()):
        field = field or violation.field
    return JobFailure(row_of(error).reason, public_text(error), field)


class WorkerClient:
    """A worker's connection to the api that gives it work.

    Attributes:
        worker_id: name of this process, unique while it lives.
        draining: set when no more work is taken: the api asked for it, or `leave` was called.
    """

    def __init__(
        self,
        channel: Channel,
        worker_id: str,
        *,
        device: str = "",
        device_memory_bytes: int = 0,
        beat_s: float = 5.0,
        lease_s: float = 30.0,
        take_wait_s: float = 20.0,
        progress_s: float = 1.0,
    ) -> None:
        """Prepares a client; nothing is sent before it is entered.

        Args:
            channel: connection to the api.
            worker_id: `[A-Za-z0-9_-]{1,64}`.
            device: name of the device, for people.
            device_memory_bytes: its memory; 0 on a CPU.
            beat_s: seconds between two beats.
            lease_s: seconds after which the api gives a silent worker's jobs away.
            take_wait_s: seconds that one call waits for work, 0..20.
            progress_s: seconds between two beats that carry new numbers.
        """
        self.worker_id = worker_id
        self.lease_s = lease_s
        self.draining = asyncio.Event()
        self.stub: Any = WorkerServiceStub(channel)
        self._device = device
        self._device_memory_bytes = device_memory_bytes
        self._beat_s = beat_s
        self._take_wait_s = take_wait_s
        self._progress_s = progress_s
        self._held: dict[tuple[str, str, int], JobHandle] = {}
        self._warm_models: tuple[str, ...] = ()
        self._free_slots = 0
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begins to beat."""
        self._beating = asyncio.create_task(self._beat_for_ever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Says that the worker leaves, once and without insisting, and ends everything that still runs."""
        self.draining.set()
        running = [task for task in (self._beating, *self._tasks) if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._beat_once(timeout_s=1.0)

    @staticmethod
    def now() -> float:
        """Seconds of the event loop's clock."""
        return asyncio.get_running_loop().time()

    @property
    def held(self) -> Sequence[JobHandle]:
        """The jobs that have not had their last report."""
        return tuple(self._held.values())

    def leave(self) -> None:
        """Takes no more work; jobs held go on until their last report."""
        self.draining.set()
        self.wake()

    async def jobs(
        self, free_slots: Callable[[], int], warm_models: Callable[[], Iterable[str]] = tuple
    ) -> AsyncIterator[JobHandle]:
        """Takes work until the worker drains.

        Args:
            free_slots: jobs that could begin now; nothing is asked for while it says 0.
            warm_models: digests of the model manifests held ready.

        Yields:
            Each job given; the caller starts it and comes back for the next.
        """
        while not self.draining.is_set():
            slots = free_slots()
            if slots < 1:
                self._free_slots, self._warm_models = 0, tuple(warm_models())
                await self._pause(0.05)
                continue
            for handle in await self.take(slots, warm_models()):
                yield handle

    async def take(self, free_slots: int = 1, warm_models: Iterable[str] = ()) -> list[JobHandle]:
        """Asks for work once and waits for it, through every outage of the api.

        Args:
            free_slots: jobs that could begin now, 1..64.
            warm_models: digests of the model manifests held ready.

        Returns:
            The jobs given; none when the wait was over or the worker drains.
        """
        self._free_slots, self._warm_models = free_slots, tuple(warm_models)
        wait = Duration()
        wait.FromMilliseconds(round(self._take_wait_s * 1000))
        request = pb.TakeRequest(
            worker_id=self.worker_id,
            warm_models=self._warm_models,
            free_slots=free_slots,
            wait=wait,
            device=self._device,
            device_memory_bytes=self._device_memory_bytes,
        )
        response = await self._unless_draining(self._ask(request))
        if response is None:
            return []
        if response.drain:
            self.draining.set()
        self._free_slots = max(0, free_slots - len(response.assignments))
        return [self._hold(assignment) for assignment in response.assignments]

    async def _ask(self, request: pb.TakeRequest) -> pb.TakeResponse | None:
        """One taking; an answer that was lost costs nothing but time, so nothing is repeated blindly."""
        try:
            response = await self.stub.Take(request, timeout=self._take_wait_s + 10.0, retry=False)
        except _UNCLEAR as error:
            logger.info("no answer to a taking", extra={"detail": str(error)})
            await self._pause(random.uniform(0.2, 1.0))
            return None
        assert isinstance(response, pb.TakeResponse)
        return response

    async def _unless_draining(
        self, asking: Coroutine[Any, Any, pb.TakeResponse | None]
    ) -> pb.TakeResponse | None:
        """A cancelled call is given back by the api at once."""
        call = asyncio.create_task(asking)
        leaving = asyncio.create_task(self.draining.wait())
        try:
            await asyncio.wait({call, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return call.result() if call.done() else None
        finally:
            for task in (call, leaving):
                task.cancel()
            await asyncio.gather(call, leaving, return_exceptions=True)

    def _hold(self, assignment: pb.Assignment) -> JobHandle:
        handle = JobHandle(self, assignment)
        self._held[_key(assignment)] = handle
        self.wake()
        return handle

    def forget(self, handle: JobHandle) -> None:
        """Names a job in no more beats."""
        self._held.pop(_key(handle.assignment), None)

    def wake(self) -> None:
        """Lets the next beat go as early as its pace allows."""
        self._news.set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs a piece of work that ends with the client at the latest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_noticed)
        return task

    async def _pause(self, seconds: float) -> None:
        """Waits, but not beyond the moment at which the worker drains."""
        try:
            async with asyncio.timeout(seconds):
                await self.draining.wait()
        except TimeoutError:
            return

    async def _beat_for_ever(self) -> None:
        while True:
            began = self.now()
            await self._beat_once(timeout_s=max(1.0, self._beat_s))
            await self._until_due(began)

    async def _until_due(self, began: float) -> None:
        """Waits for the next beat: `beat_s` after the last one, or `progress_s` when there is news."""
        await asyncio.sleep(max(0.0, began + min(self._progress_s, self._beat_s) - self.now()))
        try:
            async with asyncio.timeout_at(began + self._beat_s):
                await self._news.wait()
        except TimeoutError:
            return

    async def _beat_once(self, timeout_s: float) -> None:
        self._news.clear()
        sent_at, held = self.now(), self.held
        request = pb.BeatRequest(
            worker_id=self.worker_id,
            warm_models=self._warm_models,
            jobs=[handle.beat() for handle in held],
            free_slots=self._free_slots,
            leaving=self.draining.is_set(),
        )
        try:
            response = await self.stub.Beat(request, timeout=timeout_s, retry=False)
        except (LikenessError, OSError) as error:
            logger.info("no answer to a beat", extra={"detail": str(error)})
            return
        self._obey(response, held, sent_at)

    def _obey(self, response: pb.BeatResponse, held: Sequence[JobHandle], sent_at: float) -> None:
        if response.drain:
            self.draining.set()
        stopped = {_key(reference) for reference in response.stop}
        for handle in held:
            if handle.has_ended or handle.is_reporting:
                continue
            if _key(handle.assignment) in stopped:
                handle.drop("the api says so")
            else:
                handle.confirm(sent_at)


async def last_word(report: Awaitable[None]) -> None:
    """Gives a job's last report; a job whose report is not taken is left to its lease."""
    try:
        await report
    except StaleEpoch as error:
        logger.debug("nobody waits for the report: %s", error)
    except LikenessError as error:
        logger.error("the report was not taken", extra={"detail": str(error)})


def _key(message: pb.Assignment | pb.JobReference) -> tuple[str, str, int]:
    return message.project_id, message.job_id, message.epoch


def _noticed(task: asyncio.Task[None]) -> None:
    """Looks at how a report ended when whoever asked for it has gone away."""
    if not task.cancelled() and task.exception() is not None:
        logger.debug("report failed", exc_info=task.exception())
