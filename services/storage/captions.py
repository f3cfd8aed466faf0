"""What is said of a picture, in parts, and how what several files say is put together.

Owns the parts and their order of precedence: of words and settings the nearer file's count, tags add up. Reading the
files belongs to :mod:`services.storage.caption_files`. Captions are text and nothing else: a caption that happens to be
a path is never opened.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any, Final

MAX_CAPTION_CHARS: Final = 10_000
MAX_TAGS: Final = 500


class Source(StrEnum):
    """Where the words of a caption come from, strongest first."""

    YAML = "yaml"
    TEXT = "text"
    FOLDER = "folder"
    FILE_NAME = "file_name"


@dataclass(frozen=True, slots=True)
class Tag:
    """One tag; `weight` says how far to the front shuffling tends to put it, None as far as any other."""

    text: str
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """What is said of a picture, by one file or by several; None where they are silent.

    Attributes:
        main_prompt: opening of the caption, never divided.
        text: caption as somebody wrote it; commas part its tags.
        tags: further tags.
        source: where main prompt and text come from; both always come from one place.
        max_caption_chars: whole tags are left out from the end beyond this.
        multiplier: how often the picture occurs in an epoch.
        rating: how long it stays in a rated dataset.
        caption_dropout: probability of an empty caption.
        flip_probability: probability of mirroring.
        shuffle_tags: whether tags are shuffled.
        loss_scale: weight of its loss.
        batch_id: pictures of one id share batches.
    """

    main_prompt: str | None = None
    text: str | None = None
    tags: tuple[Tag, ...] = ()
    source: Source | None = None
    max_caption_chars: int | None = None
    multiplier: float | None = None
    rating: float | None = None
    caption_dropout: float | None = None
    flip_probability: float | None = None
    shuffle_tags: bool | None = None
    loss_scale: float | None = None
    batch_id: str | None = None

    @property
    def has_words(self) -> bool:
        """Whether it says what the picture shows, be it with an empty text."""
        return self.main_prompt is not None or self.text is not None

    @property
    def caption(self) -> str:
        """The whole caption in the order of its parts."""
        parts = [self.main_prompt or "", self.text or "", *(tag.text for tag in self.tags)]
        return ", ".join(part for part in parts if part)

    def over(self, farther: "Description") -> "Description":
        """This description completed by one of a file farther away, or of a weaker kind."""
        words = self if self.has_words else farther
        merged = {
            field.name: _first(getattr(self, field.name), getattr(farther, field.name))
            for field in fields(self)
        }
        own = {"main_prompt": words.main_prompt, "text": words.text, "source": words.source}
        return Description(**merged | own | {"tags": _united((*self.tags, *farther.tags))})

    def finished(self) -> "Description":
        """Without the tags that the words hold already."""
        said = {_folded(part) for part in (self.text or "").split(",")} | {_folded(self.main_prompt or "")}
        return replace(self, tags=tuple(tag for tag in self.tags if _folded(tag.text) not in said))

    def to_message(self) -> dict[str, Any]:
        """The description as JSON values."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> "Description":
        """Reads back what :meth:`to_message` wrote."""
        source = message["source"]
        parts = {
            "tags": tuple(Tag(**tag) for tag in message["tags"]),
            "source": None if source is None else Source(source),
        }
        return cls(**message | parts)


def file_name_caption(picture: str) -> str:
    """The caption that a picture's own name is: up to the first underscore, without extension.

    Args:
        picture: path of the picture, with slashes.
    """
    return " ".join(PurePosixPath(picture).stem.split("_")[0].split())


def _first(nearer: Any, farther: Any) -> Any:
    return farther if nearer is None else nearer


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _united(tags: Iterable[Tag]) -> tuple[Tag, ...]:
    """Each tag once, as it was said first."""
    seen: dict[str, Tag] = {}
    for tag in tags:
        seen.setdefault(_folded(tag.text), tag)
    return tuple(seen.values())
