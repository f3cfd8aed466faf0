"""How subjects are taught: the numbers to tune, and the rows of the personalisation table.

A later method adds a `Recipe` to `RECIPES`: its name, a sentence, and what its request to the service has that the
others' have not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

UPDATES = 300
BATCH = 4
"""Instance pictures in one update; with a prior, as many class pictures beside them."""
LEARNING_RATE = 3e-4
"""Of the UNet and of the text encoder."""
CLASS_IMAGES = 48
PRIOR_WEIGHT = 1.0
LORA_RANK = 16
LORA_LEARNING_RATE = 3e-3
TEXT_ENCODER_UPDATES = 150
INSTANCE_PICTURES = 5
TRAINING_SEED = 1337
IDENTIFIER = "sks"
SUBJECT_NAMES = ("robot", "cat", "house", "fish", "tree", "car")
"""Keys of `figures.SUBJECTS`: the individuals that are taught, one a training."""
SEEDS = 3
"""Pictures of each prompt."""

_COMMON: dict[str, Any] = {
    "max_train_steps": UPDATES,
    "train_batch_size": BATCH,
    "learning_rate": LEARNING_RATE,
    "resolution": 512,
    "train_text_encoder": True,
    # The base learned from captions padded to the window, and pictures are drawn from such.
    "pad_tokens": True,
    "seed": TRAINING_SEED,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One row of the table.

    Attributes:
        name: of the row; unique.
        text: what is done, as a sentence part.
        by: who trains: the service, or diffusers' own example script.
        input: of the request, beside `concepts` and `samples`; the script is told the same numbers as arguments.
        concept: of its one concept, beside pictures and prompts.
        spec: fields of `TrainingSpec`, in its JSON form, that the request has no words for. A recipe with such asks the
            training service itself, by gRPC, for what the request means and these.
        captioned: each picture comes with a caption that names its background, in a text file beside it.
    """

    name: str
    text: str
    by: Literal["service", "diffusers"] = "service"
    input: Mapping[str, Any] = field(default_factory=dict)
    concept: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    captioned: bool = False


_PRIOR = _COMMON | {"with_prior_preservation": True, "prior_loss_weight": PRIOR_WEIGHT}

RECIPES = (
    Recipe(
        "full, prior",
        "all weights of UNet and text encoder, prior preservation",
        input=_PRIOR,
        concept={"num_class_images": CLASS_IMAGES},
    ),
    Recipe(
        "full, no prior",
        "the same without prior preservation",
        input=_COMMON | {"with_prior_preservation": False},
        concept={"num_class_images": 0},
    ),
    Recipe(
        "diffusers script, prior",
        "diffusers' `train_dreambooth.py` with the numbers of the first row",
        by="diffusers",
        input=_PRIOR,
        concept={"num_class_images": CLASS_IMAGES},
    ),
    Recipe(
        "LoRA, prior",
        f"low-rank factors of rank {LORA_RANK} on every attention and convolution of the UNet and on the text "
        "encoder, prior preservation",
        input=_PRIOR | {"learning_rate": LORA_LEARNING_RATE},
        concept={"num_class_images": CLASS_IMAGES},
        spec={
            "method": "TRAINING_METHOD_LOCON",
            "lora": {
                "rank": LORA_RANK,
                "alpha": LORA_RANK,
                "conv_rank": LORA_RANK,
                "conv_alpha": LORA_RANK,
            },
        },
    ),
    Recipe(
        "two schedules, prior",
        f"as the first row, but the text encoder learns for {TEXT_ENCODER_UPDATES} updates only, "
        "as `fine_tune_v2` has it",
        input=_PRIOR,
        concept={"num_class_images": CLASS_IMAGES},
        spec={"text_encoder_steps": TEXT_ENCODER_UPDATES},
    ),
    Recipe(
        "captioned",
        "general fine-tuning by the EveryDream recipe: each picture has a caption that names its background, no prior",
        input=_COMMON | {"with_prior_preservation": False},
        concept={"num_class_images": 0},
        spec={
            "recipe": "RECIPE_EVERYDREAM",
            "aspect_ratio_bucketing": True,
            "clip_models_separately": True,
            "caption_dropout": 0.04,
        },
        captioned=True,
    ),
)


def shortened(recipe: Recipe, updates: int | None, class_images: int | None) -> Recipe:
    """A recipe with fewer updates or class pictures, for a trial; None leaves a number as it is."""
    given = dict(recipe.input) | ({"max_train_steps": updates} if updates else {})
    wanted, spec = dict(recipe.concept), dict(recipe.spec)
    if class_images and wanted.get("num_class_images"):
        wanted["num_class_images"] = class_images
    if updates and "text_encoder_steps" in spec:
        spec["text_encoder_steps"] = max(1, updates * TEXT_ENCODER_UPDATES // UPDATES)
    return replace(recipe, input=given, concept=wanted, spec=spec)
