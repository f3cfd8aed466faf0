"""Estimates against what a real pass keeps and computes, and the smaller plans that they choose."""

import json
import logging
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from likeness.training.v1 import training_job_pb2 as pb
from torch.utils._python_dispatch import TorchDispatchMode

from services.diffusion.loading import load_components
from services.trainer import needs
from services.trainer.execution import resolve_execution
from services.trainer.run import Run
from tests.unit.trainer.harness import Bench, complete_spec

GIB = 2**30
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}
TEXT_ENCODER = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configurations of Stable Diffusion 1; there are no weights."""
    folder = tmp_path_factory.mktemp("sd1")
    for part, config in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT_ENCODER)):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    return folder


def run_of(bench: Bench, folder: Path, **changes: Any) -> Run:
    return replace(bench.run(complete_spec(**({"resolution": 512} | changes))), model_folder=folder)


def memory(run: Run) -> int:
    guess = needs.estimate(run, resolve_execution(run.spec, run.device), 100)
    assert guess is not None
    return guess.memory_bytes


def test_a_pass_without_numbers_keeps_what_a_real_one_keeps(bench: Bench) -> None:
    unet = load_components(bench.model_folder).unet.requires_grad_(True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    real: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        real[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unet(torch.randn(1, 4, 32, 32), torch.tensor([3]), encoder_hidden_states=torch.randn(1, 77, 32))
    kept = sum(storage.nbytes() for key, storage in real.items() if key not in weights)
    assert needs._sample_pass(bench.model_folder, 32, True).kept_bytes == pytest.approx(kept, rel=0.1)


def test_a_pass_of_stable_diffusion_takes_the_known_number_of_operations(stable_diffusion: Path) -> None:
    # 0.80 TFLOP a sample at 512 px, as torch's counter says of the whole model on a CPU.
    assert needs._sample_pass(stable_diffusion, 64, True).flops == pytest.approx(0.80e12, rel=0.02)
    sizes = needs._sizes(stable_diffusion)
    assert (sizes.unet, sizes.text_encoder, sizes.vae_factor) == (859520964, 123060480, 8)


def test_full_training_of_stable_diffusion_is_guessed_at_its_usual_size(
    bench: Bench, stable_diffusion: Path
) -> None:
    # Weights, gradients and two moments of 983 M parameters are 14.6 GiB; two samples' activations come on top.
    assert 16 * GIB < memory(run_of(bench, stable_diffusion)) < 22 * GIB


@pytest.mark.parametrize(
    ("changes", "larger"),
    [
        ({"gradient_checkpointing": True}, False),
        ({"optimizer_precision": pb.OPTIMIZER_PRECISION_EIGHT_BIT}, False),
        ({"train_text_encoder": False}, False),
        ({"method": pb.TRAINING_METHOD_LORA, "lora": pb.LoraSettings(rank=4, alpha=4)}, False),
        ({"with_prior_preservation": False}, False),
        ({"resolution": 320}, False),
        ({"train_batch_size": 2}, True),
        ({"ema_decay": 0.99}, True),
        ({"disable_fused_attention": True}, True),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_setting_moves_the_guess_its_way(
    changes: dict[str, Any], larger: bool, bench: Bench, stable_diffusion: Path
) -> None:
    plain, changed = (
        memory(run_of(bench, stable_diffusion)),
        memory(run_of(bench, stable_diffusion, **changes)),
    )
    assert (changed > 1.05 * plain) if larger else (changed < 0.95 * plain)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most bytes that results of the library had at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.most = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.bytes += size
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.bytes -= size


@torch.no_grad()
def test_a_decoded_preview_is_counted_at_what_the_decoder_holds(stable_diffusion: Path) -> None:
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(VAE)
        latents = torch.empty(1, 4, 64, 64)
    with Live() as live:
        vae.decode(latents)
    sizes = needs._sizes(stable_diffusion)
    assert sizes.decoder_bytes_per_pixel * 512 * 512 == pytest.approx(live.most, rel=0.1)


def test_previews_of_a_lora_at_a_large_size_need_the_memory_to_decode_them(
    bench: Bench, stable_diffusion: Path
) -> None:
    lora = {"method": pb.TRAINING_METHOD_LORA, "lora": pb.LoraSettings(rank=4, alpha=4)}
    small = {**lora, "gradient_checkpointing": True, "with_prior_preservation": False}
    plain = memory(run_of(bench, stable_diffusion, **small))
    drawn = memory(run_of(bench, stable_diffusion, **small, preview_prompts=["a dog"]))
    assert drawn - plain > GIB // 4
    large = memory(run_of(bench, stable_diffusion))
    assert memory(run_of(bench, stable_diffusion, preview_prompts=["a dog"])) == large, "a pass needs more"


def test_too_little_memory_names_a_plan_that_needs_less(
    bench: Bench, stable_diffusion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "_device_memory", lambda device: 16 * GIB)
    text = str(needs.out_of_memory(run_of(bench, stable_diffusion, train_batch_size=4)))
    smaller = run_of(
        bench,
        stable_diffusion,
        gradient_checkpointing=True,
        gradient_accumulation_steps=4,
        optimizer_precision=pb.OPTIMIZER_PRECISION_EIGHT_BIT,
    )
    told = f"{memory(smaller) / GIB:.1f} GiB"
    assert "with gradient_checkpointing, train_batch_size 1 and gradient_accumulation_steps 4, 8-bit" in text
    assert text.endswith(f"it needs about {told}")
    assert memory(smaller) < 0.9 * 16 * GIB


def test_a_resolution_is_lowered_last_and_said_once(
    bench: Bench, stable_diffusion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "_device_memory", lambda device: GIB)
    text = str(needs.out_of_memory(run_of(bench, stable_diffusion)))
    assert text.count("resolution") == 1
    assert "a LoRA of rank 16 instead of full training, resolution 256 it needs" in text


def test_a_training_that_is_small_already_is_told_so(bench: Bench) -> None:
    text = str(needs.out_of_memory(bench.run(complete_spec())))
    assert text.endswith("and no plan needs much less")


def test_the_guess_is_logged_before_the_training_and_kept_in_its_report(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="services.trainer.needs"):
        trained = bench.train(complete_spec(max_train_steps=2))
    (record,) = [record for record in caplog.records if record.name == "services.trainer.needs"]
    assert record.getMessage().startswith("training will take about 0.5 GiB and ")
    report = trained.report()
    assert record.__dict__["memory_bytes"] == report["estimate"]["memory_bytes"]
    peak = report["history"]["memory_bytes"][-1]
    assert report["estimate"]["memory_bytes"] == pytest.approx(peak, rel=1.0), "of the right order"


def test_a_model_that_cannot_be_guessed_at_costs_no_training(bench: Bench, tmp_path: Path) -> None:
    run = run_of(bench, tmp_path)
    assert needs.estimate(run, resolve_execution(run.spec, run.device), 1) is None
    assert "ask for gradient_checkpointing or a smaller resolution" in str(needs.out_of_memory(run))
