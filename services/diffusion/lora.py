"""Low-rank adapters (Hu et al. 2022, equation 3) on a loaded UNet or text encoder: attach, train, detach, merge.

A module with weight W computes W x; with an adapter W x + (alpha / r) B A x. The adapter is a forward hook on the
module. Nothing of the base is wrapped, renamed or registered anew: its `state_dict`, its names, its exports and casts
of its precision know nothing of an adapter, and taking the hooks away leaves what was there before, bit for bit. The
price: moving the model to another device does not move the adapter, so attach after the model is where it shall run.

Names are `<part>.<path of the module>`, in the text encoder always with `text_model.`, whatever the library's version:
`unet.mid_block.attentions.0.proj_in`, `text_encoder.text_model.encoder.layers.0.mlp.fc1`. Files: `lora_files`.

Shapes: i inputs and o outputs of a module, r rank, k x k kernel of a convolution. A is [r, i] or [r, i, k, k], B is
[o, r] or [o, r, 1, 1]; both float32.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.diffusion.exporting import TEXT_PREFIX
from services.domain.errors import BadInput, InvalidSpec, Violation

Part = Literal["unet", "text_encoder"]
PARTS: tuple[Part, ...] = get_args(Part)
Module = nn.Linear | nn.Conv2d
"""What a LoRA can change."""

PRESET = "attn-mlp"
"""The name by which other trainers know these targets: all linear layers and 1x1 convolutions in the UNet's transformer
blocks (to_q, to_k, to_v, to_out.0, feed-forward, proj_in, proj_out), the text encoder's attention and MLP."""
CONV_PRESET = "attn-mlp+conv3x3"
"""The same and the 3x3 convolutions of the UNet's residual blocks and samplers (LoCon)."""

_TRANSFORMER = re.compile(r"(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\..+")
_CONVOLUTION = re.compile(
    r"(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:resnets\.\d+\.conv[12]|(?:down|up)samplers\.\d+\.conv)"
)
_TEXT = re.compile(r"text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])")


@dataclass(frozen=True, slots=True)
class LoraShape:
    """How large an adapter is and how strongly it counts.

    Attributes:
        rank: r of linear layers and 1x1 convolutions, 1 or more.
        alpha: their factors' product is multiplied by alpha / rank; above 0.
        dropout: probability of dropping an element of A's input while training, 0..1.
        conv_rank: r of 3x3 convolutions; 0: they get no adapter.
        conv_alpha: their alpha; above 0 where `conv_rank` is.

    Raises:
        InvalidSpec: a value is out of range.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    conv_rank: int = 0
    conv_alpha: float = 0.0

    def __post_init__(self) -> None:
        rules = (
            (self.rank >= 1, "lora.rank", "must be 1 or more"),
            (_is_positive(self.alpha), "lora.alpha", "must be above 0"),
            (0 <= self.dropout <= 1, "lora.dropout", "must be between 0 and 1"),
            (self.conv_rank >= 0, "lora.conv_rank", "must be 0 or more"),
            (self.conv_rank <= 0 or _is_positive(self.conv_alpha), "lora.conv_alpha", "must be above 0"),
        )
        if faults := [Violation(name, rule) for holds, name, rule in rules if not holds]:
            raise InvalidSpec(faults)

    @property
    def preset(self) -> str:
        """Name of the set of modules that get an adapter."""
        return CONV_PRESET if self.conv_rank else PRESET


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's change as two matrices, see the module's shapes; `alpha` may differ from the rank."""

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """What is added to the module's weight: (alpha / r) B A, [o, i] or [o, i, k, k], float32."""
        product = self.b.detach().float().flatten(1) @ self.a.detach().float().flatten(1)
        return (product * self.scale).view(-1, *self.a.shape[1:])


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """A whole LoRA, independent of the file it came from.

    Attributes:
        modules: factors by the module's name.
        metadata: what the file's header says; not to be trusted.
    """

    modules: Mapping[str, Factors]
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def of(self, part: Part) -> dict[str, Factors]:
        """The modules of one part, by their full names."""
        return {name: factors for name, factors in self.modules.items() if name.startswith(f"{part}.")}


