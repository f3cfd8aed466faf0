"""Trained low-rank adapters as files: one the loader merges into the base, and the two layouts that others read."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from likeness.training.v1 import training_job_pb2 as pb

from services.diffusion.lora import Factors, LoraWeights
from services.diffusion.lora_card import LoraCard
from services.diffusion.lora_files import PEFT_FILE, read_lora, write_kohya, write_peft
from services.domain.artifacts import ADAPTER_PATTERN, adapter_name
from services.domain.errors import ExportMismatch
from services.trainer.execution import schedule_name
from services.trainer.run import Run
from services.trainer.shared_files import part_folder
from services.trainer.trained_model import TrainedModel, lora_shape

FOLDER = Path("lora")
KOHYA_FILE = "kohya.safetensors"
PEFT, KOHYA = "lora_diffusers", "lora_kohya"
"""Names of the formats in a model's manifest."""


def write(run: Run, model: TrainedModel, dtype: torch.dtype) -> tuple[list[Path], dict[str, Path]]:
    """Writes the adapters.

    Args:
        run: where to, and what they are.
        model: has them.
        dtype: precision of the files.

    Returns:
        The files of the model's folder, and the files by format, all relative to the export folder. The first are
        links to the diffusers layout's: one beside each part that it changes.
    """
    folder, weights = run.export_folder, trained_weights(model)
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    card = _card(run, model)
    formats = {PEFT: FOLDER / PEFT_FILE, KOHYA: FOLDER / KOHYA_FILE}
    write_peft(weights, folder / formats[PEFT], card, dtype)
    write_kohya(weights, folder / formats[KOHYA], card, dtype)
    base = [str(path.relative_to(run.model_folder)) for path in run.model_folder.rglob("*") if path.is_file()]
    files = []
    for part in model.adapters:
        place = Path(part_folder(base, part))
        number = len(list((run.model_folder / place).glob(ADAPTER_PATTERN)))
        files.append(place / adapter_name(number))
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / files[-1]).unlink(missing_ok=True)
        os.link(folder / formats[PEFT], folder / files[-1])
    return files, formats


def check(run: Run, model: TrainedModel, dtype: torch.dtype, files: Iterable[Path]) -> None:
    """Reads files back and compares every factor with the one in memory.

    Raises:
        ExportMismatch: one differs.
    """
    trained = trained_weights(model).modules
    for path in files:
        found = read_lora(run.export_folder / path).modules
        if set(found) != set(trained):
            odd = sorted(set(found) ^ set(trained))
            raise ExportMismatch(f"{path.name} was not published: {len(odd)} modules differ, first {odd[0]}")
        for name, factors in trained.items():
            same = torch.equal(found[name].a, factors.a.to(dtype).float())
            same = same and torch.equal(found[name].b.flatten(1), factors.b.to(dtype).float().flatten(1))
            if not same or found[name].alpha != torch.tensor(factors.alpha, dtype=torch.float32).item():
                raise ExportMismatch(f"{path.name} was not published: {name} is not what was trained")


def trained_weights(model: TrainedModel) -> LoraWeights:
    """Returns the factors of all parts, copied to the CPU."""
    modules: dict[str, Factors] = {}
    for adapter in model.adapters.values():
        modules.update(adapter.weights().modules)
    return LoraWeights(modules)


def _card(run: Run, model: TrainedModel) -> LoraCard:
    spec = run.spec
    prompts = [concept.instance_prompt for concept in spec.concepts if concept.instance_prompt]
    return LoraCard(
        title=spec.model_name,
        base_model=spec.base_model,
        family=run.family,
        prediction_type=model.components.prediction_type,
        base_digest=run.model_digest,
        preset=lora_shape(spec).preset,
        resolution_px=spec.resolution,
        clip_skip=max(1, spec.clip_skip),
        trigger_phrase="; ".join(prompts),
        license=run.license,
        tag_frequency=_frequencies(run),
        training=_settings(run),
    )


def _settings(run: Run) -> dict[str, str | int | float | bool]:
    spec = run.spec
    own = spec.HasField("text_encoder_learning_rate")
    return {
        "seed": spec.seed,
        "unet_lr": spec.learning_rate,
        "text_encoder_lr": spec.text_encoder_learning_rate if own else spec.learning_rate,
        "lr_scheduler": schedule_name(spec),
        "gradient_accumulation_steps": spec.gradient_accumulation_steps,
        "max_grad_norm": spec.max_grad_norm,
        "max_train_steps": spec.max_train_steps,
        "min_snr_gamma": spec.min_snr_gamma,
        "mixed_precision": pb.MixedPrecision.Name(spec.mixed_precision)
        .removeprefix("MIXED_PRECISION_")
        .lower(),
        "network_dropout": spec.lora.dropout,
        "noise_offset": spec.offset_noise,
        "num_train_images": sum(len(concept.instance_pictures) for concept in run.concepts),
        "num_reg_images": sum(len(concept.class_pictures) for concept in run.concepts),
        "optimizer": "AdamW",
        "prior_loss_weight": spec.prior_loss_weight,
    }


def _frequencies(run: Run) -> dict[str, dict[str, int]]:
    frequencies: dict[str, dict[str, int]] = {}
    for number, concept in enumerate(run.concepts):
        counts = frequencies.setdefault(f"concept {number}", {})
        for picture in concept.instance_pictures:
            counts[picture.prompt] = counts.get(picture.prompt, 0) + 1
    return frequencies
