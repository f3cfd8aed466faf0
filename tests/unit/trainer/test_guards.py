"""Remarks on trainings that learn too fast: given when they should be, and never more than remarks."""

from collections.abc import Callable

import pytest
import torch

from services.diffusion.lora import LoraShape, attach
from services.domain.errors import BadInput
from services.trainer import counters as counters_module
from services.trainer import updates
from services.trainer.counters import Counters
from services.trainer.data import Encoder
from services.trainer.guards import SAMPLED_ELEMENTS, AdapterWatch, WeightWatch, is_spike, remarks
from services.trainer.recipes import dreambooth
from services.trainer.run import Ending
from tests.unit.trainer.harness import Bench, complete_spec, same_bits

CALM = {"learning_rate": 1e-6, "max_train_steps": 2}


def test_a_loss_is_a_spike_above_five_times_the_median_of_the_last_hundred() -> None:
    recent = [9.0] * 50 + [0.5] * 49 + [1.0] * 2 + [2.0] * 49
    assert not is_spike(5.0, recent)
    assert is_spike(5.1, recent)


def test_a_short_run_has_no_median_to_compare_with() -> None:
    assert not is_spike(1e9, [1.0] * 99)
    assert is_spike(1e9, [1.0] * 100)


def watched(**sizes: tuple[int, ...]) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return {
        name.replace("__", "."): torch.nn.Parameter(torch.randn(size, generator=generator))
        for name, size in sizes.items()
    }


def scale(parameter: torch.nn.Parameter, factor: float) -> None:
    with torch.no_grad():
        parameter.mul_(factor)


def test_the_change_since_the_mark_is_relative_to_all_weights() -> None:
    parameters = watched(a__weight=(300, 300), b__weight=(20, 30))
    watch = WeightWatch(parameters)
    scale(parameters["a.weight"], 3.0)
    watch.mark()
    for parameter in parameters.values():
        scale(parameter, 1.02)
    assert watch.change() == pytest.approx(0.02, rel=1e-4)


def test_a_sampled_tensor_weighs_as_much_as_a_whole_one_of_its_size() -> None:
    parameters = watched(large__weight=(1000, 1000), small__weight=(10, SAMPLED_ELEMENTS // 10))
    watch = WeightWatch(parameters)
    norms = {name: float(parameter.detach().norm()) for name, parameter in parameters.items()}
    scale(parameters["small.weight"], 2.0)
    expected = norms["small.weight"] / (norms["small.weight"] ** 2 + norms["large.weight"] ** 2) ** 0.5
    assert watch.change() == pytest.approx(expected, rel=0.1)


def test_drift_names_the_layer_that_moved_farthest_and_does_not_forget_at_a_mark() -> None:
    parameters = watched(a__weight=(30, 30), a__bias=(4,), b__weight=(20, 30))
    watch = WeightWatch(parameters)
    scale(parameters["b.weight"], 1.4)
    watch.mark()
    # A bias is small beside its layer's weight, so even a tenfold one is no collapse.
    scale(parameters["a.bias"], 3.0)
    layer, drift = watch.drift()
    assert layer == "b"
    assert drift == pytest.approx(0.4, rel=1e-4)


def test_a_layer_of_zeros_and_a_model_without_weights_are_no_error() -> None:
    assert WeightWatch({"a.weight": torch.nn.Parameter(torch.zeros(3))}).change() == 0.0
    assert WeightWatch({}).drift() == ("", 0.0)


def test_remarks_are_made_beyond_the_limits_only() -> None:
    assert remarks(0, 0.01, ("a", 0.5)) == []
    spikes, change, drift = remarks(3, 0.011, ("unet.conv_in", 0.51))
    assert "3 updates" in spikes
    assert "1.1%" in change
    assert "unet.conv_in moved by 51%" in drift


def test_an_adapters_moves_are_those_of_the_merged_weights() -> None:
    linear = torch.nn.Linear(30, 20, bias=False)
    layer = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"fc1": linear})})
    model = torch.nn.ModuleDict({"encoder": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})})
    generator = torch.Generator().manual_seed(3)
    adapter = attach(
        model,
        LoraShape(rank=4, alpha=2.0),
        part="text_encoder",
        initial=lambda name, shape: torch.randn(shape, generator=generator),
    )
    watch = AdapterWatch({"text_encoder": (adapter, model)})
    (name,) = adapter.modules
    size = float(linear.weight.detach().norm())
    assert watch.drift() == (name, 0.0)
    before = torch.zeros(20, 30)
    for _ in range(2):
        watch.mark()
        with torch.no_grad():
            for parameter in adapter.parameters().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        now = adapter.merged_delta(name)
        assert watch.change() == pytest.approx(float((now - before).norm()) / size, rel=1e-4)
        assert watch.drift()[1] == pytest.approx(float(now.norm()) / size, rel=1e-4)
        before = now.clone()


def test_a_calm_training_is_not_remarked_upon(bench: Bench) -> None:
    assert bench.train(complete_spec(**CALM)).outcome.warnings == ()


def test_a_rate_that_is_far_too_high_is_remarked_upon(bench: Bench) -> None:
    warnings = bench.train(complete_spec(learning_rate=0.2, max_train_steps=1)).outcome.warnings
    assert "the learning rate is probably too high" in warnings[0]
    assert "may have collapsed" in warnings[1]


def test_a_loss_spike_is_counted_through_an_interruption() -> None:
    counters = Counters(planned=1)
    for update in range(150):
        counters.note(100.0 if update in (99, 120, 149) else 1.0, finite=True, samples=1)
    counters = Counters(**counters.as_json())
    counters.note(100.0, finite=True, samples=1)
    assert counters.spikes == 3, "the one before there were a hundred losses does not count"
    assert counters.final_loss == pytest.approx((47 + 300) / 50)


def test_watching_the_weights_changes_none(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seldom = bench.train(complete_spec(), name="seldom")
    monkeypatch.setattr(updates, "WATCHED_EVERY", 1)
    always = bench.train(complete_spec(), name="always")
    assert same_bits(seldom.weights(), always.weights())


def broken_for(*shades: int) -> Callable[..., Encoder]:
    """Makes encoders that fail for pictures by their blue value; those of `make_concept` are 10, 50 and 90."""

    def encode(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shade = round((float(values[2, 0, 0]) + 1) * 127.5)
        mean = torch.full((4, 8, 8), torch.nan if shade in shades else 0.0)
        return mean, torch.ones(4, 8, 8)

    return lambda *arguments: encode


def test_pictures_that_cannot_be_encoded_are_left_out_and_named_and_no_sign_of_divergence(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dreambooth, "posterior_encoder", broken_for(10))
    monkeypatch.setattr(counters_module, "WINDOW", 6)
    trained = bench.train(complete_spec(learning_rate=1e-6, max_train_steps=9))
    assert trained.outcome.ending is Ending.TRAINED
    assert trained.outcome.step == 9
    assert trained.report()["skipped_updates"] == 3
    assert trained.outcome.warnings == ("left out, it cannot be encoded: 0/instance/0",)


def test_a_training_none_of_whose_pictures_can_be_encoded_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dreambooth, "posterior_encoder", broken_for(10, 50, 90))
    with pytest.raises(BadInput, match="none of the pictures"):
        bench.train(complete_spec(**CALM, train_batch_size=3))
