"""Writes docs/parameters.md: what each field of a training does, who honours it, and what proves that.

Meanings are the protos' own comments, so that they are written once:

    python -m tests.unit.trainer.parameters_page > docs/parameters.md
"""

import sys
from collections.abc import Iterable
from typing import Final, TypeVar

from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FieldDescriptorProto
from likeness.training.v1 import training_job_pb2 as pb

from services.trainer.support import OF_OTHERS, RECIPES, honoured
from tests import protos
from tests.unit.trainer.proofs import PROOFS, places

Named = TypeVar("Named", DescriptorProto, EnumDescriptorProto)

FILE: Final = "likeness/training/v1/training_job.proto"
SPECIFICATION: Final = "TrainingSpec"
PARTS: Final = ("Concept", "ImageSource", "LoraSettings")
CHOICES: Final = (
    "Recipe",
    "TrainingMethod",
    "MixedPrecision",
    "LearningRateSchedule",
    "OptimizerPrecision",
    "ExportFormat",
)
_RECIPES: Final = {pb.RECIPE_DREAMBOOTH: "DreamBooth", pb.RECIPE_EVERYDREAM: "EveryDream"}
_HEAD: Final = f"""\
# Parameters of a training

Every field of `{SPECIFICATION}` (protos/{FILE}): what it does with its unit,
range and default, which recipes honour it, and the test that fails when they do not; tests are named with their file
in tests/unit/trainer. "Others" act on a field before or after the recipe. A field that is "refused" ends a request with
its name, unless it is left at zero; so does a field of one recipe in a request for another. The HTTP endpoints offer
some of these fields under names of their own (`/docs`).

This page is generated: `python -m tests.unit.trainer.parameters_page > docs/parameters.md`.
"""


class Source:
    """One proto file with its comments."""

    def __init__(self, name: str) -> None:
        """Reads a file by its path below `protos`."""
        self._file = protos.files_by_name()[name]
        self._comments = protos.comments(self._file)

    def fields(self, message: str) -> list[tuple[FieldDescriptorProto, str]]:
        """The fields of a message with their comments."""
        index, found = _named(self._file.message_type, message)
        return [(field, self._text(4, index, 2, number)) for number, field in enumerate(found.field)]

    def values(self, enum: str) -> list[tuple[str, str]]:
        """The values of an enum with their comments."""
        index, found = _named(self._file.enum_type, enum)
        return [(value.name, self._text(5, index, 2, number)) for number, value in enumerate(found.value)]

    def about(self, message: str) -> str:
        """The comment of a message."""
        return self._text(4, _named(self._file.message_type, message)[0])

    def about_enum(self, enum: str) -> str:
        """The comment of an enum."""
        return self._text(5, _named(self._file.enum_type, enum)[0])

    def _text(self, *path: int) -> str:
        """A comment in one line; the path is spelled with the numbers of the descriptor's own fields."""
        return " ".join(self._comments[path].split()).replace("|", "\\|")


def _named(items: Iterable[Named], name: str) -> tuple[int, Named]:
    return next((index, item) for index, item in enumerate(items) if item.name == name)


def render_page() -> str:
    """The whole page, as Markdown."""
    source = Source(FILE)
    lines = [_HEAD, "| field | what it does | honoured by | proof |", "|---|---|---|---|"]
    lines += [
        f"| `{field.name}` | {meaning} | {_honoured_by(field.name)} | {_proof(field.name)} |"
        for field, meaning in source.fields(SPECIFICATION)
    ]
    for message in PARTS:
        lines += ["", f"## {message}", "", source.about(message), "", "| field | what it is |", "|---|---|"]
        lines += [f"| `{field.name}` | {meaning} |" for field, meaning in source.fields(message)]
    for enum in CHOICES:
        lines += ["", f"## {enum}", "", source.about_enum(enum), "", "| value | what it means |", "|---|---|"]
        lines += [f"| `{value}` | {meaning} |" for value, meaning in source.values(enum)]
    return "\n".join(lines) + "\n"


def _honoured_by(field: str) -> str:
    recipes = [name for recipe, name in _RECIPES.items() if field in honoured(recipe)]
    if len(recipes) == len(RECIPES):
        return "all"
    return ", ".join(recipes) or ("others" if field in OF_OTHERS else "refused")


def _proof(field: str) -> str:
    if field in OF_OTHERS:
        return OF_OTHERS[field]
    test = PROOFS.get(field)
    return f"`{test}` in {places()[test]}" if test else ""


if __name__ == "__main__":
    sys.stdout.write(render_page())
