"""An exponential moving average of the weights that train, published in their place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

NamedParameters = Mapping[str, torch.nn.Parameter]


class MovingAverage:
    """Follows the weights: after update n, average += (1 - d) (weights - average), d = min(decay, (1 + n) / (10 + n)).

    The smaller decay of the first updates keeps a short run from publishing its beginning (the rule is that of the
    moving averages of Abadi et al. 2016, TensorFlow). A weight that never changes keeps its bits.

    Args:
        parameters: what trains, by name; float32.
        decay: 0..1 without 1; 0 switches the average off, which then costs nothing.
    """

    def __init__(self, parameters: NamedParameters, decay: float) -> None:
        self._parameters = dict(parameters) if decay else {}
        self._decay = decay
        self._averages = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.updates = 0

    @property
    def enabled(self) -> bool:
        """Whether there is an average."""
        return bool(self._decay)

    @torch.no_grad()
    def follow(self) -> None:
        """Takes in the weights of one more update."""
        self.updates += 1
        if not self._parameters:
            return
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        current = [parameter.detach() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), current, 1 - decay)

    def weights(self) -> dict[str, torch.Tensor]:
        """Returns the averages by name; the living tensors, not copies."""
        return dict(self._averages)

    @torch.no_grad()
    def restore(self, weights: Mapping[str, torch.Tensor], updates: int) -> None:
        """Puts averages back that an earlier run had after so many updates.

        Raises:
            KeyError: one is missing.
        """
        self.updates = updates
        for name, average in self._averages.items():
            average.copy_(weights[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Gives the model the averages for the length of the block, and its own weights back after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self._averages[name])
            self._averages[name].copy_(own)
