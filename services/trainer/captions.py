"""Pictures with captions of their own, and the caption of each use of one: shuffled, thinned or left out.

Storage has read the files that describe a picture (`DatasetImage.caption_parts` and `settings`); what they leave open
is the training's choice. Each draw is named by the use, so a caption is the same in whatever batch it falls.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath

from likeness.storage.v1 import artifact_pb2 as storage
from likeness.training.v1 import training_job_pb2 as pb

from services.trainer.buckets import Size
from services.trainer.data import Picture
from services.trainer.epoch_lists import SMALLEST
from services.trainer.randomness import Coordinate, Purpose, uniform


@dataclass(frozen=True, slots=True)
class Tag:
    """One tag; a greater weight tends to bring it further to the front when tags are shuffled."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class CaptionedPicture(Picture):
    """A picture with what its files say of it; `prompt` is its whole caption as it was written.

    Attributes:
        name: id within its dataset, for people.
        size: of the stored picture.
        main_prompt: opening of the caption; empty: the first part of `text` is.
        text: caption as somebody wrote it; commas part its tags.
        tags: further tags.
        max_caption_chars: whole tags are left out from the end beyond this; 0: no limit.
        multiplier: how often it occurs in an epoch.
        rating: how long it stays in a rated dataset, above 0.
        caption_dropout: probability of an empty caption; None: the training's.
        flip_probability: probability of mirroring; None: the training's.
        shuffle_tags: None: the training's choice.
        loss_scale: weight of its loss.
        batch_id: pictures of one id share batches; empty: none.
    """

    name: str
    size: Size
    main_prompt: str = ""
    text: str = ""
    tags: tuple[Tag, ...] = ()
    max_caption_chars: int = 0
    multiplier: float = 1.0
    rating: float = 1.0
    caption_dropout: float | None = None
    flip_probability: float | None = None
    shuffle_tags: bool | None = None
    loss_scale: float = 1.0
    batch_id: str = ""

    @property
    def folder(self) -> str:
        """Where it lies in its archive."""
        return str(PurePosixPath(self.name).parent)

    @property
    def parts(self) -> list[Tag]:
        """The caption's parts; the first one keeps its place."""
        opening = [Tag(self.main_prompt)] if self.main_prompt else []
        written = [Tag(part.strip()) for part in self.text.split(",") if part.strip()]
        return [*opening, *written, *self.tags]


@dataclass(frozen=True, slots=True)
class CaptionedData:
    """What a captioned training learns from: pictures in the order of their names, and what storage reports of them."""

    pictures: tuple[CaptionedPicture, ...]
    report: storage.DatasetReport


def captioned_pictures(
    dataset: storage.Dataset, paths: Sequence[Path], *, seed: int, fallback: str = ""
) -> tuple[CaptionedPicture, ...]:
    """Makes the pictures of a stored dataset.

    Args:
        dataset: with captions read.
        paths: where each of its pictures lies, in its order.
        seed: the job's.
        fallback: caption of pictures that have none, not even an empty one.
    """
    return tuple(
        _picture(image, path, seed, fallback) for image, path in zip(dataset.images, paths, strict=True)
    )


def _picture(image: storage.DatasetImage, path: Path, seed: int, fallback: str) -> CaptionedPicture:
    said, settings = image.caption_parts, image.settings
    is_said = bool(said.source)
    tags = tuple(Tag(tag.text, tag.weight if tag.HasField("weight") else 1.0) for tag in said.tags)
    main_prompt = said.main_prompt
    text = said.text if is_said else image.caption or fallback
    return CaptionedPicture(
        sample_id=f"0/instance/{image.id}",
        path=path,
        prompt=", ".join(part for part in (main_prompt, text, *(tag.text for tag in tags)) if part),
        concept=0,
        seed=seed,
        name=image.id,
        size=Size(image.width_px, image.height_px),
        main_prompt=main_prompt,
        text=text,
        tags=tags,
        max_caption_chars=said.max_caption_chars,
        multiplier=settings.multiplier if settings.HasField("multiplier") else 1.0,
        rating=settings.rating if settings.HasField("rating") else 1.0,
        caption_dropout=settings.caption_dropout if settings.HasField("caption_dropout") else None,
        flip_probability=settings.flip_probability if settings.HasField("flip_probability") else None,
        shuffle_tags=settings.shuffle_tags if settings.HasField("shuffle_tags") else None,
        loss_scale=settings.loss_scale if settings.HasField("loss_scale") else 1.0,
        batch_id=settings.batch_id,
    )


