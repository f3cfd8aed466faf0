"""Learning-rate curves against their formulas, and the optimizer against AdamW's."""

import math

import pytest
import torch

from services.domain.errors import InvalidSpec
from services.trainer.optim import (
    LearningRateSchedule,
    build_adamw,
    clip_jointly,
    peak_learning_rate,
    set_learning_rates,
)

PEAK, W, D = 3e-4, 7, 50
POINTS = [0, 1, W - 1, W, W + 1, 20, 28, D - 1, D, D + 1, 2 * D]


def warmed(after_warmup: float, u: int) -> float:
    return u / W if u < W else after_warmup


def expected_factor(name: str, u: int) -> float:
    """The curves written down independently of the code under test."""
    p = min(1.0, max(0.0, (u - W) / (D - W)))
    end = 1e-7 / PEAK
    after = {
        "constant_with_warmup": 1.0,
        "linear": max(0.0, (D - u) / (D - W)),
        "cosine": (1 + math.cos(math.pi * p)) / 2,
        "cosine_with_restarts": 0.0 if p >= 1 else (1 + math.cos(math.pi * math.fmod(2 * p, 1))) / 2,
        "polynomial": end + (1 - end) * (1 - p),
    }
    return 1.0 if name == "constant" else warmed(after[name], u)


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_each_schedule_is_its_closed_form(name: str) -> None:
    schedule = LearningRateSchedule(name, PEAK, W, D, num_cycles=2)
    for u in POINTS:
        assert schedule.factor(u) == pytest.approx(expected_factor(name, u), abs=1e-12), u
        assert schedule.learning_rate(u) == PEAK * schedule.factor(u)


def test_cosine_stays_at_zero_after_its_end() -> None:
    assert [LearningRateSchedule("cosine", PEAK, 0, D).factor(u) for u in (D, 2 * D, 5 * D)] == [
        0.0,
        0.0,
        0.0,
    ]


def test_one_cycle_of_restarts_is_the_plain_cosine() -> None:
    once, plain = (
        LearningRateSchedule("cosine_with_restarts", PEAK, W, D),
        LearningRateSchedule("cosine", PEAK, W, D),
    )
    assert [once.factor(u) for u in range(D)] == [plain.factor(u) for u in range(D)]


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "constant_with_warmup"])
def test_warm_up_longer_than_the_run_is_all_warm_up(name: str) -> None:
    schedule = LearningRateSchedule(name, PEAK, 100, D)
    assert [schedule.factor(u) for u in (0, 25, 50, 99)] == [0.0, 0.25, 0.5, 0.99]


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="must be one of constant"):
        LearningRateSchedule("exponential", PEAK, 0, D)


def test_polynomial_decay_of_a_tiny_rate_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="must be above"):
        LearningRateSchedule("polynomial", 1e-7, 0, D)


def test_scaling_multiplies_by_batch_accumulation_and_processes() -> None:
    values = {"train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert peak_learning_rate(1e-6, scale_lr=True, **values) == pytest.approx(8e-6)
    assert peak_learning_rate(1e-6, scale_lr=True, processes=3, **values) == pytest.approx(24e-6)
    assert peak_learning_rate(1e-6, scale_lr=False, **values) == 1e-6


def parameter(values: list[float] | torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.as_tensor(values, dtype=torch.float32).clone())


def adamw(group: list[torch.nn.Parameter], *, eight_bit: bool = False) -> torch.optim.Optimizer:
    return build_adamw([group], betas=(0.8, 0.95), epsilon=1e-6, weight_decay=0.1, eight_bit=eight_bit)


def test_adamw_is_its_closed_form_over_three_updates() -> None:
    weights, gradients, lr = parameter([1.0, -2.0]), [[0.5, -1.0], [0.25, 3.0], [-1.5, 0.125]], 0.01
    optimizer = adamw([weights])
    expected = torch.tensor([1.0, -2.0], dtype=torch.float64)
    m = v = torch.zeros(2, dtype=torch.float64)
    for n, values in enumerate(gradients, start=1):
        g = torch.tensor(values, dtype=torch.float64)
        weights.grad = g.float()
        set_learning_rates(optimizer, [lr])
        optimizer.step()
        expected = expected * (1 - lr * 0.1)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        expected = expected - lr * (m / (1 - 0.8**n)) / ((v / (1 - 0.95**n)).sqrt() + 1e-6)
        torch.testing.assert_close(weights.detach().double(), expected, atol=1e-6, rtol=0)


def test_zero_gradients_leave_only_the_scheduled_decay() -> None:
    weights = parameter([2.0, -3.0])
    optimizer, expected = adamw([weights]), torch.tensor([2.0, -3.0], dtype=torch.float64)
    for lr in (0.0, 0.01, 0.02):
        weights.grad = torch.zeros(2)
        set_learning_rates(optimizer, [lr])
        optimizer.step()
        expected = expected * (1 - lr * 0.1)
    torch.testing.assert_close(weights.detach().double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_tensors_without_a_gradient_do_not_decay(eight_bit: bool) -> None:
    trained, idle = parameter(torch.ones(64, 64)), parameter(torch.ones(64, 64))
    optimizer = adamw([trained, idle], eight_bit=eight_bit)
    trained.grad = torch.ones(64, 64)
    set_learning_rates(optimizer, [0.1])
    optimizer.step()
    assert not torch.equal(trained, torch.ones(64, 64))
    assert torch.equal(idle, torch.ones(64, 64))


def test_eight_bit_keeps_small_tensors_in_32_bits_and_large_ones_in_8() -> None:
    large, small = parameter(torch.randn(64, 64)), parameter(torch.randn(64))
    optimizer = adamw([large, small], eight_bit=True)
    large.grad, small.grad = torch.randn(64, 64), torch.randn(64)
    set_learning_rates(optimizer, [1e-3])
    optimizer.step()
    assert optimizer.state[large]["state1"].dtype is torch.uint8
    assert optimizer.state[small]["state1"].dtype is torch.float32


def test_clipping_limits_the_joint_norm_of_both_models() -> None:
    unet, text = parameter([0.0, 0.0]), parameter([0.0])
    unet.grad, text.grad = torch.tensor([30.0, 40.0]), torch.tensor([120.0])
    norm = clip_jointly([unet, text], 1.0)
    assert float(norm) == pytest.approx(130.0)
    clipped = torch.cat([unet.grad, text.grad])
    assert float(clipped.norm()) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(clipped, torch.tensor([30.0, 40.0, 120.0]) / 130, atol=1e-6, rtol=0)


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_clipping_that_is_off_or_wide_changes_nothing(limit: float) -> None:
    weights = parameter([0.0, 0.0])
    weights.grad = torch.tensor([3.0, 4.0])
    assert float(clip_jointly([weights], limit)) == pytest.approx(5.0)
    assert torch.equal(weights.grad, torch.tensor([3.0, 4.0]))
