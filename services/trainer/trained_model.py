"""The base model in memory and what trains of it: whole parts, or low-rank adapters on frozen ones.

What trains is float32. A part whose own weights are frozen is held in the precision that the forward pass computes
with: nothing of it is ever written.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import AttnProcessor
from likeness.training.v1 import training_job_pb2 as pb
from torch import nn

from services.diffusion.loading import Components, open_model
from services.diffusion.lora import PARTS, Adapter, LoraShape, Part, attach
from services.domain.training_spec import LOW_RANK
from services.trainer.execution import Execution
from services.trainer.guards import AdapterWatch, Watch, WeightWatch
from services.trainer.randomness import Purpose, normal
from services.trainer.run import Run


@dataclass(frozen=True)
class TrainedModel:
    """A model that trains.

    Attributes:
        components: all its parts; those that train are in training mode.
        groups: the trained tensors by part, then by name: `<part>.<name>`.
        adapters: the low-rank adapters by part; empty when whole parts train.
    """

    components: Components
    groups: Mapping[Part, Mapping[str, nn.Parameter]]
    adapters: Mapping[Part, Adapter]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All trained tensors by name."""
        return {name: parameter for group in self.groups.values() for name, parameter in group.items()}

    def module(self, part: Part) -> nn.Module:
        """One part of the model."""
        module: nn.Module = getattr(self.components, part)
        return module

    def freeze(self, part: Part) -> None:
        """Ends the training of one part; its tensors keep their bits from here on."""
        for parameter in self.groups[part].values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.module(part).eval()

    def watch(self) -> Watch:
        """Returns what tells how far the weights move; an adapter's count by what they change of the base."""
        if not self.adapters:
            return WeightWatch(self.parameters)
        return AdapterWatch({part: (adapter, self.module(part)) for part, adapter in self.adapters.items()})


def load_trained_model(run: Run, execution: Execution) -> TrainedModel:
    """Loads the base model and makes ready what the specification wants to train of it.

    Raises:
        BadInput: the base model cannot be used.
        InvalidSpec: it has nothing that an adapter of this kind could change.
    """
    spec = run.spec
    trained = parts_of(spec)
    low_rank = spec.method in LOW_RANK
    own = [part for part in trained if not low_rank]
    components = _load(run, execution, own)
    for part in PARTS:
        # The text encoder recomputes activations only in training mode, so the modes are explicit.
        getattr(components, part).requires_grad_(part in own).train(part in trained)
    components.vae.requires_grad_(False)
    if not execution.fused_attention:
        components.unet.set_attn_processor(AttnProcessor())
        components.text_encoder.set_attn_implementation("eager")
    if spec.gradient_checkpointing:
        components.unet.enable_gradient_checkpointing()
        if "text_encoder" in trained:
            components.text_encoder.activation_checkpointing_enable({"use_reentrant": False})
    if low_rank:
        adapters = {part: _adapter(spec, part, getattr(components, part)) for part in trained}
        groups = {part: adapter.parameters() for part, adapter in adapters.items()}
        return TrainedModel(components, groups, adapters)
    return TrainedModel(components, {part: _named(components, part) for part in own}, {})


def parts_of(spec: pb.TrainingSpec) -> tuple[Part, ...]:
    """Returns the parts of the model that train, the UNet first."""
    wanted = {"unet": spec.train_unet, "text_encoder": spec.train_text_encoder}
    return tuple(part for part in PARTS if wanted[part])


def published_form(components: Components, spec: pb.TrainingSpec) -> Components:
    """Returns the model as it is to be drawn with.

    One that was trained down to no signal at all must begin at the timestep that has none (Lin et al. 2024, 3.3).
    """
    if not spec.zero_terminal_snr:
        return components
    changed = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return components.with_modules(scheduler_config={**components.scheduler_config, **changed})


def lora_shape(spec: pb.TrainingSpec) -> LoraShape:
    """Returns the size of the adapters; without LOCON the 3x3 convolutions get none."""
    lora, conv = spec.lora, spec.method == pb.TRAINING_METHOD_LOCON
    return LoraShape(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        conv_rank=lora.conv_rank if conv else 0,
        conv_alpha=lora.conv_alpha if conv else 0.0,
    )


def _load(run: Run, execution: Execution, own: list[Part]) -> Components:
    def precision(part: Part) -> torch.dtype:
        return torch.float32 if part in own else execution.compute_dtype

    def folder(dtype: torch.dtype):  # type: ignore[no-untyped-def]
        return open_model(run.model_folder, dtype, run.device)

    whole = folder(torch.float32)
    return Components(
        unet=folder(precision("unet")).load_unet(),
        vae=whole.load_vae(),
        text_encoder=folder(precision("text_encoder")).load_text_encoder(),
        tokenizer=whole.load_tokenizer(),
        scheduler_config=whole.scheduler_config(),
    )


def _adapter(spec: pb.TrainingSpec, part: Part, module: nn.Module) -> Adapter:
    def initial(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return normal(shape, spec.seed, Purpose.LORA_INIT, name)

    return attach(module, lora_shape(spec), part=part, initial=initial)


def _named(components: Components, part: Part) -> dict[str, nn.Parameter]:
    module: nn.Module = getattr(components, part)
    return {f"{part}.{name}": parameter for name, parameter in module.named_parameters()}