def fingerprint(pictures: Iterable[CaptionedPicture]) -> str:
    """Returns a digest of all pictures in order, with all that is said of them: another data set has another one."""
    digest = hashlib.sha256()
    for picture in pictures:
        contents = hashlib.sha256(picture.path.read_bytes()).hexdigest()
        said = {field.name: getattr(picture, field.name) for field in fields(picture) if field.name != "path"}
        digest.update(repr((contents, sorted(said.items()))).encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class UseRules:
    """What a training asks for at each use, where a picture's own files say nothing else.

    Attributes:
        caption_dropout: probability of an empty caption, 0..1.
        flip_probability: probability of mirroring, 0..1.
        shuffle_tags: put the parts of a caption after the first in a new order.
        tag_dropout: probability of leaving out each part after the first, 0..1.
    """

    caption_dropout: float = 0.0
    flip_probability: float = 0.0
    shuffle_tags: bool = False
    tag_dropout: float = 0.0


def rules_of(spec: pb.TrainingSpec) -> UseRules:
    """Returns what a complete specification asks for at each use."""
    return UseRules(spec.caption_dropout, spec.flip_probability, spec.shuffle_tags, spec.tag_dropout)


def written_caption(picture: CaptionedPicture) -> str:
    """Returns the caption with nothing drawn: as it was written, without the tags that its limit leaves no room for."""
    first, *rest = picture.parts or [Tag("")]
    return _joined(picture, first, rest, as_written=True)


def drawn_caption(
    picture: CaptionedPicture, rules: UseRules, seed: int, coordinates: tuple[Coordinate, ...]
) -> str:
    """Returns the caption of one use.

    With the probability of conditional dropout it is empty (Ho and Salimans 2022, algorithm 1). Else each part after
    the first may be left out; what stays keeps its order, or is shuffled: part i comes first with probability
    w_i / sum(w), and so on with those that are left. At last whole parts are left out from the end until the limit is
    kept.

    Args:
        picture: whose caption.
        rules: the training's.
        seed: the job's.
        coordinates: of the use.
    """
    dropout = rules.caption_dropout if picture.caption_dropout is None else picture.caption_dropout
    if dropout and uniform(seed, Purpose.COND_DROPOUT, *coordinates) < dropout:
        return ""
    first, *rest = picture.parts or [Tag("")]
    kept = _after_dropout(rest, rules.tag_dropout, seed, coordinates)
    shuffled = rules.shuffle_tags if picture.shuffle_tags is None else picture.shuffle_tags
    if shuffled:
        kept = _in_drawn_order(kept, seed, coordinates)
    return _joined(picture, first, kept, as_written=not shuffled and len(kept) == len(rest))


def _after_dropout(
    tags: list[Tag], probability: float, seed: int, coordinates: tuple[Coordinate, ...]
) -> list[Tag]:
    if not probability:
        return tags
    return [
        tag
        for place, tag in enumerate(tags)
        if uniform(seed, Purpose.TAGS, *coordinates, "drop", place) >= probability
    ]


def _in_drawn_order(tags: list[Tag], seed: int, coordinates: tuple[Coordinate, ...]) -> list[Tag]:
    """Draws an order without replacement by weight (Efraimidis and Spirakis 2006, algorithm A)."""
    draws = [uniform(seed, Purpose.TAGS, *coordinates, "order", place) for place in range(len(tags))]
    keys = [math.log(max(draw, SMALLEST)) / tag.weight for draw, tag in zip(draws, tags, strict=True)]
    return [tags[place] for place in sorted(range(len(tags)), key=lambda place: -keys[place])]


def _joined(picture: CaptionedPicture, first: Tag, rest: list[Tag], *, as_written: bool) -> str:
    """Joins parts, as many as fit; what is as it was written stays so to the letter."""
    texts = [first.text, *(tag.text for tag in rest)]
    caption = picture.prompt if as_written else ", ".join(texts)
    while picture.max_caption_chars and len(caption) > picture.max_caption_chars and len(texts) > 1:
        texts.pop()
        caption = ", ".join(texts)
    return caption
