"""Training on the embedded model: its noise levels, its velocity, its 32 positions and its latents of 32 pixels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from services.diffusion.loading import load_components
from services.trainer.data import LatentSource
from tests.unit.trainer.harness import Bench, Trained, complete_spec, is_training, make_concept

INSTANCE_PROMPT, CLASS_PROMPT = "a photo of a sks robot", "a robot"


@pytest.fixture
def pocket(pocket_model_dir: Path, tmp_path: Path) -> Bench:
    return Bench(pocket_model_dir, tmp_path)


def alpha_bars(model_folder: Path) -> Tensor:
    """float64 [1000], from the published numbers alone (Ho et al. 2020, eq. 4)."""
    config = json.loads((model_folder / "scheduler" / "scheduler_config.json").read_text())
    return (1 - torch.tensor(config["trained_betas"], dtype=torch.float64)).cumprod(0)


def train_once(
    bench: Bench, resolution: int = 256, prompt: str = INSTANCE_PROMPT, steps: int = 1, **changes: Any
) -> Trained:
    concept = make_concept(
        bench.folder / "data",
        instances=1,
        classes=1,
        size=(resolution, resolution),
        instance_prompt=prompt,
        class_prompt=CLASS_PROMPT,
    )
    return bench.train(complete_spec(max_train_steps=steps, resolution=resolution, **changes), (concept,))


def test_the_loss_is_that_of_the_velocity_at_the_published_noise_levels(
    pocket: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Tensor] = []
    shown: list[tuple[Tensor, Tensor]] = []
    latents, forward = LatentSource.latents, UNet2DConditionModel.forward

    def noted_latents(self: Any, use: Any) -> Tensor:
        z0 = latents(self, use)
        assert z0 is not None
        encoded.append(z0)
        return z0

    def noted_forward(self: Any, sample: Tensor, timestep: Tensor, *rest: Any, **named: Any) -> Any:
        if is_training(sample):
            shown.append((sample.detach().clone(), timestep.clone()))
        return forward(self, sample, timestep, *rest, **named)

    monkeypatch.setattr(LatentSource, "latents", noted_latents)
    monkeypatch.setattr(UNet2DConditionModel, "forward", noted_forward)
    # So small a rate leaves the weights as they are: every update's loss is that of the base.
    trained = train_once(pocket, steps=4, pad_tokens=True, learning_rate=1e-12, adam_weight_decay=0.0)
    monkeypatch.undo()

    parts = load_components(pocket.model_folder)
    ids = parts.tokenizer(
        [INSTANCE_PROMPT, CLASS_PROMPT], padding="max_length", max_length=32, return_tensors="pt"
    ).input_ids
    bars = alpha_bars(pocket.model_folder)
    losses = []
    for update, (zt, t) in enumerate(shown):
        z0 = torch.stack(encoded[2 * update : 2 * update + 2])
        assert z0.shape == (2, 12, 8, 8)
        bar = bars[t].view(-1, 1, 1, 1)
        signal, noise = bar.sqrt().float(), (1 - bar).sqrt().float()
        e = (zt - signal * z0) / noise
        with torch.no_grad():
            predicted = parts.unet(zt, t, parts.text_encoder(ids)[0]).sample
        losses.append(float((predicted - (signal * e - noise * z0)).square().mean(dim=(1, 2, 3)).sum()))
    assert len(losses) == 4
    assert trained.losses == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("resolution", [256, 320, 768])
def test_it_trains_at_every_size_that_is_offered(pocket: Bench, resolution: int) -> None:
    trained = train_once(pocket, resolution, with_prior_preservation=False)
    assert trained.outcome.step == 1
    assert len(trained.losses) == 1


def test_a_prompt_beyond_32_positions_is_cut_with_a_remark(pocket: Bench) -> None:
    prompt = " ".join(["red"] * 30 + ["robot", "star"])
    trained = train_once(pocket, prompt=prompt)
    assert trained.outcome.warnings[0].startswith(f'prompt "{prompt}" is too long; not used: "robot star')
