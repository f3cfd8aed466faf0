"""The objective against an independent float64 reference, values and gradients."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import DDPMScheduler

from services.diffusion.loading import Components, load_components
from services.domain.errors import BadInput, InvalidSpec
from services.trainer.losses import (
    NoiseSchedule,
    add_noise,
    min_snr_weights,
    per_sample_mse,
    shared_loss,
    training_target,
    update_shares,
)
from tests.unit.trainer.harness import Bench

BETA_START, BETA_END, STEPS = 0.00085, 0.012, 1000


def reference_alphas() -> list[float]:
    """abar_t of the scaled-linear schedule in plain Python floats."""
    product, alphas = 1.0, []
    for index in range(STEPS):
        root = BETA_START**0.5 + (BETA_END**0.5 - BETA_START**0.5) * index / (STEPS - 1)
        product *= 1.0 - root * root
        alphas.append(product)
    return alphas


@dataclass(frozen=True)
class Samples:
    z0: torch.Tensor
    e: torch.Tensor
    t: torch.Tensor
    ids: torch.Tensor


def draw_samples(components: Components, count: int) -> Samples:
    generator = torch.Generator().manual_seed(3)
    shape = (count, components.latent_channels, 8, 8)
    return Samples(
        z0=torch.randn(shape, generator=generator),
        e=torch.randn(shape, generator=generator),
        t=torch.randint(0, STEPS, (count,), generator=generator),
        ids=torch.randint(3, 400, (count, 9), generator=generator),
    )


def schedule_of(prediction_type: str) -> NoiseSchedule:
    return NoiseSchedule(torch.tensor(reference_alphas(), dtype=torch.float32), prediction_type)


def reference_gradients(
    model: Components,
    samples: Samples,
    prediction_type: str,
    num_instance: int,
    prior_loss_weight: float,
    gamma: float = 0.0,
) -> tuple[float, dict[str, torch.Tensor]]:
    """The update's loss and gradients in float64, every formula written out again, one sample at a time."""
    unet, text_encoder = model.unet.double(), model.text_encoder.double()
    unet.zero_grad(set_to_none=True)
    text_encoder.zero_grad(set_to_none=True)
    alphas = reference_alphas()
    total = torch.zeros((), dtype=torch.float64)
    num_class = len(samples.t) - num_instance
    for index in range(len(samples.t)):
        alpha = alphas[int(samples.t[index])]
        z0, e = samples.z0[index].double(), samples.e[index].double()
        zt = alpha**0.5 * z0 + (1 - alpha) ** 0.5 * e
        c = text_encoder(samples.ids[index][None]).last_hidden_state
        answer = unet(zt[None], samples.t[index][None], encoder_hidden_states=c).sample[0]
        target = e if prediction_type == "epsilon" else alpha**0.5 * e - (1 - alpha) ** 0.5 * z0
        error = ((answer - target) ** 2).sum() / target.numel()
        weight = 1.0 / num_instance if index < num_instance else prior_loss_weight / num_class
        if gamma:
            snr = alpha / (1 - alpha)
            weight *= min(snr, gamma) / (snr if prediction_type == "epsilon" else snr + 1)
        total = total + weight * error
    total.backward()  # type: ignore[no-untyped-call]
    named = [*unet.named_parameters(), *text_encoder.named_parameters()]
    return float(total.detach()), {name: p.grad.clone() for name, p in named if p.grad is not None}


