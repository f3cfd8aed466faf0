"""The stablediffusionapi routes, without HTTP: a call comes in, an answer goes out; app.py does the rest.

Order of the checks: body, key, required fields, values, model, rate, queue.
"""

import base64
import contextlib
import json
import secrets
import string
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from likeness.inference.v1 import generation_job_pb2
from likeness.job.v1 import job_pb2
from likeness.storage.v1 import model_pb2
from likeness.training.v1 import training_job_pb2
from likeness.training.v1.training_job_pb2 import ArtifactKeys, ImageSource, ImageUrls

from services.adapters.settings import EMBEDDED_MODEL
from services.adapters.storage_client import StorageClient
from services.domain.errors import (
    AlreadyExists,
    BadInput,
    DeadlineExceeded,
    InvalidSpec,
    LikenessError,
    NotFound,
    QueueFull,
    Unauthenticated,
    Unavailable,
    WrongState,
    row_of,
)
from services.domain.job import ID_PATTERN
from services.gateway.auth import Authenticator, Caller
from services.gateway.calls import BodyTooLarge, reference_of
from services.gateway.dialects.base import Answer, File
from services.gateway.dialects.sdapi import drawing as pictures
from services.gateway.dialects.sdapi import envelope as wire
from services.gateway.dialects.sdapi import schedulers
from services.gateway.dialects.sdapi import training as trainings
from services.gateway.dialects.sdapi.values import NULLISH, YES, Parameter, Picture, address_rule
from services.gateway.drawings import Drawings, NewDrawing
from services.gateway.files import Links
from services.gateway.jobs import Jobs, NewJob, Origin, given_input
from services.gateway.limits import SDAPI_LIMITS, RateLimiter

ROUTES: Mapping[str, str] = {
    "/api/v3/fine_tune": "fine_tune",
    "/api/v3/fine_tune_v2": "fine_tune_v2",
    "/api/v3/lora_fine_tune": "lora_fine_tune",
    "/api/v3/fine_tune_status/{id}": "fine_tune_status",
    "/api/v3/finetune_list": "finetune_list",
    "/api/v3/finetune/delete/{id}": "finetune_delete",
    "/api/v3/cancle_training/{id}": "cancel_training",
    "/api/v3/cancel_training/{id}": "cancel_training",
    "/api/sandbox/v3/fine_tune": "sandbox_fine_tune",
    "/api/sandbox/v3/fine_tune_status/{id}": "sandbox_status",
    "/api/v3/dreambooth": "text_to_image",
    "/api/v4/dreambooth": "text_to_image",
    "/api/v6/images/text2img": "text_to_image",
    "/api/v3/dreambooth/img2img": "image_to_image",
    "/api/v4/dreambooth/img2img": "image_to_image",
    "/api/v6/images/img2img": "image_to_image",
    "/api/v3/dreambooth/inpaint": "inpaint",
    "/api/v4/dreambooth/inpaint": "inpaint",
    "/api/v6/images/inpaint": "inpaint",
    "/api/v4/dreambooth/fetch": "fetch",
    "/api/v4/dreambooth/fetch/{id}": "fetch",
    "/api/v3/dreambooth/fetch/{id}": "fetch",
    "/api/v3/fetch/{id}": "fetch",
    "/api/v6/images/fetch": "fetch",
    "/api/v6/images/fetch/{id}": "fetch",
    "/api/v4/dreambooth/model_list": "model_list",
    "/api/v1/enterprise/schedulers_list": "schedulers_list",
    "/api/v4/schedulers_list": "schedulers_list",
    "/api/v3/system_load": "system_load",
}
"""Operations by path. `cancle` is how the vendor spells it; all are POST."""
ID_CHARS = 10
ID_TRIES = 5
DAY_S, WEEK_S = 24 * 3600, 7 * 24 * 3600
MAX_SEED_DRAWN = 2**32
PICTURE_TIMEOUT_S = 60.0
"""Longest time for fetching and reading a picture that a drawing starts from."""
LIVE = (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING)
LISTED = (*LIVE, job_pb2.JOB_STATE_SUCCEEDED)


