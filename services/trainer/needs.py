"""What a training will need of its device: told before it begins, and when it was too much, which one needs less.

One sample goes through a UNet without numbers (torch's meta device): that counts what its backward pass keeps and what
its forward pass computes, for any architecture. The rest is arithmetic over the sizes of the parts. All of it is a
rough guess, good enough to choose between plans; nothing depends on it.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from likeness.training.v1 import training_job_pb2 as pb
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from services.diffusion.devices import device_memory_bytes
from services.diffusion.loading import open_model
from services.diffusion.lora import LoraShape, Part, attach
from services.domain.errors import OutOfDeviceMemory
from services.domain.training_spec import LOW_RANK
from services.trainer.execution import Execution, resolve_execution
from services.trainer.run import Run
from services.trainer.trained_model import lora_shape, parts_of

logger = logging.getLogger(__name__)

GIB = 2**30
LIBRARIES_BYTES = GIB // 2
"""What a process with these libraries takes, on an accelerator its context (measured: 0.4 to 0.6 GiB)."""
RECOMPUTED_SHARE = 0.25
"""Share of the kept activations that gradient checkpointing still keeps, its largest block included."""
FITTING_SHARE = 0.9
"""Share of a device's memory that a plan may need to be named."""
SMALLER_SHARE = 0.8
"""Share of what did not fit that it may need."""
NOTICEABLE_SHARE = 0.95
"""Where no plan needs so little, the smallest one is named below this share."""
MATMUL_SHARE = 0.5
"""Speed of a network's layers compared with that of a large matrix product."""
CALL_S = 15e-6
"""Seconds of one call of the library, however small its tensors are."""
LOWEST_RESOLUTION = 256


@dataclass(frozen=True, slots=True)
class Estimate:
    """A guess.

    Attributes:
        memory_bytes: most that is held at a time.
        seconds: of all updates.
    """

    memory_bytes: int
    seconds: float

    @property
    def summary(self) -> str:
        """In words for people."""
        return f"about {_gib(self.memory_bytes)} and {_duration(self.seconds)}"


@dataclass(frozen=True, slots=True)
class _Pass:
    """One sample through a UNet, 32 bits: bytes kept for the backward pass, operations, calls of the library."""

    kept_bytes: int
    flops: int
    calls: int


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Numbers of a base model: parameters by part, and what its VAE holds of a pixel where it holds most."""

    unet: int
    text_encoder: int
    vae: int
    encoder_bytes_per_pixel: int
    decoder_bytes_per_pixel: int
    vae_factor: int

    def of(self, part: Part) -> int:
        return self.unet if part == "unet" else self.text_encoder


def estimate(run: Run, execution: Execution, updates: int) -> Estimate | None:
    """Guesses and logs what a training will need; None where this model defies it.

    Args:
        run: what is asked for.
        execution: how the device computes.
        updates: in all.
    """
    try:
        memory = _memory_bytes(run, run.spec, execution)
        guess = Estimate(memory, updates * _update_s(run, execution))
        logger.info("training will take %s", guess.summary, extra={"updates": updates, **asdict(guess)})
        return guess
    except Exception as error:  # whatever it is, it must not cost a training
        logger.warning("the training's needs cannot be estimated", exc_info=error)
        return None


def out_of_memory(run: Run) -> OutOfDeviceMemory:
    """Returns the error of a training that its device's memory was too small for; it names a plan that needs less."""
    too_small = "the device's memory is too small for this training"
    try:
        execution = resolve_execution(run.spec, run.device)
        needed = _memory_bytes(run, run.spec, execution)
        changes, smaller = _smaller_plan(run, needed)
    except Exception as error:
        logger.warning("no smaller plan can be worked out", exc_info=error)
        return OutOfDeviceMemory(f"{too_small}: ask for gradient_checkpointing or a smaller resolution")
    if smaller > NOTICEABLE_SHARE * needed:
        return OutOfDeviceMemory(
            f"{too_small}, which needs about {_gib(needed)}, and no plan needs much less"
        )
    return OutOfDeviceMemory(
        f"{too_small}, which needs about {_gib(needed)}; with {', '.join(changes)} it needs about {_gib(smaller)}"
    )


# -- smaller plans -------------------------------------------------------------------------------------------