def our_gradients(
    model: Components,
    samples: Samples,
    schedule: NoiseSchedule,
    num_instance: int,
    prior_loss_weight: float,
    gamma: float = 0.0,
) -> tuple[float, dict[str, torch.Tensor]]:
    """The same through the functions under test, in float32, as two micro-steps of one update."""
    total, half_instance = 0.0, num_instance // 2
    num_class = len(samples.t) - num_instance
    parts = [
        [*range(half_instance), *range(num_instance, num_instance + 1)],
        [*range(half_instance, num_instance), *range(num_instance + 1, len(samples.t))],
    ]
    for part, instances in zip(parts, (half_instance, num_instance - half_instance), strict=True):
        z0, e, t = samples.z0[part], samples.e[part], samples.t[part]
        c = model.text_encoder(samples.ids[part]).last_hidden_state
        answer = model.unet(add_noise(schedule, z0, e, t), t, encoder_hidden_states=c).sample
        shares = update_shares(
            min_snr_weights(schedule, t, gamma),
            num_instance=instances,
            instance_total=num_instance,
            class_total=num_class,
            prior_loss_weight=prior_loss_weight,
        )
        loss = shared_loss(per_sample_mse(answer, training_target(schedule, z0, e, t)), shares)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    named = [*model.unet.named_parameters(), *model.text_encoder.named_parameters()]
    return total, {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("gamma", [0.0, 5.0], ids=["plain", "min-SNR"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_and_gradients_equal_the_float64_reference(
    prediction_type: str, gamma: float, bench: Bench
) -> None:
    samples = draw_samples(load_components(bench.model_folder), 5)
    ours, gradients = our_gradients(
        load_components(bench.model_folder), samples, schedule_of(prediction_type), 3, 0.7, gamma
    )
    expected, reference = reference_gradients(
        load_components(bench.model_folder), samples, prediction_type, 3, 0.7, gamma
    )
    assert ours == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == reference.keys()
    scale = max(float(gradient.abs().max()) for gradient in reference.values())
    for name, gradient in reference.items():
        torch.testing.assert_close(gradients[name].double(), gradient, atol=1e-5 * scale, rtol=1e-5, msg=name)


def test_the_library_scheduler_agrees_with_the_reference_alphas() -> None:
    config = {"beta_schedule": "scaled_linear", "beta_start": BETA_START, "beta_end": BETA_END}
    ours = DDPMScheduler.from_config(config).alphas_cumprod.double()
    torch.testing.assert_close(
        ours, torch.tensor(reference_alphas(), dtype=torch.float64), atol=1e-6, rtol=1e-5
    )


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(BadInput, match="'sample'"):
        schedule_of("sample")


def test_errors_are_computed_in_float32_whatever_comes_in() -> None:
    prediction, target = torch.full((2, 3, 4, 4), 300.0), torch.zeros(2, 3, 4, 4)
    # 300 squared is beyond float16, so this is infinite unless the arithmetic is widened first.
    errors = per_sample_mse(prediction.half(), target.half())
    assert errors.dtype is torch.float32
    assert errors.tolist() == [90000.0, 90000.0]


def test_the_two_means_do_not_mix() -> None:
    errors = torch.tensor([1.0, 3.0, 10.0])
    shares = update_shares(
        torch.ones(3), num_instance=2, instance_total=2, class_total=1, prior_loss_weight=0.5
    )
    assert float(shared_loss(errors, shares)) == pytest.approx(2.0 + 5.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_formula_of_the_prediction_type(prediction_type: str) -> None:
    t, alphas = [0, 300, 500, 999], reference_alphas()
    weights = min_snr_weights(schedule_of(prediction_type), torch.tensor(t), 5.0)
    expected = []
    for index in t:
        snr = alphas[index] / (1 - alphas[index])
        expected.append(min(snr, 5.0) / (snr + (prediction_type == "v_prediction")))
    assert weights.dtype is torch.float32
    assert weights.tolist() == pytest.approx(expected, rel=1e-3)
    assert weights[0] < 0.01, "hardly any noise: a sample that teaches next to nothing"
    assert (weights[-1] == 1.0) == (prediction_type == "epsilon")


def test_a_zero_terminal_snr_schedule_ends_without_signal_and_keeps_its_beginning() -> None:
    plain = schedule_of("v_prediction")
    stretched = plain.with_zero_terminal_snr()
    ours, before = stretched.alphas_cumprod, plain.alphas_cumprod
    assert float(ours[-1]) == 0.0
    assert float(ours[0]) == pytest.approx(float(before[0]), rel=1e-6)
    library = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=BETA_START,
        beta_end=BETA_END,
        rescale_betas_zero_snr=True,
    )
    torch.testing.assert_close(ours[:-1], library.alphas_cumprod[:-1], atol=1e-5, rtol=1e-3)
    target = training_target(stretched, torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.tensor([999]))
    assert float(target.max()) == -1.0, "at the end the velocity is the clean latent, negative"


def test_a_zero_terminal_snr_schedule_needs_velocities() -> None:
    with pytest.raises(InvalidSpec, match="zero_terminal_snr: needs a base model with v-prediction"):
        schedule_of("epsilon").with_zero_terminal_snr()