@dataclass(frozen=True, slots=True)
class SdapiPolicy:
    """What a deployment decides of this dialect.

    Attributes:
        strict: errors have HTTP statuses of their own.
        jobs_at_once: trainings, and drawings, that a project may have waiting or running.
        sync_wait_s: seconds that a request for pictures is held before it is answered with where to ask again.
        sandbox_model: what trainings of the sandbox start from.
        sandbox_steps: most updates that they make.
    """

    strict: bool = False
    jobs_at_once: int = 10
    sync_wait_s: float = 50.0
    sandbox_model: str = EMBEDDED_MODEL
    sandbox_steps: int = 200


@dataclass(frozen=True, slots=True)
class SdapiCall:
    """One request.

    Attributes:
        authorization: the header; None without one.
        base_url: scheme and host that addresses in the answer begin with.
        path: the route, as :data:`ROUTES` has it.
        id: from the path; "" where the path has none.
        read_body: reads the body up to a limit in bytes; raises BodyTooLarge.
    """

    authorization: str | None
    base_url: str
    path: str
    id: str
    read_body: Callable[[int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class _Context:
    """A call whose body is read and whose key is known."""

    call: SdapiCall
    caller: Caller
    given: Mapping[str, Any]

    @property
    def project(self) -> str:
        return self.caller.project

    @property
    def training(self) -> Origin:
        return Origin(self.project, wire.DIALECT, trainings.ENDPOINT)

    @property
    def sandbox(self) -> Origin:
        return Origin(self.project, wire.DIALECT, trainings.SANDBOX)

    @property
    def drawing(self) -> Origin:
        return Origin(self.project, wire.DIALECT, pictures.ENDPOINT)


@dataclass(frozen=True, slots=True)
class _Operation:
    """One kind of request: who answers it, how it is counted, and what a NotFound is about."""

    answer: Callable[[_Context], Awaitable[Any]]
    limit: str
    not_found: wire.Told
    endpoint: str = trainings.ENDPOINT


class SdapiApi:
    """All operations of the dialect."""

    def __init__(
        self,
        *,
        auth: Authenticator,
        jobs: Jobs,
        drawings: Drawings,
        storage: StorageClient,
        links: Links,
        limiter: RateLimiter | None = None,
        check_url: Callable[[str], object],
        policy: SdapiPolicy = SdapiPolicy(),
    ) -> None:
        """Joins the parts.

        Args:
            auth: knows the keys.
            jobs: submits and reads trainings.
            drawings: submits and reads drawings.
            storage: the model registry.
            links: makes addresses of files.
            limiter: counts requests.
            check_url: raises InvalidSpec for a webhook that would not be visited.
            policy: what the deployment decides.
        """
        self._auth, self._jobs, self._drawings = auth, jobs, drawings
        self._storage, self._links = storage, links
        self._limiter = limiter or RateLimiter(SDAPI_LIMITS)
        self._check_url, self._policy = check_url, policy
        of_training, of_model = wire.NO_TRAINING, wire.NO_MODEL
        self.operations: Mapping[str, _Operation] = {
            "fine_tune": _Operation(partial(self._train, trainings.FINE_TUNE), "start", of_model),
            "fine_tune_v2": _Operation(partial(self._train, trainings.FINE_TUNE_V2), "start", of_model),
            "lora_fine_tune": _Operation(partial(self._train, trainings.LORA_FINE_TUNE), "start", of_model),
            "sandbox_fine_tune": _Operation(self._sandbox_fine_tune, "start", of_model),
            "sandbox_status": _Operation(self._sandbox_status, "read", of_training),
            "fine_tune_status": _Operation(self._status, "read", of_training),
            "finetune_list": _Operation(self._list, "read", of_training),
            "finetune_delete": _Operation(self._delete, "steer", of_training),
            "cancel_training": _Operation(self._cancel, "steer", of_training),
            "text_to_image": self._drawing_of(pictures.TEXT_TO_IMAGE),
            "image_to_image": self._drawing_of(pictures.IMAGE_TO_IMAGE),
            "inpaint": self._drawing_of(pictures.INPAINT),
            "fetch": _Operation(self._fetch, "read", wire.NO_REQUEST, pictures.ENDPOINT),
            "model_list": _Operation(self._model_list, "read", of_model, pictures.ENDPOINT),
            "schedulers_list": _Operation(self._schedulers_list, "read", of_model, pictures.ENDPOINT),
            "system_load": _Operation(self._system_load, "read", of_model, pictures.ENDPOINT),
        }

    def _drawing_of(self, rows: Sequence[Parameter]) -> _Operation:
        return _Operation(partial(self._draw, rows), "start", wire.NO_MODEL, pictures.ENDPOINT)

    async def answer(self, name: str, call: SdapiCall) -> Answer:
        """Answers a call; never raises."""
        operation, strict = self.operations[name], self._policy.strict
        try:
            context = await self._admitted(call, operation.endpoint)
            with self._limiter.admitted(context.caller, wire.DIALECT, operation.limit):
                return Answer(200, await operation.answer(context))
        except BodyTooLarge:
            return wire.too_large_answer()
        except LikenessError as error:
            if row_of(error).reason == "INTERNAL":
                return _internal_answer(error)
            return wire.error_answer(error, operation.not_found, strict)
        except Exception as error:
            return _internal_answer(error)

    async def _admitted(self, call: SdapiCall, endpoint: str) -> _Context:
        given = wire.read_body(await call.read_body(wire.MAX_BODY_BYTES))
        caller = await self._auth.caller(wire.authorization_of(given, call.authorization))
        if not caller.may(wire.DIALECT, endpoint):
            raise Unauthenticated("the key has no right to this dialect")
        return _Context(call, caller, {key: value for key, value in given.items() if key != "key"})

    # --- trainings -------------------------------------------------------------------------------------------

    async def _train(self, rows: Sequence[Parameter], context: _Context) -> dict[str, Any]:
        wish = trainings.read_training(context.given, rows)
        policy = job_pb2.JobPolicy()
        return await self._start(context, context.training, wish, wish.base_model, _new_training_id(), policy)

    async def _sandbox_fine_tune(self, context: _Context) -> dict[str, Any]:
        """A real training, short and after all others, so that an application can be built against it."""
        wish = trainings.read_training(context.given, trainings.SANDBOX_FINE_TUNE)
        policy = job_pb2.JobPolicy(priority=job_pb2.JOB_PRIORITY_LOW)
        policy.retention.FromSeconds(DAY_S)
        base, new_id = self._policy.sandbox_model, _new_training_id(trainings.SANDBOX_MARK)
        return await self._start(context, context.sandbox, wish, base, new_id, policy)

    async def _start(
        self,
        context: _Context,
        origin: Origin,
        wish: trainings.Wish,
        base_model: str,
        training_id: str,
        policy: job_pb2.JobPolicy,
    ) -> dict[str, Any]:
        self._check_webhook(wish.webhook)
        base = await self._model(context.project, base_model)
        seed = secrets.randbelow(MAX_SEED_DRAWN)
        submission = trainings.submission_of(wish, base, seed, self._policy.sandbox_steps)
        await self._check_room(origin)
        labels, scope = {"base_url": context.call.base_url}, job_pb2.WEBHOOK_SCOPE_EVERY_EVENT
        new = NewJob(training_id, submission, {}, wish.webhook, policy, labels, scope)
        try:
            job = await self._jobs.submit(origin, new)
        except InvalidSpec as error:
            raise trainings.in_callers_words(error) from error
        return trainings.started_body(job, await self._waiting())

    def _check_webhook(self, url: str) -> None:
        try:
            if url:
                self._check_url(url)
        except InvalidSpec as error:
            raise InvalidSpec(address_rule(error), "webhook") from error

    async def _model(self, project: str, name: str) -> model_pb2.Model:
        try:
            return await self._storage.get_model(project, name)
        except InvalidSpec as error:
            raise NotFound("no such model") from error

    async def _check_room(self, origin: Origin) -> None:
        """Raises QueueFull when the project has as much under way as it may."""
        most = self._policy.jobs_at_once
        if len(await self._jobs.listed(origin, LIVE, most)) >= most:
            raise QueueFull("too many trainings are under way")
        await self._jobs.check_queue(origin.endpoint)

    async def _waiting(self) -> int:
        """Trainings that come before one that was admitted just now; 0 when nobody knows."""
        with contextlib.suppress(LikenessError):
            figures = await self._jobs.queue_status("", "")
            if not figures.idle_workers:
                return max(0, figures.queued_jobs + figures.ready_jobs + figures.busy_workers - 1)
        return 0

    async def _status(self, context: _Context) -> dict[str, Any]:
        try:
            job = await self._jobs.get(context.training, _id_of(context))
        except NotFound:
            return trainings.model_body(await self._named_model(context))
        return await self._status_of(context, job)

    async def _sandbox_status(self, context: _Context) -> dict[str, Any]:
        return await self._status_of(context, await self._jobs.get(context.sandbox, _id_of(context)))

    async def _status_of(self, context: _Context, job: training_job_pb2.TrainingJob) -> dict[str, Any]:
        urls = await self._urls(job, context.call.base_url)
        return trainings.status_body(job, _now_ms(), urls)

    async def _named_model(self, context: _Context) -> model_pb2.Model:
        name = _id_of(context)
        if _is_of_sandbox(name):
            raise NotFound("no such training")
        return await self._model(context.project, name)

    async def _urls(self, job: training_job_pb2.TrainingJob, base_url: str) -> dict[str, str]:
        return await self._links.urls(job.project_id, trainings.files_of(job), base_url)

    async def _list(self, context: _Context) -> dict[str, Any]:
        jobs = {job.job_id: job for job in await self._jobs.listed(context.training, LISTED)}
        own = [model for model in await self._models(context.project) if model.project_id]
        models = {model.model: model for model in own if not _is_of_sandbox(model.model)}
        created = {name: model.create_time.ToMilliseconds() for name, model in models.items()}
        created |= {name: job.times.create_time.ToMilliseconds() for name, job in jobs.items()}
        ids = sorted(created, key=lambda name: created[name], reverse=True)
        if str(context.given.get("detail", "")).strip().lower() not in YES:
            return trainings.list_body(ids)
        return trainings.list_body([_item(name, models, jobs) for name in ids])

    async def _models(self, project: str) -> list[model_pb2.Model]:
        found: list[model_pb2.Model] = []
        token = ""
        while True:
            page = await self._storage.list_models(project, page_size=200, page_token=token)
            found += page.models
            token = page.next_page_token
            if not token:
                return found

    async def _delete(self, context: _Context) -> dict[str, Any]:
        training_id = _id_of(context)
        if _is_of_sandbox(training_id):
            raise NotFound("no such training")
        found = False
        with contextlib.suppress(NotFound):
            await self._jobs.delete(context.training, training_id)
            found = True
        try:
            await self._storage.delete_model(context.project, training_id)
        except (NotFound, InvalidSpec) as error:
            if not found:
                raise NotFound("no such training") from error
        return trainings.gone_body("model deleted", training_id)

    async def _cancel(self, context: _Context) -> dict[str, Any]:
        job = await self._jobs.cancel(context.training, _id_of(context))
        if job.state != job_pb2.JOB_STATE_CANCELLED:
            raise WrongState("The training has ended already")
        return trainings.gone_body("training cancelled", job.job_id)

    # --- pictures --------------------------------------------------------------------------------------------

    async def _draw(self, rows: Sequence[Parameter], context: _Context) -> dict[str, Any]:
        wish = pictures.read_drawing(context.given, rows)
        self._check_webhook(wish.webhook)
        if not wish.model:
            raise NotFound("no model is named")
        if _is_of_sandbox(wish.model):  # what the sandbox made goes with its record
            await self._jobs.get(context.sandbox, wish.model)
        model = await self._model(context.project, wish.model)
        most = self._policy.jobs_at_once
        if await self._drawings.count(context.drawing, LIVE, most) >= most:
            raise QueueFull("too many drawings are under way")
        keys = {
            name: await self._stored(context.project, name, picture)
            for name, picture in wish.pictures.items()
        }
        spec = pictures.spec_of(wish, model, secrets.randbelow(MAX_SEED_DRAWN), keys)
        kept = _kept(context, wish, await self._addresses(context, wish, keys))
        job = await self._drawn(context, spec, kept, wish.webhook)
        job = await self._drawings.wait(context.drawing, job.job_id, self._policy.sync_wait_s)
        return await self._shown(context, job)

    async def _stored(self, project: str, field: str, picture: Picture) -> str:
        """The key of a picture that a request names, fetched and decoded by storage."""
        source = ImageSource(image_urls=ImageUrls(urls=[picture.url]), field=field)
        if picture.data:
            blob = await self._storage.upload_bytes(project, picture.data, "application/octet-stream")
            source = ImageSource(artifacts=ArtifactKeys(keys=[blob.key]), field=field)
        try:
            dataset = await self._storage.import_dataset(project, source, timeout_s=PICTURE_TIMEOUT_S)
        except DeadlineExceeded as error:
            raise BadInput(f"cannot be fetched within {PICTURE_TIMEOUT_S:g} seconds", field) from error
        except InvalidSpec as error:
            rules = "; ".join(violation.rule for violation in error.violations)
            raise BadInput(f"must be a picture that can be used ({rules})", field) from error
        return dataset.images[0].key

    async def _addresses(
        self, context: _Context, wish: pictures.Wish, keys: Mapping[str, str]
    ) -> dict[str, str]:
        """Where the pictures that are started from can be seen: as they were named, else in our copy."""
        files = {
            name: File(keys[name], f"{name}.png") for name, picture in wish.pictures.items() if picture.data
        }
        links = await self._links.urls(context.project, files.values(), context.call.base_url)
        own = {name: links.get(file.key, "") for name, file in files.items()}
        return {name: picture.url for name, picture in wish.pictures.items()} | own

    async def _drawn(
        self, context: _Context, spec: generation_job_pb2.GenerationSpec, kept: pictures.Kept, webhook: str
    ) -> generation_job_pb2.GenerationJob:
        """Admits a drawing under an id that was never used; one that is taken is drawn again."""
        policy = job_pb2.JobPolicy()
        policy.retention.FromSeconds(DAY_S if kept.temp else WEEK_S)
        labels = {"base_url": context.call.base_url}
        for _ in range(ID_TRIES):
            job_id = str(1 + secrets.randbelow(pictures.MAX_ID - 1))
            new = NewDrawing(job_id, spec, kept.document(), webhook, policy, labels)
            try:
                return await self._drawings.submit(context.drawing, new)
            except AlreadyExists:
                continue
            except InvalidSpec as error:
                raise pictures.in_callers_words(error) from error
        raise Unavailable("no id is free")

    async def _shown(self, context: _Context, job: generation_job_pb2.GenerationJob) -> dict[str, Any]:
        kept, waiting = pictures.kept_of(given_input(job)), 0
        if job.state == job_pb2.JOB_STATE_QUEUED:
            with contextlib.suppress(LikenessError):
                waiting = (await self._drawings.queue_status()).queued_jobs
        texts = [await self._text(image.key) for image in job.result.images] if kept.base64 else []
        return pictures.body_of(job, kept, context.call.base_url, _now_ms(), waiting, texts)

    async def _text(self, key: str) -> str:
        return base64.b64encode(await self._storage.read_bytes(key)).decode()

    async def _fetch(self, context: _Context) -> dict[str, Any]:
        given = context.call.id or context.given.get("request_id")
        if given is None or str(given).strip().lower() in NULLISH:
            wire.check_fields(["request_id"], [])
        word = str(given).strip().removesuffix(".0")
        if not (word.isascii() and word.isdecimal() and len(word) <= ID_CHARS):
            raise NotFound("no such request")
        return await self._shown(context, await self._drawings.get(context.drawing, str(int(word))))

    async def picture(self, project: str, job_id: str, name: str) -> str:
        """The link below which a picture is served, `/files/<token>/<name>`.

        Args:
            project: owner of the drawing.
            job_id: the drawing.
            name: file name of the picture; what is secret of it stands in for a key.

        Raises:
            NotFound: there is no such picture, or not yet.
            Unavailable: a service does not answer.
        """
        key = await self._key_of_picture(project, job_id, name)
        links = await self._links.urls(project, [File(key, name)], "")
        if key not in links:
            raise NotFound("no such picture")
        return links[key]

    async def picture_text(self, project: str, job_id: str, name: str) -> str:
        """A picture in base64; arguments and errors as :meth:`picture`."""
        return await self._text(await self._key_of_picture(project, job_id, name))

    async def _key_of_picture(self, project: str, job_id: str, name: str) -> str:
        if not (ID_PATTERN.match(job_id) and ID_PATTERN.match(project)):
            raise NotFound("no such picture")
        origin = Origin(project, wire.DIALECT, pictures.ENDPOINT)
        job = await self._drawings.get(origin, job_id)
        key = pictures.picture_key(job, pictures.kept_of(given_input(job)), name)
        if not key:
            raise NotFound("no such picture")
        return key

    async def _model_list(self, context: _Context) -> list[dict[str, Any]]:
        """The catalogue, as a bare list."""
        models = await self._models(context.project)
        return [trainings.model_item(model) for model in models if not model.project_id]

    async def _schedulers_list(self, context: _Context) -> dict[str, Any]:
        return schedulers.list_body()

    async def _system_load(self, context: _Context) -> dict[str, Any]:
        figures = await self._drawings.queue_status()
        wait_s = figures.oldest_wait.ToSeconds() if figures.queued_jobs else 0
        return {"status": "ok", "queue_num": figures.queued_jobs, "queue_time": wait_s}

    # --- telling ---------------------------------------------------------------------------------------------

    async def training_document(
        self, job: training_job_pb2.TrainingJob, number: int, public_url: str
    ) -> bytes:
        """The body of a webhook about a training.

        Args:
            job: the training at the event.
            number: of the event.
            public_url: base of addresses; "": the one that the submitting request came to.
        """
        base_url = public_url or job.options.origin.labels.get("base_url", "")
        urls = await self._urls(job, base_url) if number == trainings.READY else {}
        return json.dumps(trainings.webhook_body(job, number, _now_ms(), urls)).encode()

    def drawing_document(self, job: generation_job_pb2.GenerationJob, public_url: str) -> bytes:
        """The body of a webhook about a drawing; `public_url` as for trainings."""
        base_url = public_url or job.options.origin.labels.get("base_url", "")
        return json.dumps(pictures.webhook_body(job, pictures.kept_of(given_input(job)), base_url)).encode()


def _kept(context: _Context, wish: pictures.Wish, addresses: Mapping[str, str]) -> pictures.Kept:
    return pictures.Kept(
        version="v3" if context.call.path.startswith("/api/v3/") else "v4",
        file_prefix=str(uuid.uuid4()),
        track_id=wish.values.get("track_id"),
        scheduler=wish.scheduler.name,
        temp=wish.values.get("temp", False),
        base64=wish.values.get("base64", False),
        tips=wish.tips,
        **addresses,
    )


def _item(
    name: str,
    models: Mapping[str, model_pb2.Model],
    jobs: Mapping[str, training_job_pb2.TrainingJob],
) -> dict[str, Any]:
    """A training in a detailed list: its model, as far as there is one."""
    model = models.get(name) or model_pb2.Model(model=name)
    item = trainings.model_item(model)
    job = jobs.get(name)
    if job is None:
        return item
    prompts = [concept.instance_prompt for concept in job.spec.concepts]
    word = trainings.word_of(job, trainings.reached_by(job))
    created = job.times.create_time.ToJsonString()
    return item | {"status": word, "created_at": created, "instance_prompt": prompts[0] if prompts else None}


def _id_of(context: _Context) -> str:
    if not ID_PATTERN.match(context.call.id):
        raise NotFound("no such training")
    return context.call.id


def _is_of_sandbox(name: str) -> bool:
    return len(name) == ID_CHARS and name.startswith(trainings.SANDBOX_MARK)


def _new_training_id(mark: str = "") -> str:
    """A fresh id; only those of the sandbox begin with its mark."""
    while True:
        drawn = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(ID_CHARS))
        new = (mark + drawn)[:ID_CHARS]
        if _is_of_sandbox(new) == bool(mark):
            return new


def _internal_answer(error: BaseException) -> Answer:
    return wire.internal_answer(reference_of(error))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
