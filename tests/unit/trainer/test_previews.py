"""Pictures drawn while training: which, of what, and that they leave no trace in the weights."""

import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from likeness.training.v1 import training_job_pb2 as pb
from PIL import Image

from services.diffusion.drawing import Drawing, draw
from services.diffusion.loading import Components, load_components
from services.domain.errors import Diverged, InvalidSpec
from services.trainer import previews
from services.trainer.export import assemble
from services.trainer.run import Ending, Request
from services.trainer.support import check_supported
from tests.unit.trainer.harness import (
    RESOLUTION,
    Bench,
    Recorder,
    Trained,
    captioned_spec,
    complete_spec,
    pictures_of,
    same_bits,
    spying,
)

PROMPTS = ["a photo of sks dog", "sks dog on the moon"]
LORA = {"method": pb.TRAINING_METHOD_LORA, "lora": pb.LoraSettings(rank=2, alpha=2, dropout=0.5)}


def train_captioned(bench: Bench, name: str, recorder: Recorder | None = None, **values: Any) -> Trained:
    data = pictures_of(bench.folder / "captioned")
    spec = captioned_spec(max_train_steps=3, **values)
    return bench.train(spec, (), name, recorder, captioned=data)


def train_plain(bench: Bench, name: str, recorder: Recorder | None = None, **values: Any) -> Trained:
    return bench.train(complete_spec(max_train_steps=3, **values), name=name, recorder=recorder)


RECIPES = {"dreambooth": train_plain, "everydream": train_captioned}


def drawn(trained: Trained) -> list[tuple[int, int]]:
    return [(preview.step, preview.prompt_index) for preview in trained.recorder.previews]


@pytest.mark.parametrize(("recipe", "prompts"), [("dreambooth", PROMPTS), ("everydream", PROMPTS[:1])])
def test_previews_are_drawn_of_each_prompt_at_their_updates_and_at_the_end(
    recipe: str, prompts: list[str], bench: Bench
) -> None:
    trained = RECIPES[recipe](bench, "with", preview_prompts=prompts, preview_steps=2)
    assert drawn(trained) == [(step, index) for step in (2, 3) for index in range(len(prompts))]
    assert trained.recorder.previews[0].name == "preview-000002-1.png"
    for preview in trained.recorder.previews:
        with Image.open(preview.file) as picture:
            assert picture.size == (trained.run.spec.resolution,) * 2


def test_a_run_shorter_than_the_interval_has_previews_at_its_end_only(bench: Bench) -> None:
    assert drawn(train_plain(bench, "seldom", preview_prompts=PROMPTS[:1])) == [(3, 0)]
    assert drawn(train_plain(bench, "without", preview_steps=1)) == []


class Interrupting(Recorder):
    """Wants a checkpoint before every update."""

    def request(self) -> Request:
        return Request.CHECKPOINT


@pytest.mark.parametrize(
    ("recipe", "values"),
    [
        ("dreambooth", {}),
        ("dreambooth", {"ema_decay": 0.5, "gradient_checkpointing": True}),
        ("dreambooth", LORA),
        ("dreambooth", {**LORA, "mixed_precision": pb.MIXED_PRECISION_BF16}),
        ("everydream", {}),
    ],
    ids=["dreambooth", "dreambooth averaged", "dreambooth lora", "dreambooth lora bf16", "everydream"],
)
def test_previews_checkpoints_and_logging_change_no_weight(
    recipe: str, values: Mapping[str, Any], bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    train = RECIPES[recipe]
    plain = train(bench, "plain", **values)
    previewed = train(bench, "previewed", preview_prompts=PROMPTS[:1], preview_steps=2, **values)
    assert len(previewed.recorder.previews) == 2
    assert published(plain) == published(previewed)
    caplog.set_level(logging.DEBUG)
    saved = train(bench, "saved and logged", Interrupting(), **values)
    assert saved.recorder.saved
    assert published(plain) == published(saved)
    assert plain.losses == previewed.losses == saved.losses


def published(trained: Trained) -> dict[str, bytes]:
    """Every file of weights that the run has written, byte for byte."""
    folder = trained.run.export_folder
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert files
    return files


@pytest.mark.parametrize("values", [{}, {"ema_decay": 0.5}, LORA], ids=["plain", "averaged", "lora"])
def test_the_last_preview_is_what_the_published_model_draws(values: Mapping[str, Any], bench: Bench) -> None:
    trained = train_plain(bench, "run", preview_prompts=PROMPTS[1:], learning_rate=0.02, **values)
    folder = bench.folder / "published"
    assemble(trained.run, trained.outcome.files, folder)
    wanted = Drawing(
        prompt=PROMPTS[1],
        width_px=RESOLUTION,
        height_px=RESOLUTION,
        num_inference_steps=20,
        guidance_scale=7.5,
        seed=7,
    )
    expected = draw(load_components(folder, torch.float32, torch.device("cpu")), wanted)
    before = draw(load_components(bench.model_folder, torch.float32, torch.device("cpu")), wanted)
    (preview,) = trained.recorder.previews
    with Image.open(preview.file) as picture:
        assert difference(picture, expected) <= 1, "rounding of a merged adapter may move a level"
        assert difference(picture, before) > 8, "the training changes this picture"


def test_previews_read_the_layer_that_the_training_reads_and_end_without_signal_where_it_does(
    bench: Bench,
) -> None:
    seen: list[tuple[Components, Drawing]] = []
    folder = with_velocity(bench)
    with spying(previews, "draw", lambda components, drawing: seen.append((components, drawing))):
        for name, values in {"plain": {}, "other": {"clip_skip": 2, "zero_terminal_snr": True}}.items():
            spec = complete_spec(max_train_steps=1, preview_prompts=PROMPTS[:1], **values)
            bench.train(spec, name=name, model_folder=folder)
    assert [drawing.clip_skip for _, drawing in seen] == [1, 2]
    assert [components.scheduler_config.get("rescale_betas_zero_snr") for components, _ in seen] == [
        None,
        True,
    ]
    assert {drawing.prompt for _, drawing in seen} == {PROMPTS[0]}


def with_velocity(bench: Bench) -> Path:
    """A copy of the model that predicts velocity."""
    folder = bench.folder / "velocity"
    shutil.copytree(bench.model_folder, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    return folder


def difference(one: Image.Image, other: Image.Image) -> int:
    """Largest difference of two pictures in levels."""
    return max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True))


