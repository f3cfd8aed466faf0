"""The autoencoder's recipe: crops, how it is measured, that it learns, and that it resumes as if never stopped."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.pocket import autoencoder
from models.pocket.train_autoencoder import (
    arguments_of,
    crops,
    reconstruction,
    to_tensor,
    train,
    whole_scenes,
)
from models.pocket.training import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
QUICK = ("--phases", "0.5:64:2,1:64:1", "--decoder-phases", "1:64:1", "--held-out", "1", "--scale-on", "2")


def run(out: Path, steps: int, decoder_steps: int, *more: str) -> Any:
    words = ["--out", str(out), "--steps", str(steps), "--decoder-steps", str(decoder_steps), *QUICK, *more]
    return train(arguments_of(words), ALONE)


def weights(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["model"]
    return state


def test_pixels_become_minus_one_to_one() -> None:
    pixels = np.array([[[[0, 127, 255]]]], np.uint8)
    assert to_tensor(pixels).flatten().tolist() == pytest.approx([-1.0, -1 / 255, 1.0])
    assert to_tensor(np.zeros((2, 4, 6, 3), np.uint8)).shape == (2, 3, 4, 6)


@pytest.mark.parametrize(("side", "count"), [(64, 8), (256, 3), (800, 1)])
def test_crops_have_the_side_asked_for_and_follow_their_seed(side: int, count: int) -> None:
    first, again, other = (crops(random.Random(seed), side, count) for seed in (1, 1, 2))
    assert first.shape == (count, side, side, 3)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (first != other).any()


def test_held_out_scenes_are_drawn_from_streams_of_their_own() -> None:
    assert torch.equal(whole_scenes(0, 2, 64), whole_scenes(0, 2, 64))
    assert not torch.equal(whole_scenes(0, 2, 64), whole_scenes(1, 2, 64))


class OffByOneTenth(nn.Module):
    """Stands in for an autoencoder: what comes back is 0.1 too dark."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def encode(self, picture: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=picture))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latents - 0.1)


def test_the_error_and_the_ratio_are_those_of_the_round_trip() -> None:
    error, ratio = reconstruction(OffByOneTenth(), torch.zeros(5, 3, 8, 8))
    assert error == pytest.approx(0.1)
    assert ratio == pytest.approx(10 * np.log10(2**2 / 0.1**2))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps and two of the decoder's. Read only."""
    out = tmp_path_factory.mktemp("undisturbed")
    model = run(out, 2, 2)
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in weights(out / "model.pt").items()
    )
    return out


def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    undisturbed: Path, tmp_path: Path
) -> None:
    # The rate is still warming up, and so the same in the first steps of a run of any length.
    run(tmp_path, 1, 0, "--phases", "1:64:2")
    (tmp_path / "encoder.pt").unlink()
    run(tmp_path, 2, 1)
    run(tmp_path, 2, 2)
    for name in ("encoder.pt", "model.pt"):
        expected, found = weights(undisturbed / name), weights(tmp_path / name)
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


def test_the_decoders_steps_leave_the_encoder_alone(undisturbed: Path) -> None:
    frozen, finished = weights(undisturbed / "encoder.pt"), weights(undisturbed / "model.pt")
    for name, before in frozen.items():
        if name.split(".")[0] in ("encoder", "quant_conv"):
            assert torch.equal(before, finished[name]), name
    for name in ("decoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight"):
        assert not torch.equal(frozen[name], finished[name]), name


def test_a_run_writes_down_how_well_it_does(undisturbed: Path) -> None:
    events = [json.loads(line) for line in (undisturbed / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if "psnr_db" in event] == [2, 2]
    assert [event["smallest"] > 0 for event in events if event.get("event") == "scaled"] == [True]


def test_a_short_run_learns(tmp_path: Path) -> None:
    batch = to_tensor(crops(random.Random("seen by no training"), 32, 48))
    model = run(tmp_path, 26, 0, "--phases", "1:32:8", "--learning-rate", "2e-3")
    torch.manual_seed(0)
    untrained, _ = reconstruction(autoencoder.build(with_norms=False), batch)
    trained, _ = reconstruction(model, batch)
    assert untrained > 0.45
    assert trained < 0.40
