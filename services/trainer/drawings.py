"""Which pictures a training asks the inference service for, and under which ids. Pure rules.

Everything here is a function of the record and the specification alone, so that whoever leads a job asks for the same
drawings, and a picture of a class can be found again by every job that needs it.
"""

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from likeness.inference.v1 import generation_job_pb2
from likeness.training.v1 import training_job_pb2

from services.domain.job import JobRecord

IMAGES_PER_DRAWING: Final = 10
TEST_PICTURE_STEPS: Final = 20
PLAIN_PROMPT: Final = "a photo"
CLASS_IMAGE_STEPS: Final = 50
CLASS_IMAGE_GUIDANCE: Final = 7.5
CLASS_IMAGE_SCHEDULER: Final = generation_job_pb2.SCHEDULER_DDIM


@dataclass(frozen=True, slots=True)
class ClassImages:
    """The rule by which class pictures of one concept are drawn; picture i depends on nothing but this and i.

    Attributes:
        base_digest: manifest digest of the untouched base model.
        model: its id, for the drawing.
        prompt: the class prompt.
        size_px: width and height, the training's resolution.
        seed: seed of picture 0; picture i has seed + i.
    """

    base_digest: str
    model: str
    prompt: str
    size_px: int
    seed: int

    def seed_of(self, index: int) -> int:
        """Seed of picture `index`."""
        return self.seed + index

    def name(self, index: int) -> str:
        """Cache key of picture `index`: a hash of everything its pixels depend on."""
        parts = [
            self.base_digest,
            self.prompt,
            self.size_px,
            CLASS_IMAGE_STEPS,
            CLASS_IMAGE_GUIDANCE,
            generation_job_pb2.Scheduler.Name(CLASS_IMAGE_SCHEDULER),
            self.seed,
            index,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def drawing(self, first: int, count: int) -> generation_job_pb2.GenerationSpec:
        """The drawing of pictures `first` to `first + count - 1`."""
        return generation_job_pb2.GenerationSpec(
            model=self.model,
            prompt=self.prompt,
            width_px=self.size_px,
            height_px=self.size_px,
            num_images=count,
            num_inference_steps=CLASS_IMAGE_STEPS,
            guidance_scale=CLASS_IMAGE_GUIDANCE,
            scheduler=CLASS_IMAGE_SCHEDULER,
            seed=self.seed_of(first),
        )


def has_prior(spec: training_job_pb2.TrainingSpec, concept: training_job_pb2.Concept) -> bool:
    """Whether this concept trains with prior preservation: its own switch, else the job's; never with weight zero."""
    if spec.HasField("prior_loss_weight") and spec.prior_loss_weight == 0:
        return False
    if concept.HasField("with_prior_preservation"):
        return concept.with_prior_preservation
    return spec.with_prior_preservation


def child_id(record: JobRecord, name: str) -> str:
    """Id of a job's drawing: the same whoever leads it, another in each run."""
    namespace = uuid.uuid5(uuid.NAMESPACE_URL, f"likeness:{record.project}/{record.id}")
    return str(uuid.uuid5(namespace, f"{record.round}/{name}"))


def runs_of(indices: Sequence[int], longest: int) -> list[tuple[int, int]]:
    """Cuts rising numbers into runs of neighbours: (first, length) pairs, none longer than `longest`."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == sum(runs[-1]) and runs[-1][1] < max(1, longest):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


def proof_drawing(
    spec: training_job_pb2.TrainingSpec, result: training_job_pb2.TrainingResult, record: JobRecord
) -> generation_job_pb2.GenerationSpec:
    """The picture that proves a model: its own instance prompt, few steps, a fixed seed.

    Captioned trainings need no such prompt; then it is that of the first sample or preview, else a plain one.
    """
    prompts = [
        spec.concepts[0].instance_prompt,
        *(sample.prompt for sample in spec.samples),
        *spec.preview_prompts,
    ]
    return generation_job_pb2.GenerationSpec(
        model=result.model or record.id,
        prompt=next((prompt for prompt in prompts if prompt), PLAIN_PROMPT),
        negative_prompt=spec.test_negative_prompt,
        num_images=1,
        num_inference_steps=TEST_PICTURE_STEPS,
        scheduler=generation_job_pb2.SCHEDULER_DDIM,
        seed=spec.seed,
        clip_skip=spec.clip_skip,
    )


def sample_drawing(
    sample: generation_job_pb2.GenerationSpec,
    index: int,
    result: training_job_pb2.TrainingResult,
    record: JobRecord,
) -> generation_job_pb2.GenerationSpec:
    """A sample aimed at the finished model; a missing seed is drawn from 0..65535, the same for every leader."""
    drawing = generation_job_pb2.GenerationSpec()
    drawing.CopyFrom(sample)
    drawing.model = result.model or record.id
    drawing.num_images = max(1, sample.num_images)
    if not sample.HasField("seed"):
        drawn = hashlib.sha256(f"{record.project}/{record.id}/{record.round}/{index}".encode()).digest()
        drawing.seed = int.from_bytes(drawn[:2], "big")
    return drawing
