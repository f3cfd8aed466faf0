"""Models of a training that goes on: when they are begun, what they are, and that the training does not feel them."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from likeness.training.v1 import training_job_pb2 as pb

from services.trainer.counters import Counters
from services.trainer.run import Ending, Request
from services.trainer.updates import PUBLISHED_STATE
from services.trainer.versions import publish_version
from tests.unit.trainer.harness import (
    Bench,
    Recorder,
    Trained,
    captioned_spec,
    complete_spec,
    exported_weights,
    pictures_of,
    same_bits,
)

ALWAYS = 1e-9
"""Minutes that each update takes longer than."""
LORA = {"method": pb.TRAINING_METHOD_LORA, "lora": pb.LoraSettings(rank=2, alpha=2, dropout=0.5)}


@dataclass
class Keeping(Recorder):
    """Takes each version's checkpoint away before the training removes it, as its parent process does."""

    kept: Path = Path()

    def version_saved(self, folder: Path, step: int) -> None:
        super().version_saved(Path(shutil.copytree(folder, self.kept / folder.name)), step)


def train(bench: Bench, recipe: int, steps: int, name: str, **values: Any) -> Trained:
    recorder = Keeping(kept=bench.folder / f"{name}-versions")
    changes = {"max_train_steps": steps, "save_full_precision": True, **values}
    if recipe == pb.RECIPE_EVERYDREAM:
        data = pictures_of(bench.folder / "captioned")
        return bench.train(captioned_spec(**changes), (), name, recorder, captioned=data)
    return bench.train(complete_spec(**changes), name=name, recorder=recorder)


@pytest.mark.parametrize(
    ("recipe", "values"),
    [(pb.RECIPE_DREAMBOOTH, {"ema_decay": 0.5, "save_optimizer": True}), (pb.RECIPE_EVERYDREAM, LORA)],
    ids=["dreambooth averaged", "everydream lora"],
)
def test_publish_every_minutes_makes_models_of_unfinished_weights_and_changes_none(
    recipe: int, values: Mapping[str, Any], bench: Bench
) -> None:
    plain = train(bench, recipe, 4, "plain", publish_every_minutes=60, **values)
    versioned = train(bench, recipe, 4, "versioned", publish_every_minutes=ALWAYS, **values)
    assert plain.recorder.versions == []
    folder, step = versioned.recorder.versions[0]
    assert step == 1
    assert versioned.recorder.versions[-1][1] < 4, "after the last update the model itself is published"
    assert same_bits(plain.weights(), versioned.weights())
    assert plain.losses == versioned.losses

    beside = Recorder()
    run = replace(versioned.run, workdir=bench.folder / "beside")
    version = publish_version(run, folder, beside)
    short = train(bench, recipe, step, "short", **values)
    assert same_bits(exported_weights(run.export_folder), short.weights())
    assert set(version.files) == set(short.outcome.files)
    assert version.other_formats == short.outcome.other_formats
    assert (PUBLISHED_STATE in version.other_formats) == bool(values.get("save_optimizer"))
    assert (version.step, version.ending, version.final_loss) == (step, Ending.TRAINED, short.losses[0])
    assert [stage.value for stage in beside.stages] == ["exporting"]


def test_versions_are_begun_whenever_so_many_minutes_of_training_have_passed() -> None:
    counters, begun = Counters(planned=100), []
    for _ in range(100):
        counters.note(0.5, finite=True, samples=1)
        counters.elapsed_s += 25.0
        if counters.version_is_due(2.0):
            counters.note_version()
            begun.append(counters.update)
            counters = Counters(**counters.as_json())
    assert begun == list(range(5, 101, 5)), "125 s are the first whole updates that are 2 minutes"
    assert not counters.version_is_due(0)


@pytest.mark.parametrize("missing", [False, True], ids=["published", "missing"])
def test_a_version_that_an_interruption_cost_is_begun_at_once_when_the_training_goes_on(
    missing: bool, bench: Bench
) -> None:
    spec = complete_spec(max_train_steps=4, publish_every_minutes=60)
    bench.train(spec, recorder=Recorder(ask={2: Request.YIELD}))
    resumed = bench.train(spec, version_is_missing=missing)
    assert [step for _, step in resumed.recorder.versions] == ([2] if missing else [])
