"""LoRAs as data of single rows: one call of a model in which each row of the batch wears LoRAs of its own, or none.

For a row that wears several, (alpha / r) B A of equation 3 of Hu et al. (2022) are summed, each times its strength:
their As stand below each other, their Bs beside each other, as one pair of matrices of the ranks' sum. The pairs of
all rows are stacked, shorter ones filled up with zeros, and each module that a row changes multiplies them with its
input by two batched matrix products. Nothing of the model is changed: the products are forward hooks that live as
long as one call. Rows without LoRA get the model's own output, bit for bit as in a call where nobody wears one.

Shapes: n rows, s stacked pairs, i inputs and o outputs of a module, r rank, k x k kernel, t positions.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.diffusion.lora import Factors, LoraWeights, Module, Part, matching_modules
from services.domain.errors import BadInput


@dataclass(frozen=True, slots=True, eq=False)
class PackedLora:
    """A LoRA in host memory, all matrices in one buffer, so that one copy brings a part of it to a device.

    Attributes:
        buffer: [numbers], part after part, in the precision that the device computes with.
        weights: the matrices, views of the buffer; alpha / r is multiplied into B, so that each one's scale is 1.
    """

    buffer: Tensor
    weights: LoraWeights

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""
        return self.buffer.nbytes


def pack(weights: LoraWeights, dtype: torch.dtype) -> PackedLora:
    """Make a LoRA ready to be worn.

    Args:
        weights: as a file says it.
        dtype: precision that the device computes with.

    Raises:
        BadInput: a number is too large for that precision.
    """
    pairs = {
        name: (factors.a, factors.b * factors.scale) for name, factors in sorted(weights.modules.items())
    }
    buffer = torch.empty(sum(a.numel() + b.numel() for a, b in pairs.values()), dtype=dtype)
    start, modules = 0, {}
    for name, pair in pairs.items():
        views = []
        for matrix in pair:
            views.append(buffer[start : start + matrix.numel()].view(matrix.shape).copy_(matrix))
            start += matrix.numel()
        modules[name] = Factors(views[0], views[1], alpha=float(views[0].shape[0]))
    if not bool(torch.isfinite(buffer).all()):
        raise BadInput(f"the LoRA cannot be used: it holds values that are too large for {dtype}")
    return PackedLora(buffer, LoraWeights(modules))


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class FittedLora:
    """A LoRA on the device of one part of a model.

    Attributes:
        model: that part.
        matrices: A [r, i] or [r, i, k, k] and B [o, r] by the module that they change.
    """

    model: nn.Module
    matrices: Mapping[Module, tuple[Tensor, Tensor]]


def fit(model: nn.Module, lora: PackedLora, part: Part) -> FittedLora:
    """Find a LoRA's place in a model and bring it to the model's device.

    Args:
        model: UNet or CLIP text encoder.
        lora: only its modules of this part count; there may be none.
        part: which of the two it is.

    Raises:
        BadInput: it changes a module that the model lacks, or in another shape.
    """
    found = matching_modules(model, lora.weights, part)
    if not found:
        return FittedLora(model, {})
    factors_of = {name: lora.weights.modules[name] for name in found}
    start = min(factors.a.storage_offset() for factors in factors_of.values())
    end = max(factors.b.storage_offset() + factors.b.numel() for factors in factors_of.values())
    buffer = lora.buffer[start:end].to(next(iter(found.values())).weight.device)

    def moved(matrix: Tensor) -> Tensor:
        place = matrix.storage_offset() - start
        return buffer[place : place + matrix.numel()].view(matrix.shape)

    matrices = {}
    for name, module in found.items():
        a, b = moved(factors_of[name].a), moved(factors_of[name].b)
        shape = module.weight.shape[1:] if _has_kernel(module) else (-1,)
        matrices[module] = (a.view(a.shape[0], *shape), b.flatten(1))
    return FittedLora(model, matrices)


Worn = tuple[tuple[FittedLora, float], ...]
"""What one row wears: LoRAs with their strengths, in order. Strength 1 is what was trained."""


class LoraRows:
    """The stacked matrices for one composition of a batch; good for any number of calls."""

    def __init__(self, rows: Sequence[Worn]) -> None:
        """Stacks.

        Args:
            rows: what each row of the model's input wears; all fitted to the same model.
        """
        self.rows = tuple(rows)
        kinds = [worn for worn in dict.fromkeys(self.rows) if worn]
        modules = dict.fromkeys(module for worn in kinds for lora, _ in worn for module in lora.matrices)
        places: dict[tuple[int, ...], _Places] = {}
        self._hooks: dict[Module, _Products] = {}
        for module in modules:
            pairs = {number: _joined(worn, module) for number, worn in enumerate(kinds)}
            present = {number: pair for number, pair in pairs.items() if pair is not None}
            key = tuple(present)
            if key not in places:
                device = module.weight.device
                places[key] = _Places.of(self.rows, [kinds[number] for number in key], device)
            self._hooks[module] = _Products(places[key], *_stacked(list(present.values())))

    @contextlib.contextmanager
    def worn(self) -> Iterator[None]:
        """Calls of the model within the context have one row in their input for each row given here."""
        handles = [module.register_forward_hook(hook) for module, hook in self._hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True, slots=True)
class _Places:
    """Which rows a module's pairs are for.

    Attributes:
        rows: int64 [m], rows that wear one; None: all.
        pairs: int64 [m], which of the stacked pairs each of them wears.
    """

    rows: Tensor | None
    pairs: Tensor

    @classmethod
    def of(cls, rows: Sequence[Worn], kinds: Sequence[Worn], device: torch.device) -> "_Places":
        numbers = {worn: number for number, worn in enumerate(kinds)}
        wearing = [row for row, worn in enumerate(rows) if worn in numbers]
        pairs = torch.tensor([numbers[rows[row]] for row in wearing], device=device)
        return cls(None if len(wearing) == len(rows) else torch.tensor(wearing, device=device), pairs)


class _Products:
    """A module's forward hook; called with the module's input and output.

    Args:
        a: [s, r, i] or [s, r, i, k, k].
        b: [s, o, r].
    """

    def __init__(self, places: _Places, a: Tensor, b: Tensor) -> None:
        self._places = places
        self._a = a
        self._b = b

    def __call__(self, module: Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows, pairs = self._places.rows, self._places.pairs
        x = inputs[0] if rows is None else inputs[0].index_select(0, rows)
        a, b = self._a.index_select(0, pairs), self._b.index_select(0, pairs)
        change = self._product(module, x, a, b)
        if rows is None:
            return output + change
        return output.index_add_(0, rows, change)  # a module's output is nobody else's yet

    @staticmethod
    def _product(module: Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B A x of each row."""
        if isinstance(module, nn.Linear):
            flat = x.reshape(x.shape[0], -1, x.shape[-1])  # [n, t, i]
            change = torch.bmm(torch.bmm(flat, a.transpose(1, 2)), b.transpose(1, 2))
            return change.view(*x.shape[:-1], -1)
        if a.ndim == 3:
            inner = torch.bmm(a, x.flatten(2)).view(x.shape[0], -1, *x.shape[2:])  # [n, r, h, w]
        else:
            inner = _convolved(module, x, a)
        return torch.bmm(b, inner.flatten(2)).view(x.shape[0], -1, *inner.shape[2:])