def _smaller_plan(run: Run, needed: int) -> tuple[list[str], int]:
    """Adds one saving after the other until the training fits; those that cost the result least come first."""
    limit = min(FITTING_SHARE * _device_memory(run.device), SMALLER_SHARE * needed)
    plan, changes, smaller = pb.TrainingSpec(), list[str](), needed
    plan.CopyFrom(run.spec)
    for saving in _SAVINGS:
        while smaller > limit and (words := saving(plan, run.device)):
            smaller = _memory_bytes(run, plan, resolve_execution(plan, run.device))
            # Of a saving that is taken in several steps only the last one is said.
            changes = [change for change in changes if change.split()[0] != words.split()[0]] + [words]
    return changes, smaller


def _recompute(spec: pb.TrainingSpec, device: torch.device) -> str:
    if spec.gradient_checkpointing:
        return ""
    spec.gradient_checkpointing = True
    return "gradient_checkpointing"


def _accumulate(spec: pb.TrainingSpec, device: torch.device) -> str:
    if spec.train_batch_size == 1:
        return ""
    spec.gradient_accumulation_steps *= spec.train_batch_size
    spec.train_batch_size = 1
    return f"train_batch_size 1 and gradient_accumulation_steps {spec.gradient_accumulation_steps}"


def _shrink_moments(spec: pb.TrainingSpec, device: torch.device) -> str:
    if resolve_execution(spec, device).eight_bit:
        return ""
    spec.optimizer_precision = pb.OPTIMIZER_PRECISION_EIGHT_BIT
    return "8-bit optimizer moments"


def _compute_in_half(spec: pb.TrainingSpec, device: torch.device) -> str:
    if device.type != "cuda" or resolve_execution(spec, device).compute_dtype is not torch.float32:
        return ""
    spec.mixed_precision = pb.MIXED_PRECISION_BF16
    return "mixed_precision bf16"


def _drop_average(spec: pb.TrainingSpec, device: torch.device) -> str:
    if not spec.ema_decay:
        return ""
    spec.ema_decay = 0
    return "no moving average"


def _train_adapters(spec: pb.TrainingSpec, device: torch.device) -> str:
    if spec.method in LOW_RANK:
        return ""
    spec.method = pb.TRAINING_METHOD_LORA
    spec.lora.CopyFrom(pb.LoraSettings(rank=16, alpha=16))
    return "a LoRA of rank 16 instead of full training"


def _lower_resolution(spec: pb.TrainingSpec, device: torch.device) -> str:
    if spec.resolution <= LOWEST_RESOLUTION:
        return ""
    spec.resolution -= 64
    return f"resolution {spec.resolution}"


_SAVINGS: tuple[Callable[[pb.TrainingSpec, torch.device], str], ...] = (
    _recompute,
    _accumulate,
    _shrink_moments,
    _compute_in_half,
    _drop_average,
    _train_adapters,
    _lower_resolution,
)


# -- arithmetic ----------------------------------------------------------------------------------------------


