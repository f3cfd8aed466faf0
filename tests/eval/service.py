"""Training and drawing as a user has them: the embedded platform, asked over HTTP in the RunPod dialect.

What that dialect has no words for is asked of the training service by gRPC, as an internal client does, under the
dialect's name, so that the job is followed and its pictures are fetched over HTTP all the same.
"""

import asyncio
import io
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from google.protobuf import json_format
from likeness.job.v1 import job_pb2
from likeness.training.v1 import training_job_pb2, training_service_pb2
from likeness.training.v1.training_service_pb2_grpc import TrainingServiceStub
from PIL import Image

from services.adapters.grpc_client import Channel
from services.cli.gateway_client import Gateway, Snapshot
from services.gateway.dialects.runpod import dream_booth_v1
from services.launcher.platform import Platform
from services.storage.bootstrap import DEV_PROJECT
from tests.e2e.running import served, zip_of
from tests.eval.pipelines import GUIDANCE, STEPS
from tests.eval.recipes import Recipe

MODEL = "evaluated"
SCHEDULER = "DDIM"


@dataclass(frozen=True, slots=True)
class Learned:
    """What came of one training.

    Attributes:
        seconds: from the request to the last picture.
        training_seconds: from the request until the trained model was there.
    """

    seconds: float
    training_seconds: float


class Service:
    """An embedded platform in a temporary folder, with one base model. A context manager."""

    def __init__(self, model: Path) -> None:
        """Prepares it. `model`: a diffusers folder."""
        self._model = model.resolve()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Starts the platform."""
        with ExitStack() as stack:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="likeness-eval-")))
            catalogue = home / "models.toml"
            catalogue.write_text(f"[{MODEL}]\nsource = {json.dumps(f'file:{self._model}')}\n")
            environ = {
                "LIKENESS_MODELS": str(catalogue),
                "LIKENESS_BASE_MODEL": MODEL,
                "LIKENESS_EGRESS_ALLOW": "127.0.0.1/32",
            }
            platform = stack.enter_context(Platform(home / "home", environ))
            self._training_address = platform.settings["LIKENESS_TRAINING_ADDR"]
            self._gateway = stack.enter_context(Gateway(platform.url, platform.api_key))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops it and removes its folder."""
        self._stack.close()

    def learn(
        self,
        recipe: Recipe,
        prompts: tuple[str, str],
        pictures: Sequence[tuple[Image.Image, str]],
        samples: Sequence[str],
        seeds: int,
        folder: Path,
    ) -> Learned:
        """Has a subject taught, and its pictures drawn and saved.

        Args:
            prompts: instance prompt and class prompt.
            pictures: of the subject, each with its caption.
            samples: prompts to draw with the trained model; sample i has the seeds that `seeds_of` says.
            seeds: pictures of each.
            folder: where the pictures go, by `path_of`.

        Raises:
            RuntimeError: the job did not succeed.
        """
        archive = zip_of(archive_files(recipe, pictures))
        with served({"pictures.zip": archive}) as url:
            request = request_for(recipe, prompts, f"{url}/pictures.zip", samples, seeds)
            started = time.monotonic()
            job_id = (
                self._gateway.submit(request) if not recipe.spec else self._create(spec_of(recipe, request))
            )
            ended, training_seconds = self._followed(job_id, started)
        if ended.status != "COMPLETED":
            raise RuntimeError(f"{recipe.name}: the job ended {ended.status}: {ended.body.get('error', '')}")
        seconds = time.monotonic() - started
        for index, picture in enumerate(ended.body["output"]):
            sample, offset = divmod(index, seeds)
            path = path_of(folder, sample, offset)
            self._gateway.download(picture["image"], path)
            if picture["seed"] != seeds_of(sample, seeds)[offset]:
                raise RuntimeError(f"{recipe.name}: picture {index} came out of order")
        return Learned(round(seconds, 1), round(training_seconds, 1))

    def _create(self, spec: training_job_pb2.TrainingSpec) -> str:
        origin = job_pb2.JobOrigin(dialect="runpod", endpoint=dream_booth_v1.ENDPOINT)
        request = training_service_pb2.CreateTrainingJobRequest(
            project_id=DEV_PROJECT, spec=spec, options=job_pb2.JobOptions(origin=origin)
        )

        async def create() -> str:
            async with Channel(self._training_address) as channel:
                answer = await TrainingServiceStub(channel).CreateTrainingJob(request)
            return str(answer.job.job_id)

        return asyncio.run(create())

    def _followed(self, job_id: str, started: float) -> tuple[Snapshot, float]:
        training_seconds = 0.0
        for snapshot in self._gateway.follow(job_id):
            if snapshot.stage == "sampling" and not training_seconds:
                training_seconds = time.monotonic() - started
        return snapshot, training_seconds or time.monotonic() - started


def request_for(
    recipe: Recipe, prompts: tuple[str, str], archive: str, samples: Sequence[str], seeds: int
) -> Mapping[str, Any]:
    """The body of `/run`; arguments as `Service.learn`, the pictures behind a URL."""
    concept = {"instance_data": archive, "instance_prompt": prompts[0], "class_prompt": prompts[1]}
    drawing = {"infer_steps": STEPS, "guidance_scale": GUIDANCE, "scheduler": SCHEDULER, "num_outputs": seeds}
    wanted = [
        {"prompt": prompt, "seed": seeds_of(index, seeds)[0]} | drawing
        for index, prompt in enumerate(samples)
    ]
    return {"input": {"concepts": [concept | dict(recipe.concept)], "samples": wanted, **recipe.input}}


def spec_of(recipe: Recipe, request: Mapping[str, Any]) -> training_job_pb2.TrainingSpec:
    """What a body of `/run` means, and what the recipe says beside it."""
    spec = dream_booth_v1.read_input(request["input"], lambda: 0).spec
    return json_format.ParseDict(dict(recipe.spec), spec)


def archive_files(recipe: Recipe, pictures: Sequence[tuple[Image.Image, str]]) -> dict[str, bytes]:
    """The pictures by file name, with text files of their captions where the recipe is captioned."""
    files = {f"{index}.png": _png(picture) for index, (picture, _) in enumerate(pictures)}
    if recipe.captioned:
        files |= {f"{index}.txt": caption.encode() for index, (_, caption) in enumerate(pictures)}
    return files


def seeds_of(sample: int, seeds: int) -> range:
    """Seeds of the pictures of one prompt, by its position."""
    return range(1000 * sample, 1000 * sample + seeds)


def path_of(folder: Path, sample: int, offset: int) -> Path:
    """Where picture `offset` of prompt number `sample` lies."""
    return folder / f"{sample:02d}-{offset}.png"


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
