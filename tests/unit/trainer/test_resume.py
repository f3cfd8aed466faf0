"""An interrupted run ends with the bits of an undisturbed one; a run that stops being finite is contained."""

import logging
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from likeness.training.v1 import training_job_pb2 as pb
from safetensors.torch import load_file

from services.domain.errors import BadInput
from services.trainer import checkpoint as checkpoints
from services.trainer import updates
from services.trainer.checkpoint import CheckpointMismatch
from services.trainer.counters import Counters, Pace
from services.trainer.data import Concept
from services.trainer.losses import per_sample_mse
from services.trainer.run import Ending, Request
from tests.chaos.campaign import Place, disturbed, undisturbed
from tests.chaos.nursery import Nursery, open_nursery
from tests.chaos.points import PHASES
from tests.chaos.scenarios import LOW_RANK, SCENARIOS, dreambooth_concepts, random_features
from tests.unit.trainer.harness import (
    Bench,
    Recorder,
    Tensors,
    Trained,
    base_weights,
    complete_spec,
    largest_difference,
    make_concept,
    same_bits,
)

EIGHT, THIRTY_TWO = pb.OPTIMIZER_PRECISION_EIGHT_BIT, pb.OPTIMIZER_PRECISION_THIRTY_TWO_BIT
BOTH = pytest.mark.parametrize("precision", [THIRTY_TWO, EIGHT], ids=["32-bit", "8-bit"])


def demanding_spec(**changes: Any) -> pb.TrainingSpec:
    """Random crops, prior preservation, accumulation, a decaying schedule: whatever could lose its place."""
    values: dict[str, Any] = {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": pb.LEARNING_RATE_SCHEDULE_COSINE,
        "lr_warmup_steps": 2,
        "max_train_steps": 10,
    }
    return complete_spec(**(values | changes))


EVERYTHING: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": dict(LOW_RANK),
    "LoCon": {
        "method": pb.TRAINING_METHOD_LOCON,
        "lora": pb.LoraSettings(rank=2, alpha=3, dropout=0.3, conv_rank=1, conv_alpha=2),
        "optimizer_precision": pb.OPTIMIZER_PRECISION_EIGHT_BIT,
    },
}


def demanding_concept(folder: Path) -> Concept:
    """Ten updates take five epochs of this; updates 4 and 10 lie on an epoch's border, update 5 within one."""
    return make_concept(folder / "data", instances=3, classes=7, size=(40, 16))


def state_bits(run_folder: Path) -> Tensors:
    """Weights and moments of the newest checkpoint."""
    newest = checkpoints.read_newest(run_folder / "checkpoints")
    assert newest is not None
    average = {f"average {name}": tensor for name, tensor in newest.average.items()}
    return {**newest.weights, **newest.optimizer, **average}


def yielded(bench: Bench, spec: pb.TrainingSpec, at: int, **changes: Any) -> Trained:
    """Trains up to an update of this attempt and gives the rest back."""
    data = (demanding_concept(bench.folder),)
    trained = bench.train(spec, data, recorder=Recorder(ask={at: Request.YIELD}), **changes)
    assert trained.outcome.ending is Ending.YIELDED
    return trained


@BOTH
@pytest.mark.parametrize("at", [4, 5], ids=["epoch's border", "mid-epoch"])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(precision: int, at: int, bench: Bench) -> None:
    spec, data = demanding_spec(optimizer_precision=precision), (demanding_concept(bench.folder),)
    whole = bench.train(spec, data, "whole", Recorder(ask={9: Request.CHECKPOINT}))
    first = yielded(bench, spec, at)
    second = bench.train(spec, data, recorder=Recorder(ask={9 - at: Request.CHECKPOINT}))
    assert first.outcome.step == at
    assert same_bits(whole.weights(), second.weights())
    assert same_bits(state_bits(whole.run.workdir), state_bits(second.run.workdir))
    assert whole.learning_rates == first.learning_rates + second.learning_rates
    assert whole.losses == first.losses + second.losses
    assert whole.outcome.final_loss == second.outcome.final_loss