class Adapter:
    """Trainable factors on one part of a model; made by :func:`attach`.

    Attributes:
        part: what it sits on.
        shape: its ranks and scales.
        enabled: False computes the base model alone, and can be switched between any two calls.
    """

    def __init__(self, part: Part, shape: LoraShape) -> None:
        self.part = part
        self.shape = shape
        self.enabled = True
        self._layers: dict[str, _Layer] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def parameters(self) -> dict[str, nn.Parameter]:
        """All factors by name, `<module>.lora_A.weight` and `<module>.lora_B.weight`, in the model's order.

        Float32 on the base's device. They are no parameters of the model, so freezing or casting it leaves them alone.
        """
        named: dict[str, nn.Parameter] = {}
        for name, layer in self._layers.items():
            named[f"{name}.lora_A.weight"] = layer.a
            named[f"{name}.lora_B.weight"] = layer.b
        return named

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that have factors."""
        return tuple(self._layers)

    def merged_delta(self, name: str) -> Tensor:
        """What merging would add to a module's weight at this moment, float32 in the weight's shape.

        Args:
            name: one of `modules`.
        """
        layer = self._layers[name]
        return Factors(layer.a, layer.b, layer.alpha).delta()

    def weights(self) -> LoraWeights:
        """A copy of the factors on the CPU, for a file or a merge."""
        copies = {
            name: Factors(_copy(layer.a), _copy(layer.b), layer.alpha) for name, layer in self._layers.items()
        }
        return LoraWeights(copies)

    def detach(self) -> None:
        """Take the adapter off the model, which then is what it was; the factors stay here. May be repeated."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def attach(
    model: nn.Module,
    shape: LoraShape,
    *,
    part: Part,
    initial: Callable[[str, tuple[int, ...]], Tensor],
) -> Adapter:
    """Put an adapter on a model, which then computes bitwise what it did before: B is zero.

    Nothing is frozen and no tensor of the base changes. Several adapters on one model add up.

    Args:
        model: UNet or CLIP text encoder, on its device; each module's `training` decides about dropout.
        shape: ranks, scales, dropout.
        part: which of the two it is.
        initial: called with the parameter's name and shape, gives independent N(0, 1) values for A. They are scaled to
            the variance of the usual Kaiming-uniform initialisation (He et al. 2015 with slope sqrt(5), as in the
            reference implementation of LoRA): deviation 1 / sqrt(3 n) for n inputs of A.

    Raises:
        BadInput: the model has no module of the preset.
    """
    adapter = Adapter(part, shape)
    for name, module in _targets(model, part, with_convolutions=shape.conv_rank > 0):
        layer = _layer(module, shape, adapter, partial(initial, f"{name}.lora_A.weight"))
        adapter._layers[name] = layer
        adapter._handles.append(module.register_forward_hook(layer))
    if not adapter._layers:
        raise BadInput(f"the model's {part} has no module that a LoRA could change")
    return adapter


class Merge:
    """A LoRA added to the weights of a model; made by :func:`merge`."""

    def __init__(self) -> None:
        self._changed: list[tuple[Module, Tensor, Tensor]] = []

    def undo(self) -> None:
        """Put the very tensors back that were there before.

        Raises:
            ValueError: something was merged later and is still there; undo that first.
        """
        if any(module.weight is not merged for module, _, merged in self._changed):
            raise ValueError("merges are undone in reverse order")
        for module, original, _ in self._changed:
            module.weight = original
        self._changed.clear()


@torch.no_grad()
def merge(model: nn.Module, weights: LoraWeights, *, part: Part, strength: float = 1.0) -> Merge:
    """Add a LoRA to the weights of a model: W + strength (alpha / r) B A, summed in float32, in the model's precision.

    The model gets new tensors, and the old ones are kept for the way back: models that share them see nothing of it,
    and undoing is exact.

    Args:
        model: UNet or CLIP text encoder.
        weights: a LoRA; only its modules of this part count.
        part: which of the two it is.
        strength: any finite number; 1 is what was trained, 0 nothing.

    Returns:
        The way back.

    Raises:
        BadInput: the LoRA changes a module that the model lacks, or in another shape; the model is as before.
    """
    chosen = matching_modules(model, weights, part)
    done = Merge()
    for name, module in chosen.items():
        original = module.weight
        delta = weights.modules[name].delta().to(original.device).view(original.shape)
        changed = original.float().add(delta, alpha=strength).to(original.dtype)
        module.weight = nn.Parameter(changed, requires_grad=original.requires_grad)
        done._changed.append((module, original, module.weight))
    return done


