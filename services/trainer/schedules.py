"""How long a training runs and which learning rate each part of the model has when: the recipes' rules as numbers."""

import math
from collections.abc import Collection

from likeness.training.v1 import training_job_pb2 as pb

from services.trainer.execution import schedule_name
from services.trainer.optim import LearningRateSchedule, peak_learning_rate

BATCH_EXPONENT = {pb.RECIPE_EVERYDREAM: 0.55}
"""With `scale_learning_rate` the rate grows with this power of the samples of an update; 1 unless named here."""
DECAY_SHARE = {pb.RECIPE_EVERYDREAM: 1.5}
"""Length of the curve as a multiple of the training's; 1 unless named here."""
WARMUP_SHARE = {pb.RECIPE_EVERYDREAM: 50}
"""Without a given warm-up it is the curve's length over this, rounded down; 0 unless named here."""


def own_steps(spec: pb.TrainingSpec, part: str) -> int:
    """Returns the updates after which one part is frozen; 0: never."""
    return int(spec.unet_steps if part == "unet" else spec.text_encoder_steps)


def total_updates(spec: pb.TrainingSpec, updates_of_epochs: int, parts: Collection[str]) -> int:
    """Returns the updates of the whole training; it ends early when every part that trains has been frozen.

    Args:
        spec: complete.
        updates_of_epochs: of all epochs together; they count where no number of updates is given.
        parts: what trains, at least one.
    """
    asked = int(spec.max_train_steps or updates_of_epochs)
    own = [own_steps(spec, part) for part in parts]
    return min(asked, max(own)) if all(own) else asked


def learning_rates(spec: pb.TrainingSpec, part: str, updates: int) -> LearningRateSchedule:
    """Returns the learning-rate curve of one part of the model.

    Args:
        spec: complete.
        part: `unet` or `text_encoder`.
        updates: of the whole training as it was first planned; a part that is frozen earlier has a shorter curve.
    """
    own = part == "text_encoder" and spec.HasField("text_encoder_learning_rate")
    peak = peak_learning_rate(
        spec.text_encoder_learning_rate if own else spec.learning_rate,
        scale_lr=spec.scale_learning_rate,
        train_batch_size=spec.train_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        exponent=BATCH_EXPONENT.get(spec.recipe, 1.0),
    )
    decay = spec.lr_decay_steps or _curve_length(spec, part, updates)
    return LearningRateSchedule(
        schedule_name(spec), peak, warmup_steps(spec, decay), decay, spec.lr_num_cycles
    )


def warmup_steps(spec: pb.TrainingSpec, decay_steps: int) -> int:
    """Returns the updates from zero to the peak."""
    if spec.HasField("lr_warmup_steps"):
        return int(spec.lr_warmup_steps)
    share = WARMUP_SHARE.get(spec.recipe)
    return decay_steps // share if share else 0


def _curve_length(spec: pb.TrainingSpec, part: str, updates: int) -> int:
    length = min(updates, own_steps(spec, part) or updates)
    return math.ceil(DECAY_SHARE.get(spec.recipe, 1) * length)
