"""Trainings with every feature on that draws random numbers or keeps a state: what an interruption could harm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from likeness.training.v1 import training_job_pb2 as pb

from services.trainer.buckets import Size
from services.trainer.captions import CaptionedData, Tag
from services.trainer.data import Concept
from tests.unit.trainer.harness import captioned_spec, complete_spec, make_concept, pictures_of

STEPS = 10
"""Updates of each: five epochs of the DreamBooth data, three and a half of the captioned one."""

LOW_RANK: Mapping[str, Any] = {
    "method": pb.TRAINING_METHOD_LORA,
    "lora": pb.LoraSettings(rank=2, alpha=3, dropout=0.3),
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One training: what is asked for, and its data."""

    spec: pb.TrainingSpec
    concepts: tuple[Concept, ...] = ()
    captioned: CaptionedData | None = None


def random_features(**changes: Any) -> dict[str, Any]:
    """What all recipes have of such features; the rates decay and the text encoder is frozen on the way."""
    values: dict[str, Any] = {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": pb.LEARNING_RATE_SCHEDULE_COSINE,
        "lr_warmup_steps": 2,
        "max_train_steps": STEPS,
        "caption_dropout": 0.3,
        "shuffle_tags": True,
        "tag_dropout": 0.2,
        "flip_probability": 0.5,
        "offset_noise": 0.1,
        "min_snr_gamma": 5.0,
        "ema_decay": 0.9,
        "clip_skip": 2,
        "text_encoder_steps": 6,
        "clip_models_separately": True,
    }
    return values | changes


def dreambooth_concepts(folder: Path) -> tuple[Concept, ...]:
    """Two concepts whose prompts have tags, with pictures that are cropped at random."""
    shapes = ((3, 7, (40, 16)), (2, 3, (16, 24)))
    return tuple(
        make_concept(
            folder / f"concept-{index}",
            instances=instances,
            classes=classes,
            size=size,
            index=index,
            instance_prompt="a photo of sks dog, red, blue, green",
            class_prompt="a photo of a dog, snow, night",
        )
        for index, (instances, classes, size) in enumerate(shapes)
    )


def _dreambooth(folder: Path, **changes: Any) -> Scenario:
    spec = complete_spec(**random_features(balance_concepts=True, **changes))
    return Scenario(spec, dreambooth_concepts(folder))


def _everydream(folder: Path) -> Scenario:
    own = {"num_train_epochs": 6, "crop_jitter": 0.02}
    rated = {"rated_dataset": True, "rated_dataset_final_percent": 40.0}
    data = pictures_of(
        folder / "captioned", 5, [Size(64, 64), Size(200, 70)], tags=(Tag("snow", 2.0), Tag("night"))
    )
    eight_bit = {"optimizer_precision": pb.OPTIMIZER_PRECISION_EIGHT_BIT}
    return Scenario(captioned_spec(**random_features(**own, **rated, **eight_bit)), captioned=data)


SCENARIOS: Mapping[str, Callable[[Path], Scenario]] = {
    "DreamBooth": _dreambooth,
    "DreamBooth LoRA": lambda folder: _dreambooth(folder, **LOW_RANK),
    "EveryDream": _everydream,
}
"""By name; each makes its data in the folder it is given, the same bytes every time."""
