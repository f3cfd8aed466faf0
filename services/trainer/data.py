"""Pictures and prompts of a DreamBooth run: which are used when, and how a picture becomes latents.

Owns the epoch lists, the geometry (resize, crop) and the latent cache. Pictures arrive as RGB PNG files that storage
has checked, decoded and turned upright; nothing here reads anything else. Every choice is a draw of `randomness`, so
update u sees the same samples whether the run was interrupted or not.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from services.trainer.randomness import Coordinate, Purpose, normal, permutation, uniform, uniform_integer

logger = logging.getLogger(__name__)

PICTURE_CACHE_BYTES = 512 * 2**20
MOMENT_CACHE_BYTES = 1024 * 2**20


@dataclass(frozen=True, slots=True)
class Picture:
    """One stored image with its prompt.

    Attributes:
        sample_id: names the picture within the job, stable over restarts; randomness hangs on it.
        path: a PNG file, RGB.
        prompt: what the picture shows.
        concept: index of the concept it belongs to.
        seed: of its concept's own data choices (where it is cropped); the job's seed unless the concept has one.
    """

    sample_id: str
    path: Path
    prompt: str
    concept: int
    seed: int


@dataclass(frozen=True, slots=True)
class Concept:
    """The pictures of one concept; `class_pictures` is empty where the class term does not apply."""

    instance_pictures: tuple[Picture, ...]
    class_pictures: tuple[Picture, ...] = ()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All of them."""
        return self.instance_pictures + self.class_pictures


@dataclass(frozen=True, slots=True)
class Use:
    """One picture at one place of one epoch. A picture that occurs twice in an epoch has two uses."""

    picture: Picture
    epoch: int
    occurrence: int

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """What distinguishes this use's random draws from all others'."""
        return (self.epoch, self.picture.sample_id, self.occurrence)


@dataclass(frozen=True, slots=True)
class Pair:
    """An instance use and, with prior preservation, a class use of the same concept."""

    instance: Use
    class_use: Use | None


