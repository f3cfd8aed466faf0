"""Pictures of a model that trains, drawn between two updates: the same prompts with the same seed, time after time.

A drawing leaves no trace in the training: gradients are off, random numbers come from a generator of the drawing's own,
and the modules have their modes back afterwards. With a moving average it is the average that is drawn with, since
that is what will be published.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from likeness.inference.v1 import generation_job_pb2
from PIL import Image
from torch import nn

from services.diffusion.devices import as_device_memory_error
from services.diffusion.drawing import Drawing, draw
from services.domain.errors import Diverged
from services.trainer.moving_average import MovingAverage
from services.trainer.run import Observer, Preview, Run
from services.trainer.trained_model import TrainedModel, published_form

logger = logging.getLogger(__name__)

STEPS = 20
GUIDANCE_SCALE = 7.5
SCHEDULER = generation_job_pb2.SCHEDULER_DDIM
MAX_REMARKS = 5


class Previews:
    """Draws what is due, one picture at a time, so that whoever waits for the training waits for one at most.

    Args:
        run: the prompts, how often, and where the files go.
        model: what trains.
        average: of its weights.
        total: updates in all; there is a round after the last.

    Attributes:
        remarks: what was remarkable about pictures, for the owner.
    """

    def __init__(self, run: Run, model: TrainedModel, average: MovingAverage, total: int) -> None:
        self.remarks: list[str] = []
        self._run = run
        self._model = model
        self._average = average
        self._total = total
        self._step = 0
        self._drawn = 0
        self._seconds_per_picture = 0.0

    def due(self, update: int) -> bool:
        """Whether a picture is still to be drawn before the next update.

        Args:
            update: updates that are over.
        """
        spec = self._run.spec
        has_round = update > 0 and (update % spec.preview_steps == 0 or update == self._total)
        return has_round and (self._drawn if self._step == update else 0) < len(spec.preview_prompts)

    def seconds_left(self, update: int) -> float:
        """Returns what the pictures before the last update will take, by what the last one took."""
        spec = self._run.spec
        rounds = (self._total - 1) // spec.preview_steps - (update - 1) // spec.preview_steps
        return max(0, rounds) * len(spec.preview_prompts) * self._seconds_per_picture

    def draw_next(self, update: int, observer: Observer) -> None:
        """Draws the next picture that is due and tells it.

        One that is not finite, or for which the device has no memory left, is left out with a remark.
        """
        if self._step != update:
            self._step, self._drawn = update, 0
        index, self._drawn = self._drawn, self._drawn + 1
        spec = self._run.spec
        preview = Preview(self._run.preview_folder, update, index, spec.seed, spec.resolution)
        began = time.monotonic()
        try:
            image = self._draw(index)
        except Exception as error:
            known = error if isinstance(error, Diverged) else as_device_memory_error(error)
            if known is None:
                raise
            self._remark(f"there is no {preview.name}: {known}")
            return
        self._seconds_per_picture = time.monotonic() - began
        if image.getbbox() is None:
            self._remark(f"{preview.name} is black all over")
        preview.file.parent.mkdir(parents=True, exist_ok=True)
        image.save(preview.file)
        logger.info("preview drawn", extra={"preview": preview.name, "step": update})
        observer.preview_drawn(preview)

    def _draw(self, index: int) -> Image.Image:
        components = self._model.components
        with (
            evaluating(components.unet, components.text_encoder, components.vae),
            _own_random_state(self._run.device),
            self._average.in_place(),
        ):
            return draw(published_form(components, self._run.spec), self._drawing(index))

    def _drawing(self, index: int) -> Drawing:
        spec = self._run.spec
        return Drawing(
            prompt=spec.preview_prompts[index],
            width_px=spec.resolution,
            height_px=spec.resolution,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            scheduler=SCHEDULER,
            clip_skip=max(1, spec.clip_skip),
            seed=spec.seed,
        )

    def _remark(self, text: str) -> None:
        if len(self.remarks) < MAX_REMARKS:
            self.remarks.append(text)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Puts modules into evaluation mode for the length of the block, and each inner one back into its own after it."""
    modes = [(inner, inner.training) for module in modules for inner in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for inner, mode in modes:
            inner.training = mode


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Gives the library's generators their state back after the block, whatever was drawn from them in it."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