def test_a_drawing_leaves_modes_and_random_numbers_as_they_were() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2))
    module.train()
    module[1].eval()
    before = torch.get_rng_state()
    with previews.evaluating(module), previews._own_random_state(torch.device("cpu")):
        assert not module.training
        assert not module[0].training
        torch.rand(3)
    assert (module.training, module[0].training, module[1].training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), before)


@dataclass
class LeavesAfterOnePreview(Recorder):
    """Asks the run to stop at a checkpoint between the two pictures of a round."""

    def request(self) -> Request:
        return Request.YIELD if len(self.previews) == 1 else Request.NOTHING


def test_a_run_that_is_given_back_within_a_round_draws_it_again_and_trains_on_the_same(bench: Bench) -> None:
    values: dict[str, Any] = {"preview_prompts": PROMPTS, "preview_steps": 2}
    undisturbed = train_plain(bench, "undisturbed", **values)
    first = train_plain(bench, "run", LeavesAfterOnePreview(), **values)
    assert first.outcome.ending is Ending.YIELDED
    assert drawn(first) == [(2, 0)]
    resumed = train_plain(bench, "run", **values)
    assert drawn(resumed) == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert same_bits(resumed.weights(), undisturbed.weights())
    for one, other in zip(resumed.recorder.previews, undisturbed.recorder.previews, strict=True):
        assert one.file.read_bytes() == other.file.read_bytes()


def test_a_resumed_run_may_have_other_previews(bench: Bench) -> None:
    train_plain(bench, "run", LeavesAfterOnePreview(), preview_prompts=PROMPTS, preview_steps=2)
    resumed = train_plain(bench, "run", preview_prompts=["another"], preview_steps=1)
    assert drawn(resumed) == [(2, 0), (3, 0)]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Diverged("the model's output is not finite"), "the model's output is not finite"),
        (torch.OutOfMemoryError("tried to allocate"), "the device's memory is too small"),
    ],
    ids=["not finite", "no memory"],
)
def test_a_preview_that_cannot_be_drawn_is_remarked_upon_and_the_training_goes_on(
    fault: Exception, words: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Image.Image:
        raise fault

    monkeypatch.setattr(previews, "draw", broken)
    trained = train_plain(bench, "run", preview_prompts=PROMPTS[:1])
    assert trained.outcome.step == 3
    assert drawn(trained) == []
    (remark,) = [text for text in trained.outcome.warnings if text.startswith("there is no preview")]
    assert remark.startswith(f"there is no preview-000003-1.png: {words}")


def test_a_fault_of_the_program_is_not_passed_over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Image.Image:
        raise ZeroDivisionError

    monkeypatch.setattr(previews, "draw", broken)
    with pytest.raises(ZeroDivisionError):
        train_plain(bench, "run", preview_prompts=PROMPTS[:1])


def test_a_preview_prompt_that_is_too_long_is_remarked_upon(bench: Bench) -> None:
    trained = train_plain(bench, "run", preview_prompts=["sks dog " * 60])
    assert any("is too long" in text for text in trained.outcome.warnings)


def test_a_black_preview_is_kept_and_remarked_upon(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "draw", lambda *_: Image.new("RGB", (16, 16)))
    trained = train_plain(bench, "run", preview_prompts=PROMPTS[:1])
    assert drawn(trained) == [(3, 0)]
    assert "preview-000003-1.png is black all over" in trained.outcome.warnings


def test_the_time_that_previews_take_is_reported(bench: Bench) -> None:
    previewed = train_plain(bench, "with", preview_prompts=PROMPTS[:1])
    assert previewed.report()["stages_s"]["previews"] > 0
    assert "previews" not in train_plain(bench, "without").report()["stages_s"]


def test_the_time_left_counts_the_previews_before_the_last_update(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: Any) -> Image.Image:
        time.sleep(0.5)
        return Image.new("RGB", (16, 16), "red")

    monkeypatch.setattr(previews, "draw", slow)
    trained = train_plain(bench, "run", preview_prompts=PROMPTS[:1], preview_steps=1)
    assert trained.recorder.updates[1].seconds_left > 0.5
    assert trained.recorder.updates[2].seconds_left == 0


def test_previews_without_an_interval_are_refused() -> None:
    with pytest.raises(InvalidSpec, match="preview_steps: must be at least 1"):
        check_supported(complete_spec(preview_steps=0))
