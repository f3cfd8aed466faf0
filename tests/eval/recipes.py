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
    """

    name: str
    text: str
    by: Literal["service", "diffusers"] = "service"
    input: Mapping[str, Any] = field(default_factory=dict)
    concept: Mapping[str, Any] = field(default_factory=dict)


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
)


def shortened(recipe: Recipe, updates: int | None, class_images: int | None) -> Recipe:
    """A recipe with fewer updates or class pictures, for a trial; None leaves a number as it is."""
    given = dict(recipe.input) | ({"max_train_steps": updates} if updates else {})
    wanted = dict(recipe.concept)
    if class_images and wanted.get("num_class_images"):
        wanted["num_class_images"] = class_images
    return replace(recipe, input=given, concept=wanted)