@pytest.mark.parametrize("kind", EVERYTHING)
def test_with_every_random_feature_on_a_run_resumed_twice_equals_an_undisturbed_one(
    kind: str, bench: Bench
) -> None:
    data = dreambooth_concepts(bench.folder / "data")
    spec = complete_spec(**random_features(balance_concepts=True, **EVERYTHING[kind]))
    whole = bench.train(spec, data, "whole", Recorder(ask={9: Request.CHECKPOINT}))
    first = bench.train(spec, data, recorder=Recorder(ask={5: Request.YIELD}))
    second = bench.train(spec, data, recorder=Recorder(ask={2: Request.YIELD}))
    last = bench.train(spec, data, recorder=Recorder(ask={2: Request.CHECKPOINT}))
    assert [first.outcome.step, second.outcome.step, last.outcome.step] == [5, 7, 10]
    assert same_bits(published(whole), published(last))
    assert same_bits(state_bits(whole.run.workdir), state_bits(last.run.workdir))
    assert whole.losses == first.losses + second.losses + last.losses
    assert whole.learning_rates == first.learning_rates + second.learning_rates + last.learning_rates
    assert whole.report()["history"]["step"] == last.report()["history"]["step"] == list(range(1, 11))
    assert whole.report()["history"]["loss"] == last.report()["history"]["loss"]