def _memory_bytes(run: Run, spec: pb.TrainingSpec, execution: Execution) -> int:
    """Weights and what training keeps beside them, and the largest of what comes and goes.

    That is a forward pass, a picture that is encoded, or a preview that is decoded: never two of them at a time.
    """
    root = open_model(run.model_folder).root
    sizes = _sizes(root)
    low_rank = spec.method in LOW_RANK
    computed = torch.empty(0, dtype=execution.compute_dtype).element_size()
    held = LIBRARIES_BYTES + 4 * sizes.vae
    for part in ("unet", "text_encoder"):
        trains = part in parts_of(spec)
        trained = 0
        if trains:
            trained = _adapter_size(root, part, spec) if low_rank else sizes.of(part)
        # Of float32 weights that train, a cast copy is kept for the length of a pass.
        own = trains and not low_rank
        held += sizes.of(part) * ((4 + (computed if computed < 4 else 0)) if own else computed)
        held += trained * (4 + (2 if execution.eight_bit else 8) + (4 if spec.ema_decay else 0))
        held += trained * 4 if low_rank else 0
    side = spec.resolution
    kept = _sample_pass(root, side // sizes.vae_factor, execution.fused_attention).kept_bytes * _samples(spec)
    kept = kept * computed // 4
    if spec.gradient_checkpointing:
        kept = int(kept * RECOMPUTED_SHARE)
    coded = sizes.decoder_bytes_per_pixel if spec.preview_prompts else sizes.encoder_bytes_per_pixel
    return held + max(kept, coded * side * side)


def _update_s(run: Run, execution: Execution) -> float:
    """Forward and backward of all samples at the speed of this device; latents are in the cache by then."""
    spec = run.spec
    sizes = _sizes(open_model(run.model_folder).root)
    one = _sample_pass(
        open_model(run.model_folder).root, spec.resolution // sizes.vae_factor, execution.fused_attention
    )
    # A backward pass computes twice as much as a forward one, and half of that when the weights are frozen.
    passes = (2 if spec.method in LOW_RANK else 3) + (1 if spec.gradient_checkpointing else 0)
    computed = passes * one.flops * _samples(spec) / (MATMUL_SHARE * _matmul_speed(run.device, execution))
    return spec.gradient_accumulation_steps * (computed + passes * one.calls * CALL_S)


def _samples(spec: pb.TrainingSpec) -> int:
    prior = spec.with_prior_preservation and spec.prior_loss_weight > 0
    return int(spec.train_batch_size) * (2 if prior else 1)


def _device_memory(device: torch.device) -> int:
    return device_memory_bytes(device) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@lru_cache(maxsize=8)
def _matmul_speed(device: torch.device, execution: Execution) -> float:
    """Operations a second of a matrix product, the best of three."""
    side = 2048 if device.type == "cuda" else 512
    matrix = torch.ones(side, side, device=device, dtype=execution.compute_dtype)
    fastest = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * side**3 / fastest


# -- models without numbers ----------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _sizes(root: Path) -> _Sizes:
    vae_config = AutoencoderKL.load_config(str(root / "vae"))
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(vae_config)
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(str(root / "text_encoder")))
    channels = vae_config["block_out_channels"]
    return _Sizes(
        unet=_count(_unet(root)),
        text_encoder=_count(text_encoder),
        vae=_count(vae),
        # Input, normalised and activated copy of a residual block at full size. The decoder's first one there has the
        # channels of the level below still.
        encoder_bytes_per_pixel=3 * 4 * int(channels[0]),
        decoder_bytes_per_pixel=3 * 4 * int(channels[min(1, len(channels) - 1)]),
        vae_factor=1 << (len(channels) - 1),
    )


def _unet(root: Path) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(root / "unet")))


def _adapter_size(root: Path, part: Part, spec: pb.TrainingSpec) -> int:
    shape = lora_shape(spec)
    return _count_adapter(root, part, shape.rank, shape.conv_rank)


@lru_cache(maxsize=32)
def _count_adapter(root: Path, part: Part, rank: int, conv_rank: int) -> int:
    with torch.device("meta"):
        model: nn.Module = (
            _unet(root)
            if part == "unet"
            else CLIPTextModel(CLIPTextConfig.from_pretrained(str(root / "text_encoder")))
        )
    adapter = attach(
        model,
        LoraShape(rank, 1.0, conv_rank=conv_rank, conv_alpha=1.0),
        part=part,
        initial=lambda name, shape: torch.empty(shape, device="meta"),
    )
    return sum(parameter.numel() for parameter in adapter.parameters().values())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@lru_cache(maxsize=32)
def _sample_pass(root: Path, cells: int, fused: bool) -> _Pass:
    unet = _unet(root)
    if not fused:
        unet.set_attn_processor(AttnProcessor())
    weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    calls = _Calls()  # type: ignore[no-untyped-call]
    attention = _FusedAttention() if fused else _Nothing()
    sample = torch.empty(1, unet.config.in_channels, cells, cells, device="meta")
    text = torch.empty(1, 77, unet.config.cross_attention_dim, device="meta")
    with _kept() as kept, FlopCounterMode(display=False) as flops, calls, attention:
        unet(sample, torch.zeros(1, dtype=torch.int64, device="meta"), encoder_hidden_states=text)
    size = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    return _Pass(size, int(flops.get_total_flops()) + attention.flops, calls.number)


@contextmanager
def _kept() -> Iterator[dict[int, torch.UntypedStorage]]:
    """Collects the storages that a forward pass keeps for its backward pass, each once."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts calls of the library."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


class _Nothing(TorchFunctionMode):
    """Changes nothing."""

    flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _FusedAttention(_Nothing):
    """Stands in for the fused attention kernel, which keeps its inputs and its output and no matrix of weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        batch, heads, length, width = query.shape
        self.flops += 4 * batch * heads * length * key.shape[2] * width
        return _AttentionShape.apply(query, key, value)  # type: ignore[no-untyped-call]


class _AttentionShape(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        answer = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, answer)
        return answer

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("there are no numbers to differentiate")


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
