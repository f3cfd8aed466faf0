"""The base model's recipe: its loss against the library's own schedule, that it learns, and that it resumes."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from models.pocket import base
from models.pocket.scenes import random_scene
from models.pocket.train_base import (
    BATCHES,
    EMPTY_CAPTIONS,
    Scenes,
    Trainer,
    arguments_of,
    averaged,
    check_gradients,
    double_by_copying,
    rate,
    velocity_loss,
)
from models.pocket.training import Processes, save_state

ALONE = Processes(0, 1, torch.device("cpu"))
CPU = torch.device("cpu")


def write_latents(folder: Path, name: str, count: int = 16, cells: int = 8) -> Tensor:
    """A file of scenes that all have the same latents, which can be learned in a few steps."""
    rng = random.Random(name)
    pattern = torch.randn(12, cells, cells, generator=torch.Generator().manual_seed(0))
    scenes = [random_scene(rng).as_json() for _ in range(count)]
    save_state(folder / name, {"values": pattern.half().expand(count, -1, -1, -1).clone(), "scenes": scenes})
    return pattern


@pytest.fixture(scope="module")
def latents_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, "768-0000.pt")
    return folder


def trainer(latents: Path, out: Path, steps: int, *more: str) -> Trainer:
    words = ["--latents", str(latents), "--out", str(out), "--steps", str(steps), "--no-compile"]
    return Trainer(arguments_of([*words, "--shares", "768:1", "--decay-steps", "1", *more]), ALONE)


def weights(one: Trainer) -> list[Tensor]:
    return [*one.unet.state_dict().values(), *one.text_encoder.state_dict().values()]


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    rates = [rate(step, 1000, 200, 2.0, warmup=100) for step in range(1001)]
    assert rates[:100] == pytest.approx([0.02 * (step + 1) for step in range(100)])
    assert set(rates[100:800]) == {2.0}
    assert rates[900] == pytest.approx(1.0)
    assert rates[1000] == 0.0


class Oracle(nn.Module):
    """Answers with the velocity that the library computes from the noise it finds in its input."""

    def __init__(self, latents: Tensor, scheduler: Any) -> None:
        super().__init__()
        self.latents, self.scheduler = latents, scheduler
        self.steps = torch.empty(0, dtype=torch.long)

    def forward(
        self, noisy: Tensor, steps: Tensor, embeddings: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        self.steps = steps
        bars = self.scheduler.alphas_cumprod[steps][:, None, None, None]
        noise = (noisy - bars.sqrt() * self.latents) / (1 - bars).sqrt()
        torch.testing.assert_close(self.scheduler.add_noise(self.latents, noise, steps), noisy)
        return (self.scheduler.get_velocity(self.latents, noise, steps),)


def test_the_loss_is_zero_for_the_librarys_velocity() -> None:
    latents = torch.randn(64, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    oracle = Oracle(latents, DDIMScheduler.from_config(base.scheduler_config()))
    generator = torch.Generator().manual_seed(1)
    loss = velocity_loss(oracle, latents, torch.zeros(64, 1, 1), base.alpha_bars(), generator)
    assert float(loss) < 1e-6
    # One training step from each of as many equal stretches of the schedule.
    assert (oracle.steps * 64 // base.TRAIN_STEPS - torch.arange(64)).abs().max() <= 1
    assert int(oracle.steps.max()) < base.TRAIN_STEPS


class Silent(nn.Module):
    """Predicts nothing at all."""

    def forward(
        self, noisy: Tensor, steps: Tensor, embeddings: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        return (torch.zeros_like(noisy),)


def test_the_loss_of_no_prediction_is_the_velocitys_variance() -> None:
    latents = torch.randn(256, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    loss = velocity_loss(Silent(), latents, torch.zeros(256, 1, 1), base.alpha_bars(), generator)
    assert float(loss) == pytest.approx(1.0, rel=0.03)


def test_doubling_by_copying_changes_nothing_that_the_unet_computes() -> None:
    torch.manual_seed(0)
    plain, copying = base.build_unet(), base.build_unet()
    copying.load_state_dict(plain.state_dict())
    double_by_copying(copying)
    latents, embeddings = torch.randn(2, 12, 12, 12), torch.randn(2, 4, base.WIDTH)
    outputs = [unet(latents, torch.tensor([1, 999]), embeddings).sample for unet in (plain, copying)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for (name, one), two in zip(plain.named_parameters(), copying.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_compiled_networks_with_wrong_gradients_are_refused_by_a_parameters_name() -> None:
    right = [torch.ones(4), torch.ones(8), torch.full((2,), 1e-6)]
    names = ["to_v.weight", "conv.weight", "bias"]
    rounded = [right[0] * 1.01, right[1], -right[2]]
    check_gradients(right, rounded, names)
    with pytest.raises(
        RuntimeError, match=r"1 of 3 parameters differ, to_v\.weight among them.*--no-compile"
    ):
        check_gradients(right, [torch.zeros(4), *right[1:]], names)


def test_scenes_that_appear_while_training_are_found(tmp_path: Path) -> None:
    write_latents(tmp_path, "512-0000.pt", count=3, cells=16)
    scenes = Scenes(tmp_path, CPU)
    assert (scenes.look(), scenes.sizes()) == (3, [512])
    write_latents(tmp_path, "256-0000.pt", count=5)
    assert (scenes.look(), scenes.sizes()) == (8, [256, 512])
    assert scenes.look() == 8


def test_a_batch_has_the_size_asked_for_and_a_caption_for_each(tmp_path: Path) -> None:
    pattern = write_latents(tmp_path, "256-0000.pt")
    scenes = Scenes(tmp_path, CPU)
    scenes.look()
    latents, captions = scenes.batch(random.Random(0), 256, 400)
    assert latents.shape == (400, 12, 8, 8)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents[7], pattern, atol=2e-3, rtol=0)
    assert len(set(captions)) > 100
    assert captions.count("") / 400 == pytest.approx(EMPTY_CAPTIONS, abs=0.05)


def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    latents_folder: Path, tmp_path: Path
) -> None:
    whole = trainer(latents_folder, tmp_path / "whole", 3)
    whole.run()
    # The rate is still warming up, and so the same in the first steps of a run of any length.
    trainer(latents_folder, tmp_path / "stopped", 1).run()
    resumed = trainer(latents_folder, tmp_path / "stopped", 3)
    resumed.run()
    assert all(torch.equal(one, other) for one, other in zip(weights(whole), weights(resumed), strict=True))
    (unet, _, counters), (other, _, _) = (
        averaged(tmp_path / name / "state.pt") for name in ("whole", "stopped")
    )
    assert counters == {"step": 3, "samples": 3 * BATCHES[768]}
    averages = zip(unet.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in averages)
    assert not all(
        torch.equal(one, two) for one, two in zip(unet.parameters(), whole.unet.parameters(), strict=True)
    )


def test_a_short_run_learns(latents_folder: Path, tmp_path: Path) -> None:
    run = trainer(latents_folder, tmp_path, 12, "--learning-rate", "0.03")

    def loss() -> float:
        scenes = Scenes(latents_folder, CPU)
        scenes.look()
        latents, _ = scenes.batch(random.Random(1), 768, 16)
        embeddings = torch.zeros(16, base.POSITIONS, base.WIDTH)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return float(velocity_loss(run.unet, latents, embeddings, base.alpha_bars(), generator))

    untrained = loss()
    run.run()
    assert untrained > 0.9
    assert loss() < 0.8


def test_a_new_training_can_start_from_a_published_folder(
    published_folder: Path, latents_folder: Path, tmp_path: Path
) -> None:
    begun = trainer(latents_folder, tmp_path, 1, "--start-from", str(published_folder))
    assert {tensor.dtype for tensor in begun.unet.state_dict().values()} == {torch.float32}
    torch.manual_seed(1)  # what the folder was made with
    unet = base.build_unet()
    text_encoder = base.build_text_encoder(len(base.build_tokenizer()))
    for name, weight in begun.unet.state_dict().items():
        assert torch.equal(weight, unet.state_dict()[name].half().float()), name
    for name, weight in begun.text_encoder.state_dict().items():
        assert torch.equal(weight, text_encoder.state_dict()[name]), name


def test_without_scenes_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"write some with models\.pocket\.latents"):
        trainer(tmp_path, tmp_path / "out", 1).run()


def test_steps_that_leave_the_processes_apart_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--latents", "a", "--out", "b", "--steps", "20", "--average-every", "8"]
    with pytest.raises(SystemExit):
        arguments_of(words)
    assert "multiples of --average-every" in capsys.readouterr().err