def published(trained: Trained) -> Tensors:
    """Every tensor of every published file."""
    folder = trained.run.export_folder
    return {
        f"{path.relative_to(folder)} {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_resuming_a_resumed_run_equals_an_undisturbed_one(bench: Bench) -> None:
    spec, data = demanding_spec(), (demanding_concept(bench.folder),)
    whole = bench.train(spec, data, "whole")
    yielded(bench, spec, 3)
    second = yielded(bench, spec, 2)
    assert second.outcome.step == 5
    last = bench.train(spec, data)
    assert len(last.losses) == 5
    assert same_bits(whole.weights(), last.weights())


def test_a_run_resumes_from_a_folder_it_is_given(bench: Bench) -> None:
    spec, data = demanding_spec(), (demanding_concept(bench.folder),)
    whole = bench.train(spec, data, "whole")
    folder = yielded(bench, spec, 4).outcome.checkpoint
    elsewhere = bench.train(spec, data, "elsewhere", resume_from=folder)
    assert len(elsewhere.losses) == 6
    assert same_bits(whole.weights(), elsewhere.weights())


def test_checkpoints_and_watching_change_no_weight(bench: Bench) -> None:
    data = (demanding_concept(bench.folder),)
    plain = bench.train(demanding_spec(), data, "plain")
    often = bench.train(demanding_spec(), data, "often", checkpoint_interval_s=0.0)
    assert len(often.recorder.saved) >= 1
    assert same_bits(plain.weights(), often.weights())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with open_nursery() as opened:
        yield opened


@pytest.mark.parametrize(("scenario", "seed"), [(name, seed) for seed, name in enumerate(SCENARIOS, start=1)])
def test_a_training_killed_at_random_moments_ends_with_the_bits_of_an_undisturbed_one(
    scenario: str, seed: int, nursery: Nursery, tiny_model_dir: Path, tmp_path: Path
) -> None:
    place = Place(nursery, scenario, tiny_model_dir, tmp_path)
    campaign = disturbed(place, undisturbed(place), seed, kills=4)
    assert campaign.differences == []
    assert sorted(death.kill.phase for death in campaign.deaths) == sorted(PHASES)


@pytest.mark.parametrize("file", [checkpoints.WEIGHTS, checkpoints.STATE, checkpoints.MANIFEST])
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    file: str, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    spec, data = demanding_spec(ema_decay=0.9), (demanding_concept(bench.folder),)
    whole = bench.train(spec, data, "whole", Recorder(ask={9: Request.CHECKPOINT}))
    yielded(bench, spec, 3)
    damaged = yielded(bench, spec, 2).outcome.checkpoint
    assert damaged is not None
    content = (damaged / file).read_bytes()
    (damaged / file).write_bytes(content[: len(content) // 2])
    last = bench.train(spec, data, recorder=Recorder(ask={6: Request.CHECKPOINT}))
    assert len(last.losses) == 7
    assert "checkpoint passed over" in caplog.text
    assert same_bits(whole.weights(), last.weights())
    assert same_bits(state_bits(whole.run.workdir), state_bits(last.run.workdir))


def published_state(trained: Trained, folder: Path) -> Path:
    """The published state, unpacked as the worker hands it to another training."""
    with zipfile.ZipFile(trained.run.export_folder / trained.outcome.other_formats["checkpoint"]) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize("method", ["full", "LoRA"])
def test_save_optimizer_publishes_a_state_that_another_training_goes_on_from(
    method: str, bench: Bench
) -> None:
    data = (demanding_concept(bench.folder),)
    changes = {**EVERYTHING[method], "ema_decay": 0.9, "lr_scheduler": pb.LEARNING_RATE_SCHEDULE_CONSTANT}
    plain = bench.train(demanding_spec(max_train_steps=4, **changes), data, "plain")
    first = bench.train(demanding_spec(max_train_steps=4, save_optimizer=True, **changes), data, "first")
    assert "checkpoint" not in plain.outcome.other_formats
    assert same_bits(published(plain), published(first)), "being published changes no weight"
    state = published_state(first, bench.folder / "state")
    longer = demanding_spec(max_train_steps=9, **changes)
    whole = bench.train(longer, data, "whole", Recorder(ask={8: Request.CHECKPOINT}))
    second = bench.train(longer, data, "second", Recorder(ask={4: Request.CHECKPOINT}), start_from=state)
    assert second.losses == whole.losses[4:]
    assert second.learning_rates == whole.learning_rates[4:]
    assert same_bits(published(whole), published(second))
    assert same_bits(state_bits(whole.run.workdir), state_bits(second.run.workdir))
    assert not [warning for warning in second.outcome.warnings if "checkpoint" in warning]


def test_a_training_with_other_settings_begins_with_the_weights_of_a_published_state(bench: Bench) -> None:
    data = (demanding_concept(bench.folder),)
    first = bench.train(demanding_spec(max_train_steps=3, save_optimizer=True), data, "first")
    state = published_state(first, bench.folder / "state")
    frozen = demanding_spec(max_train_steps=2, learning_rate=1e-12, ema_decay=0.5)
    second = bench.train(frozen, data, "second", start_from=state)
    assert len(second.losses) == 2, "the counters begin anew"
    assert largest_difference(second.weights(), first.weights()) < 1e-7
    [remark] = [warning for warning in second.outcome.warnings if "only the weights" in warning]
    assert "emaDecay, learningRate" in remark


def test_a_runs_own_checkpoint_comes_before_the_state_it_started_from(bench: Bench) -> None:
    data, spec = (demanding_concept(bench.folder),), demanding_spec(max_train_steps=6)
    first = bench.train(demanding_spec(max_train_steps=2, save_optimizer=True), data, "first")
    state = published_state(first, bench.folder / "state")
    yielded(bench, spec, 2, start_from=state)
    last = bench.train(spec, data, start_from=state)
    assert [update.step for update in last.recorder.updates] == [5, 6]


@pytest.mark.parametrize(
    ("file", "content"),
    [(checkpoints.WEIGHTS, b"x"), (checkpoints.MANIFEST, b"{}")],
    ids=["damaged", "without a manifest"],
)
def test_a_published_state_that_cannot_be_used_is_the_callers_fault(
    file: str, content: bytes, bench: Bench
) -> None:
    first = bench.train(demanding_spec(max_train_steps=1, save_optimizer=True), name="first")
    state = published_state(first, bench.folder / "state")
    (state / file).write_bytes(content)
    with pytest.raises(BadInput, match="resume_checkpoint_url: the given checkpoint cannot be used"):
        bench.train(demanding_spec(max_train_steps=2), name="second", start_from=state)


def test_a_published_state_that_says_something_else_than_ours_is_the_callers_fault(bench: Bench) -> None:
    first = bench.train(demanding_spec(max_train_steps=1, save_optimizer=True), name="first")
    state = published_state(first, bench.folder / "state")
    found = checkpoints.read(state)
    forged = replace(found, state={**found.state, "counters": {"planned": 1, "no such counter": 2}})
    folder = checkpoints.write(bench.folder / "forged", forged)
    with pytest.raises(BadInput, match="no such counter"):
        bench.train(demanding_spec(max_train_steps=2), name="second", start_from=folder)


def test_a_published_state_of_other_parts_is_refused(bench: Bench) -> None:
    first = bench.train(demanding_spec(max_train_steps=1, save_optimizer=True), name="first")
    state = published_state(first, bench.folder / "state")
    with pytest.raises(BadInput, match="weights are not those of this model"):
        bench.train(demanding_spec(train_text_encoder=False), name="second", start_from=state)


def spec_change(
    **changes: Any,
) -> Callable[[Bench], tuple[pb.TrainingSpec, tuple[Concept, ...], dict[str, Any]]]:
    def change(bench: Bench) -> tuple[pb.TrainingSpec, tuple[Concept, ...], dict[str, Any]]:
        return demanding_spec(**changes), (demanding_concept(bench.folder),), {}

    return change


def other_data(bench: Bench) -> tuple[pb.TrainingSpec, tuple[Concept, ...], dict[str, Any]]:
    concept = make_concept(bench.folder / "other", instances=3, classes=6, size=(40, 16))
    return demanding_spec(), (concept,), {}


def other_model(bench: Bench) -> tuple[pb.TrainingSpec, tuple[Concept, ...], dict[str, Any]]:
    return demanding_spec(), (demanding_concept(bench.folder),), {"model_digest": "another"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (spec_change(seed=8), "seed"),
        (spec_change(learning_rate=2e-3), "learningRate"),
        (spec_change(optimizer_precision=EIGHT), "execution"),
        (spec_change(ema_decay=0.5), "emaDecay"),
        (spec_change(**EVERYTHING["LoRA"]), "lora, method"),
        (other_data, "data"),
        (other_model, "model"),
    ],
    ids=["seed", "learning rate", "optimizer", "average", "method", "data", "model"],
)
def test_a_checkpoint_of_another_run_is_refused(change: Any, named: str, bench: Bench) -> None:
    yielded(bench, demanding_spec(), 2)
    spec, data, changes = change(bench)
    with pytest.raises(CheckpointMismatch, match=named):
        bench.train(spec, data, **changes)


def test_more_steps_may_be_asked_for_and_the_decay_keeps_its_length(bench: Bench) -> None:
    whole = bench.train(demanding_spec(), (demanding_concept(bench.folder),), "whole")
    yielded(bench, demanding_spec(), 4)
    longer = bench.train(demanding_spec(max_train_steps=12), (demanding_concept(bench.folder),))
    assert longer.learning_rates[:6] == whole.learning_rates[4:]
    assert longer.learning_rates[6:] == [0.0, 0.0]


def test_stop_ends_at_once_and_delivers_nothing(bench: Bench) -> None:
    trained = bench.train(complete_spec(max_train_steps=50), recorder=Recorder(ask={2: Request.STOP}))
    assert trained.outcome.ending is Ending.STOPPED
    assert trained.outcome.files == ()
    assert len(trained.losses) == 2


def test_checkpoints_never_take_more_than_their_share_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    pace = Pace(10.0)

    def due_at(seconds: float) -> bool:
        clock[0] = seconds
        return pace.checkpoint_is_due

    assert (due_at(9.9), due_at(10.0)) == (False, True)
    with pace.checkpoint():
        clock[0] += 1.0
    # One second of writing needs fifty of training.
    assert (due_at(11.0 + 49.9), due_at(11.0 + 50.0)) == (False, True)


class Poison:
    """Makes the errors of some updates NaN, as a picture or a kernel gone wrong would."""

    def __init__(self, *updates: int) -> None:
        self.calls = 0
        self._updates = updates

    def __call__(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        errors = per_sample_mse(prediction, target)
        poisoned = self.calls in self._updates
        self.calls += 1
        return errors * torch.nan if poisoned else errors


def test_a_single_update_that_is_not_finite_is_left_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(updates, "per_sample_mse", Poison(2))
    poisoned = bench.train(complete_spec(max_train_steps=5), name="poisoned")
    monkeypatch.undo()
    # The same run whose third update computes everything and then does not touch the weights.
    real, calls = torch.optim.AdamW.step, []

    def step_but_for_the_third(self: torch.optim.AdamW, *arguments: Any) -> Any:
        calls.append(1)
        return None if len(calls) == 3 else real(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_but_for_the_third)
    without = bench.train(complete_spec(max_train_steps=5), name="without")
    assert poisoned.outcome.ending is Ending.TRAINED
    assert poisoned.report()["skipped_updates"] == 1
    assert same_bits(poisoned.weights(), without.weights())
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.message == "update left out: it is not finite"
    assert record.__dict__["update"] == 2


def test_three_updates_in_a_row_end_the_run_with_the_last_good_checkpoint(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = bench.train(complete_spec(max_train_steps=4), name="good")
    monkeypatch.setattr(updates, "per_sample_mse", Poison(6, 7, 8))
    recorder = Recorder(ask={4: Request.CHECKPOINT})
    diverged = bench.train(complete_spec(max_train_steps=50), name="diverged", recorder=recorder)
    assert diverged.outcome.ending is Ending.DIVERGED
    assert diverged.outcome.step == 4
    assert same_bits(good.weights(), diverged.weights())
    assert "diverged" in diverged.outcome.warnings[-1]
    assert diverged.report()["ending"] == "diverged"


def test_a_run_that_is_never_finite_delivers_the_base_weights(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "per_sample_mse", Poison(*range(100)))
    diverged = bench.train(complete_spec(max_train_steps=50))
    assert diverged.outcome.ending is Ending.DIVERGED
    assert len(diverged.losses) == 2
    assert same_bits(diverged.weights(), base_weights(bench.model_folder))


def test_one_percent_of_the_last_200_is_divergence_too() -> None:
    counters = Counters(planned=1)
    for update in range(600):
        counters.note(1.0, finite=update not in (150, 350, 549), samples=1)
        assert counters.diverged == (update == 549), "150 and 350 are one too far apart, 350 and 549 are not"


@pytest.mark.parametrize("ask", [Request.NOTHING, Request.CHECKPOINT, Request.YIELD])
def test_weights_that_are_not_finite_are_never_checkpointed_or_published(
    ask: Request, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.optim.AdamW.step

    def spoil(self: torch.optim.AdamW, *arguments: Any) -> None:
        real(self, *arguments)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] = torch.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    recorder = Recorder(ask={1: ask})
    trained = bench.train(complete_spec(max_train_steps=2), recorder=recorder, checkpoint_interval_s=0.0)
    assert trained.outcome.ending is Ending.DIVERGED
    assert trained.outcome.files == ()
    assert trained.recorder.saved == []


def test_float16_overflows_repeat_the_update_with_a_smaller_scale(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(1)
    monkeypatch.setattr(updates, "per_sample_mse", poison)
    recorder = Recorder(ask={3: Request.CHECKPOINT})
    spec = complete_spec(mixed_precision=pb.MIXED_PRECISION_FP16, max_train_steps=4)
    trained = bench.train(spec, recorder=recorder)
    assert trained.outcome.ending is Ending.TRAINED
    assert poison.calls == 5
    in_float32 = bench.train(complete_spec(max_train_steps=4), name="float32")
    norms = [[update.gradient_norm for update in run.recorder.updates] for run in (trained, in_float32)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05), "measured and clipped after the scale is taken out"
    assert trained.report()["skipped_updates"] == 0
    stored = checkpoints.read_newest(trained.run.checkpoint_folder)
    assert stored is not None
    assert stored.state["scaler"]["scale"] == 2.0**15


def test_float16_that_never_fits_diverges(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "per_sample_mse", Poison(*range(100)))
    spec = complete_spec(mixed_precision=pb.MIXED_PRECISION_FP16, max_train_steps=4)
    assert bench.train(spec).outcome.ending is Ending.DIVERGED


def test_float16_runs_resume_with_their_scale(bench: Bench) -> None:
    spec = demanding_spec(mixed_precision=pb.MIXED_PRECISION_FP16, max_train_steps=4)
    data = (demanding_concept(bench.folder),)
    whole = bench.train(spec, data, "whole")
    yielded(bench, spec, 2)
    assert same_bits(whole.weights(), bench.train(spec, data).weights())


def test_the_run_describes_itself(bench: Bench) -> None:
    run = bench.run(complete_spec())
    assert run.checkpoint_folder.parent == run.export_folder.parent == run.workdir
    assert replace(run, model_digest="x").model_digest == "x"