class EpochPlan:
    """Which pictures are used in which update.

    An epoch has one slot per picture of the longer of the two lists (at least one batch); the shorter list wraps
    around, reshuffled on each round. Its last micro-step may be short, and so may its last update. Everything follows
    from the update's index, so a position in the data needs no state.

    Balanced concepts take turns instead, in an order drawn anew for each turn, so that all of them come equally often
    and the pictures of the smaller ones more often.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        *,
        seed: int,
        train_batch_size: int,
        gradient_accumulation_steps: int,
        balanced: bool = False,
    ) -> None:
        self._concepts = tuple(concepts)
        self._balanced = balanced
        self._seed = seed
        self._batch = train_batch_size
        self._accumulation = gradient_accumulation_steps
        self._instances = [picture for concept in concepts for picture in concept.instance_pictures]
        if not all(concept.instance_pictures for concept in concepts) or not concepts:
            raise ValueError("a concept has no instance picture to train on")
        class_pictures = sum(len(concept.class_pictures) for concept in concepts)
        instances = len(self._instances)
        if balanced:
            instances = len(self._concepts) * max(len(concept.instance_pictures) for concept in concepts)
        self._slots = max(instances, class_pictures, train_batch_size)
        self._cached_epoch: tuple[int, list[Pair]] | None = None

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        micro_steps = math.ceil(self._slots / self._batch)
        return math.ceil(micro_steps / self._accumulation)

    def epoch_of(self, update: int) -> int:
        """Returns the epoch an update belongs to; both count from 0."""
        return update // self.updates_per_epoch

    def micro_steps(self, update: int) -> list[list[Pair]]:
        """Returns the batches that are accumulated in one update, counted from 0 over the whole run."""
        pairs = self.epoch(self.epoch_of(update))
        size = self._batch * self._accumulation
        start = (update % self.updates_per_epoch) * size
        chosen = pairs[start : start + size]
        return [chosen[first : first + self._batch] for first in range(0, len(chosen), self._batch)]

    def epoch(self, epoch: int) -> list[Pair]:
        """Returns all pairs of one epoch in order."""
        if self._cached_epoch is None or self._cached_epoch[0] != epoch:
            self._cached_epoch = (epoch, self._draw_epoch(epoch))
        return self._cached_epoch[1]

    def _draw_epoch(self, epoch: int) -> list[Pair]:
        if self._balanced:
            instances = self._turns(epoch)
        else:
            instances = self._rounds(self._instances, self._seed, epoch, "instance")
        classes = [
            self._rounds(concept.class_pictures, concept.instance_pictures[0].seed, epoch, f"class {index}")
            for index, concept in enumerate(self._concepts)
        ]
        return [Pair(use, next(classes[use.picture.concept], None)) for use in islice(instances, self._slots)]

    def _turns(self, epoch: int) -> Iterator[Use]:
        """Yields instance pictures of one concept after the other."""
        uses = [
            self._rounds(
                concept.instance_pictures, concept.instance_pictures[0].seed, epoch, f"instance {index}"
            )
            for index, concept in enumerate(self._concepts)
        ]
        turn = 0
        while True:
            for index in permutation(len(uses), self._seed, Purpose.ORDER, epoch, "concepts", turn):
                yield next(uses[index])
            turn += 1

    def _rounds(self, pictures: Sequence[Picture], seed: int, epoch: int, name: str) -> Iterator[Use]:
        """Yields the pictures round after round, each round in its own order; nothing if there are none."""
        occurrence = 0
        while pictures:
            for index in permutation(len(pictures), seed, Purpose.ORDER, epoch, name, occurrence):
                yield Use(pictures[index], epoch, occurrence)
            occurrence += 1


def fingerprint(concepts: Sequence[Concept]) -> str:
    """Returns a digest of all pictures, their order, prompts and seeds: a changed data set has another one."""
    digest = hashlib.sha256()
    for picture in (picture for concept in concepts for picture in concept.pictures):
        contents = hashlib.sha256(picture.path.read_bytes()).hexdigest()
        digest.update(
            repr((picture.sample_id, contents, picture.prompt, picture.concept, picture.seed)).encode()
        )
    return digest.hexdigest()


def resize_shorter_side(image: Image.Image, resolution: int) -> Image.Image:
    """Resizes so that the shorter side is `resolution` px and the ratio is kept (bicubic, antialiased)."""
    shorter = min(image.size)
    if shorter == resolution:
        return image
    size = tuple(max(resolution, round(side * resolution / shorter)) for side in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def centre_offset(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Returns left and top of the middle square of a resized picture of (width, height) px."""
    return round((size[0] - resolution) / 2), round((size[1] - resolution) / 2)


def random_offset(size: tuple[int, int], resolution: int, use: Use) -> tuple[int, int]:
    """Draws left and top of a square, uniform over all places and anew for each use."""
    seed, name = use.picture.seed, use.coordinates
    left = uniform_integer(size[0] - resolution + 1, seed, Purpose.CROP, *name, "left")
    return left, uniform_integer(size[1] - resolution + 1, seed, Purpose.CROP, *name, "top")


def to_values(picture: np.ndarray) -> torch.Tensor:
    """Turns uint8 RGB [h, w, 3] into float32 [3, h, w] in -1..1."""
    return torch.from_numpy(picture.astype(np.float32) / 127.5 - 1.0).permute(2, 0, 1).contiguous()


class Square(NamedTuple):
    """What one use sees of a resized picture: left and top in its pixels, and whether it is mirrored left-right."""

    left: int
    top: int
    mirrored: bool = False