def matching_modules(model: nn.Module, weights: LoraWeights, part: Part) -> dict[str, Module]:
    """Find the modules that a LoRA changes; arguments and errors as for :func:`merge`.

    Returns:
        The modules by name, each with a weight of as many inputs, outputs and kernel cells as its factors say.
    """
    present = dict(_modules(model, part))
    found: dict[str, Module] = {}
    for name, factors in weights.of(part).items():
        if name not in present:
            raise BadInput(f"the LoRA does not fit this model, which has no {name}")
        wanted = tuple(present[name].weight.shape)
        given = (factors.b.shape[0], *factors.a.shape[1:])
        # A 1x1 convolution and a linear layer are the same matrix; files mix the two forms.
        if _as_matrix(wanted) != _as_matrix(given):
            raise BadInput(f"the LoRA does not fit this model: {name} is {list(wanted)}, there {list(given)}")
        found[name] = present[name]
    return found


def module_name(part: Part, path: str) -> str:
    """A module's name from its path in the model, `text_model.` put in where the library's version has none."""
    if part == "text_encoder" and not path.startswith(TEXT_PREFIX):
        path = TEXT_PREFIX + path
    return f"{part}.{path}"


class _Layer:
    """The factors of one module; called after the module's own forward, with its input and output."""

    def __init__(self, a: Tensor, outputs: int, alpha: float, dropout: float, adapter: Adapter) -> None:
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(a.new_zeros((outputs, a.shape[0]) + (1,) * (a.ndim - 2)))
        self.alpha = alpha
        self.scale = alpha / a.shape[0]
        self.dropout = dropout
        self.adapter = adapter

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.adapter.enabled:
            return output
        x = inputs[0]
        # Outside autocast a base in half precision casts the small factors, never the large activations.
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, module.training)
        return torch.add(output, self.product(module, x, a, b), alpha=self.scale)

    def product(self, module: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B A x of a linear layer: [..., i] -> [..., o]."""
        return F.linear(F.linear(x, a), b)


class _Convolution(_Layer):
    """The same for a convolution; A has its kernel, stride and padding, B is 1x1."""

    def product(self, module: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B A x: [n, i, h, w] -> [n, o, h', w']."""
        assert isinstance(module, nn.Conv2d)
        return F.conv2d(F.conv2d(x, a, None, module.stride, module.padding, module.dilation), b)


def _layer(
    module: Module,
    shape: LoraShape,
    adapter: Adapter,
    normal: Callable[[tuple[int, ...]], Tensor],
) -> _Layer:
    outputs, *rest = module.weight.shape
    wide = math.prod(rest[1:]) > 1
    rank, alpha = (shape.conv_rank, shape.conv_alpha) if wide else (shape.rank, shape.alpha)
    size = (rank, *rest)
    a = normal(size).to(module.weight.device, torch.float32) / math.sqrt(3 * math.prod(rest))
    if tuple(a.shape) != size:
        raise ValueError(f"the initial values of A are {list(a.shape)} instead of {list(size)}")
    kind = _Convolution if isinstance(module, nn.Conv2d) else _Layer
    return kind(a, outputs, alpha, shape.dropout, adapter)


def _targets(model: nn.Module, part: Part, *, with_convolutions: bool) -> Iterator[tuple[str, Module]]:
    for name, module in _modules(model, part):
        path = name.removeprefix(f"{part}.")
        if part == "text_encoder":
            wanted = _TEXT.fullmatch(path) is not None
        elif _TRANSFORMER.fullmatch(path):
            wanted = isinstance(module, nn.Linear) or module.kernel_size == (1, 1)
        else:
            wanted = with_convolutions and _CONVOLUTION.fullmatch(path) is not None
        if wanted:
            yield name, module


def _modules(model: nn.Module, part: Part) -> Iterator[tuple[str, Module]]:
    """All modules that a LoRA can change, by name."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield module_name(part, path), module


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("cpu", copy=True).contiguous()


def _is_positive(number: float) -> bool:
    return math.isfinite(number) and number > 0
