"""Signs that a training learns too fast. They end in remarks for the owner and change nothing.

A loss spike is a loss far above the running median; a collapse shows as weights that move far in one update, or as a
layer that ends far from where it began. Weights are judged by a fixed sample of each tensor, so that watching them
costs neither a second copy of the model nor noticeable time.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from services.diffusion.lora import Adapter, Part, matching_modules

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


class Watch(Protocol):
    """Measures how far weights move; it only reads."""

    def mark(self) -> None:
        """Remembers the weights as they are before an update."""

    def change(self) -> float:
        """Returns the norm of all weights' change since the mark, relative to their norm."""

    def drift(self) -> tuple[str, float]:
        """Returns the layer that has moved farthest from where it began, relative to its norm there."""


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


class AdapterWatch:
    """The same for low-rank adapters, by what merging them would add to the weights of the base.

    The factors themselves say nothing: one begins at zero, so that any first step of it is infinitely large.

    Args:
        adapters: each adapter with the model it sits on.
    """

    def __init__(self, adapters: Mapping[Part, tuple[Adapter, nn.Module]]) -> None:
        self._adapters = [adapter for adapter, _ in adapters.values()]
        self._scales: dict[str, float] = {}
        self._sizes: dict[str, float] = {}
        for part, (adapter, module) in adapters.items():
            weights = adapter.weights()
            for name, layer in matching_modules(module, weights, part).items():
                self._scales[name] = weights.modules[name].scale
                self._sizes[name] = float(layer.weight.detach().float().norm()) or 1.0
        self._marked = self._factors()

    def mark(self) -> None:
        """Remembers the adapters as they are before an update."""
        self._marked = {name: (b.clone(), a.clone()) for name, (b, a) in self._factors().items()}

    def change(self) -> float:
        """Returns the norm of what has been added since the mark, relative to the base's norm."""
        moved = []
        for name, (b, a) in self._factors().items():
            old_b, old_a = self._marked[name]
            moved.append(
                self._scales[name] * _product_norm(torch.cat([b, -old_b], dim=1), torch.cat([a, old_a]))
            )
        return math.hypot(*moved) / math.hypot(*self._sizes.values())

    def drift(self) -> tuple[str, float]:
        """Returns the layer of the base that is changed most, relative to its norm."""
        drifts = {
            name: self._scales[name] * _product_norm(b, a) / self._sizes[name]
            for name, (b, a) in self._factors().items()
        }
        return max(drifts.items(), key=lambda item: item[1], default=("", 0.0))

    def _factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Returns by module B [o, r] and A [r, n], n the inputs times the cells of the kernel."""
        factors = {}
        for adapter in self._adapters:
            parameters = adapter.parameters()
            for name in adapter.modules:
                b, a = parameters[f"{name}.lora_B.weight"], parameters[f"{name}.lora_A.weight"]
                factors[name] = (b.detach().flatten(1), a.detach().flatten(1))
        return factors


def _product_norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """Returns the Frobenius norm of B A by the r x r matrices B'B and A A', without the product itself."""
    squared = ((b.T @ b).double() * (a @ a.T).double()).sum()
    return math.sqrt(max(0.0, float(squared)))


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