class PictureReader:
    """Reads pictures as squares of `resolution` px; keeps what it resized, up to a memory limit.

    Args:
        resolution: side of the square.
        center_crop: take the middle instead of a place drawn for each use.
        flip_probability: of mirroring, drawn for each use, 0..1.
    """

    def __init__(self, *, resolution: int, center_crop: bool, flip_probability: float = 0.0) -> None:
        self.resolution = resolution
        self._center_crop = center_crop
        self._flip_probability = flip_probability
        self._sizes: dict[str, tuple[int, int]] = {}
        self._resized: dict[str, np.ndarray] = {}
        self._held_bytes = 0

    def offset(self, use: Use) -> tuple[int, int]:
        """Returns left and top of the square that one use sees, in pixels of the resized picture."""
        size = self._sizes.get(use.picture.sample_id)
        if size is None:
            height, width, _ = self._load(use.picture).shape
            size = self._sizes[use.picture.sample_id] = (width, height)
        if self._center_crop:
            return centre_offset(size, self.resolution)
        return random_offset(size, self.resolution, use)

    def geometry(self, use: Use) -> Square:
        """Returns all that its pixels depend on besides the picture."""
        left, top = self.offset(use)
        flip = self._flip_probability
        return Square(
            left,
            top,
            mirrored=bool(flip) and uniform(use.picture.seed, Purpose.FLIP, *use.coordinates) < flip,
        )

    def values(self, picture: Picture, geometry: Square) -> torch.Tensor:
        """Returns one square: float32 [3, resolution, resolution] in -1..1."""
        left, top, mirrored = geometry
        pixels = self._load(picture)[top : top + self.resolution, left : left + self.resolution]
        return to_values(np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels)

    def _load(self, picture: Picture) -> np.ndarray:
        held = self._resized.get(picture.sample_id)
        if held is not None:
            return held
        with Image.open(picture.path) as image:
            pixels = np.asarray(resize_shorter_side(image.convert("RGB"), self.resolution))
        if self._held_bytes + pixels.nbytes <= PICTURE_CACHE_BYTES:
            self._resized[picture.sample_id] = pixels
            self._held_bytes += pixels.nbytes
        return pixels


# float32 [3, h, w] in -1..1 -> mean and standard deviation of the posterior, float32 on the CPU, each [c, h/f, w/f]
Encoder = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

UseT = TypeVar("UseT", bound=Use, contravariant=True)


class PixelSource(Protocol[UseT]):
    """What reads pictures: squares here, the sizes of buckets in `buckets`."""

    def geometry(self, use: UseT, /) -> Hashable:
        """Returns all that the pixels of one use depend on besides the picture: crop, size, mirroring."""

    def values(self, picture: Picture, geometry: Any, /) -> torch.Tensor:
        """Returns the pixels of one geometry: float32 [3, h, w] in -1..1."""
        ...


class LatentSource(Generic[UseT]):
    """Clean latents of uses: the VAE's posterior is drawn anew for each, its moments are kept by picture and geometry.

    So a picture that is always cropped alike is encoded once, and one with random crops once for each place that a
    crop has fallen on: what is kept never changes a result. A mirrored picture has moments of its own, since those of
    the picture, mirrored, are something else.
    """

    def __init__(
        self,
        reader: PixelSource[UseT],
        encode: Encoder,
        *,
        scaling_factor: float,
        seed: int,
        cache_bytes: int = MOMENT_CACHE_BYTES,
    ) -> None:
        self._reader = reader
        self._encode = encode
        self._scaling_factor = scaling_factor
        self._seed = seed
        self._cache_bytes = cache_bytes
        self._moments: dict[tuple[str, Hashable], tuple[torch.Tensor, torch.Tensor]] = {}
        self._unusable: set[str] = set()

    @property
    def unusable(self) -> list[str]:
        """Sample ids of the pictures that were left out so far, sorted."""
        return sorted(self._unusable)

    def latents(self, use: UseT) -> torch.Tensor | None:
        """Returns z0 = s * (mean + std * n) of one use: float32 on the CPU, [c, h, w].

        Returns None for a picture whose latents are not finite; it is left out and named in the log once.
        """
        mean, deviation = self._moments_of(use)
        if not (torch.isfinite(mean).all() and torch.isfinite(deviation).all()):
            self._report_unusable(use.picture)
            return None
        n = normal(tuple(mean.shape), self._seed, Purpose.VAE, *use.coordinates)
        return self._scaling_factor * (mean + deviation * n)

    def _moments_of(self, use: UseT) -> tuple[torch.Tensor, torch.Tensor]:
        geometry = self._reader.geometry(use)
        held = self._moments.get((use.picture.sample_id, geometry))
        if held is not None:
            return held
        mean, deviation = self._encode(self._reader.values(use.picture, geometry))
        self._cache_bytes -= mean.nbytes + deviation.nbytes
        if self._cache_bytes >= 0:
            self._moments[(use.picture.sample_id, geometry)] = mean, deviation
        return mean, deviation

    def _report_unusable(self, picture: Picture) -> None:
        if picture.sample_id not in self._unusable:
            self._unusable.add(picture.sample_id)
            logger.warning(
                "picture left out: its latents are not finite", extra={"sample_id": picture.sample_id}
            )
