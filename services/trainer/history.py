"""The numbers of a run over its updates, and where its time went: for the report that is kept with the model."""

import math
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

LIMIT = 256
"""Points that are kept at most."""


@dataclass(frozen=True, slots=True)
class Point:
    """Some neighbouring updates.

    Attributes:
        step: updates that were over after the last of them.
        loss: mean of those that were finite; None: none was.
        learning_rate: of the last.
        gradient_norm: mean before clipping of those that were finite; None: none was.
        images_per_second: mean.
        memory_bytes: most that the run had needed by then.
    """

    step: int
    loss: float | None
    learning_rate: float
    gradient_norm: float | None
    images_per_second: float
    memory_bytes: int

    def joined(self, later: "Point") -> "Point":
        """Returns one point for both."""
        return Point(
            step=later.step,
            loss=_mean(self.loss, later.loss),
            learning_rate=later.learning_rate,
            gradient_norm=_mean(self.gradient_norm, later.gradient_norm),
            images_per_second=(self.images_per_second + later.images_per_second) / 2,
            memory_bytes=max(self.memory_bytes, later.memory_bytes),
        )


class History:
    """A series that never has more than `LIMIT` points: when it is full, each two neighbours become one."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._stride = 1
        self._open: Point | None = None
        self._in_open = 0

    def note(self, point: Point) -> None:
        """Takes in one update."""
        self._open = point if self._open is None else _weighted(self._open, self._in_open, point)
        self._in_open += 1
        if self._in_open < self._stride:
            return
        self._points.append(self._open)
        self._open, self._in_open = None, 0
        if len(self._points) >= LIMIT:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [first.joined(second) for first, second in pairs]
            self._stride *= 2

    def as_json(self) -> dict[str, Any]:
        """Returns the series by column, the updates that fill no point yet as its last one."""
        points = [*self._points, *([self._open] if self._open is not None else [])]
        return {name: [asdict(point)[name] for point in points] for name in Point.__dataclass_fields__}

    def state(self) -> dict[str, Any]:
        """Returns JSON values that :meth:`restored` makes the same series of."""
        return {
            "points": [asdict(point) for point in self._points],
            "stride": self._stride,
            "open": asdict(self._open) if self._open is not None else None,
            "in_open": self._in_open,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "History":
        """Returns a series as it was."""
        history = cls()
        history._points = [Point(**point) for point in state["points"]]
        history._stride, history._in_open = int(state["stride"]), int(state["in_open"])
        history._open = Point(**state["open"]) if state["open"] is not None else None
        return history


class StageTimes:
    """Seconds by what was being done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to a name."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: of an accelerator what tensors took, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def finite_or_none(number: float) -> float | None:
    """A number for JSON, which knows no NaN."""
    return number if math.isfinite(number) else None


def _weighted(so_far: Point, count: int, new: Point) -> Point:
    """Adds one update to a point of several; means stay means."""
    joined = so_far.joined(new)
    share = 1 / (count + 1)
    return Point(
        step=new.step,
        loss=_mean(so_far.loss, new.loss, share),
        learning_rate=new.learning_rate,
        gradient_norm=_mean(so_far.gradient_norm, new.gradient_norm, share),
        images_per_second=so_far.images_per_second
        + share * (new.images_per_second - so_far.images_per_second),
        memory_bytes=joined.memory_bytes,
    )


def _mean(one: float | None, other: float | None, share: float = 0.5) -> float | None:
    """Returns the mean, the other counting by its share; where one is missing it is the other."""
    if one is None or other is None:
        return other if one is None else one
    return one + share * (other - one)