def _convolved(module: nn.Conv2d, x: Tensor, a: Tensor) -> Tensor:
    """A convolution in which each row has a kernel of its own: the rows become groups of channels of one."""
    grouped = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]),  # [1, n i, h, w]
        a.flatten(0, 1),  # [n r, i, k, k]
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=x.shape[0],
    )
    return grouped.view(x.shape[0], -1, *grouped.shape[2:])


def _joined(worn: Worn, module: Module) -> tuple[Tensor, Tensor] | None:
    """One pair for all LoRAs that a row wears on a module; None where none of them changes it."""
    pairs = [(*lora.matrices[module], strength) for lora, strength in worn if module in lora.matrices]
    if not pairs:
        return None
    a = torch.cat([a for a, _, _ in pairs])
    return a, torch.cat([b * strength for _, b, strength in pairs], dim=1)


def _stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    rank = max(a.shape[0] for a, _ in pairs)
    a = torch.stack([_filled(a, 0, rank) for a, _ in pairs])
    return a, torch.stack([_filled(b, 1, rank) for _, b in pairs])


def _filled(matrix: Tensor, dimension: int, length: int) -> Tensor:
    """The matrix with zeros after its last element of one dimension."""
    missing = length - matrix.shape[dimension]
    if not missing:
        return matrix
    shape = list(matrix.shape)
    shape[dimension] = missing
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=dimension)


def _has_kernel(module: Module) -> bool:
    """More than a matrix: a convolution that looks at neighbours, or leaves cells out."""
    if isinstance(module, nn.Linear):
        return False
    plain = module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding == (0, 0)
    return not plain
