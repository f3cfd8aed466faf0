"""The series in a run's report: bounded, and its means are those of the updates."""

import json
import math

import pytest
import torch

from services.trainer.history import LIMIT, History, Point, StageTimes, finite_or_none, peak_memory_bytes
from tests.unit.trainer.harness import Bench, complete_spec


def point(step: int, loss: float | None = None) -> Point:
    return Point(step, float(step) if loss is None else loss, 1e-6 * step, 2.0, 4.0, 1000 + step)


@pytest.mark.parametrize("updates", [1, 255, 256, 257, 512, 5000])
def test_a_series_never_has_more_points_than_its_limit_and_reaches_to_the_end(updates: int) -> None:
    history = History()
    for step in range(1, updates + 1):
        history.note(point(step))
    columns = history.as_json()
    steps = columns["step"]
    assert LIMIT / 2 <= len(steps) <= LIMIT or len(steps) == updates
    assert steps == sorted(steps)
    assert steps[-1] == updates
    assert columns["learning_rate"][-1] == pytest.approx(1e-6 * updates)
    assert columns["memory_bytes"][-1] == 1000 + updates


def test_a_point_is_the_mean_of_its_updates() -> None:
    history = History()
    for step in range(1, 2 * LIMIT + 2):
        history.note(point(step))
    columns = history.as_json()
    # 513 updates: points of four, the last one of a single update.
    assert columns["step"][:2] == [4, 8]
    assert columns["loss"][:2] == [2.5, 6.5]
    assert columns["loss"][-1] == 513


def test_what_was_not_finite_counts_for_no_mean() -> None:
    history = History()
    for step in range(1, LIMIT + 1):
        history.note(Point(step, finite_or_none(math.nan if step == 2 else 5.0), 1.0, None, 1.0, 1))
    assert history.as_json()["loss"][0] == 5.0
    assert set(history.as_json()["gradient_norm"]) == {None}


def test_a_series_goes_on_from_its_state_as_if_nothing_had_happened() -> None:
    whole, first = History(), History()
    for step in range(1, 700):
        whole.note(point(step))
        if step <= 401:
            first.note(point(step))
    second = History.restored(json.loads(json.dumps(first.state())))
    for step in range(402, 700):
        second.note(point(step))
    assert second.as_json() == whole.as_json()


def test_the_report_of_a_run_holds_its_numbers(bench: Bench) -> None:
    trained = bench.train(complete_spec(max_train_steps=4))
    report = trained.report()
    history = report["history"]
    assert history["step"] == [1, 2, 3, 4]
    assert history["loss"] == trained.losses
    assert history["learning_rate"] == trained.learning_rates
    assert history["gradient_norm"] == [update.gradient_norm for update in trained.recorder.updates]
    assert all(speed > 0 for speed in history["images_per_second"])
    assert history["memory_bytes"][-1] > 100 * 2**20, "a process with these libraries is larger"
    assert set(report["stages_s"]) >= {"loading", "pictures", "updates", "exporting"}
    assert all(seconds > 0 for seconds in report["stages_s"].values())


def test_stage_times_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    times = StageTimes()
    for _ in range(2):
        with times.of("loading"):
            pass
    assert times.seconds == {"loading": 5.0}


def test_memory_of_a_cpu_is_that_of_the_process() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(300 * 2**20, dtype=torch.uint8)
    assert peak_memory_bytes(torch.device("cpu")) >= before
    assert held.nbytes < peak_memory_bytes(torch.device("cpu")) < 64 * 2**30
