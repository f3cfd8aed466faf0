"""Signs that a training learns too fast. They end in remarks for the owner and change nothing.

A loss spike is a loss far above the running median; a collapse shows as weights that move far in one update, or as a
layer that ends far from where it began. Weights are judged by a fixed sample of each tensor, so that watching them
costs neither a second copy of the model nor noticeable time.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

import torch

SPIKE_WINDOW = 100
SPIKE_FACTOR = 5.0
CHANGE_LIMIT = 0.01
DRIFT_LIMIT = 0.5
SAMPLED_ELEMENTS = 1024
WATCHED_EVERY = 20


def is_spike(loss: float, recent_losses: Sequence[float]) -> bool:
    """Whether a loss is more than five times the median of the last 100, once there are so many."""
    window = recent_losses[-SPIKE_WINDOW:]
    return len(window) == SPIKE_WINDOW and loss > SPIKE_FACTOR * statistics.median(window)


class WeightWatch:
    """Measures how far weights move; it only reads.

    Args:
        parameters: what trains, by name; their values now are what drift is measured from.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._base = self._sample()
        self._marked = self._base

    def mark(self) -> None:
        """Remembers the weights as they are before an update."""
        self._marked = self._sample()

    def change(self) -> float:
        """Returns the norm of all weights' change since the mark, relative to their norm then."""
        now = self._sample()
        moved = math.hypot(*(float((now[name] - old).norm()) for name, old in self._marked.items()))
        size = math.hypot(*(float(old.norm()) for old in self._marked.values()))
        return moved / size if size else 0.0

    def drift(self) -> tuple[str, float]:
        """Returns the layer that has moved farthest from where it began, relative to its norm there."""
        now = self._sample()
        drifts = {
            name: float((now[name] - base).norm()) / size
            for name, base in self._base.items()
            if (size := float(base.norm()))
        }
        return max(drifts.items(), key=lambda item: item[1], default=("", 0.0))

    @torch.no_grad()
    def _sample(self) -> dict[str, torch.Tensor]:
        """Returns by layer the sampled elements, scaled so that their norm estimates that of all elements."""
        layers: dict[str, list[torch.Tensor]] = {}
        for name, parameter in self._parameters.items():
            elements = parameter.detach().reshape(-1)
            sampled = elements[:: max(1, elements.numel() // SAMPLED_ELEMENTS)]
            weight = math.sqrt(elements.numel() / sampled.numel())
            layers.setdefault(name.rpartition(".")[0], []).append(sampled * weight)
        return {layer: torch.cat(parts) for layer, parts in layers.items()}


def remarks(spikes: int, largest_change: float, drift: tuple[str, float]) -> list[str]:
    """Puts what was seen into words.

    Args:
        spikes: how many updates had a loss spike.
        largest_change: the largest relative change of the weights in one watched update.
        drift: a layer and how far it has moved, from :meth:`WeightWatch.drift`.
    """
    found = []
    if spikes:
        found.append(f"the loss rose above {SPIKE_FACTOR:g} times its running median in {spikes} updates")
    if largest_change > CHANGE_LIMIT:
        found.append(
            f"one update changed the weights by {largest_change:.1%}: the learning rate is probably too high"
        )
    if drift[1] > DRIFT_LIMIT:
        found.append(
            f"the layer {drift[0]} moved by {drift[1]:.0%} of its size: the model may have collapsed"
        )
    return found
