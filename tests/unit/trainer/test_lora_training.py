"""Training by low-rank adapters: what learns, what stays, and what is published of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from likeness.training.v1 import training_job_pb2 as pb
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel

from services.diffusion.drawing import Drawing, draw_latents
from services.diffusion.loading import load_components
from services.diffusion.lora import LoraWeights, merge
from services.diffusion.lora_files import read_lora
from services.domain.errors import InvalidSpec
from services.trainer import checkpoint as checkpoints
from services.trainer import trained_model
from services.trainer.execution import resolve_execution
from services.trainer.export import assemble
from services.trainer.run import Request
from services.trainer.trained_model import load_trained_model
from tests.unit.trainer.harness import (
    Bench,
    Recorder,
    Trained,
    base_weights,
    complete_spec,
    is_training,
    same_bits,
    spying,
)

LORA, LOCON = pb.TRAINING_METHOD_LORA, pb.TRAINING_METHOD_LOCON
PEFT, KOHYA = Path("lora/pytorch_lora_weights.safetensors"), Path("lora/kohya.safetensors")


def lora_spec(method: int = LORA, *, rank: int = 4, alpha: float = 8.0, **changes: Any) -> pb.TrainingSpec:
    lora = pb.LoraSettings(rank=rank, alpha=alpha, **changes.pop("lora", {}))
    if method == LOCON and not lora.conv_rank:
        lora.conv_rank, lora.conv_alpha = 2, 1.0
    return complete_spec(method=method, lora=lora, **changes)


def published(trained: Trained, path: Path = PEFT) -> LoraWeights:
    return read_lora(trained.run.export_folder / path)


def test_only_the_adapters_learn_and_the_base_keeps_its_bits(bench: Bench) -> None:
    modules: list[torch.nn.Module] = []
    with spying(trained_model, "attach", lambda module, *a, **k: modules.append(module)):
        trained = bench.train(lora_spec())
    base = load_components(bench.model_folder)
    for module, before in zip(modules, (base.unet, base.text_encoder), strict=True):
        assert same_bits(dict(module.state_dict()), dict(before.state_dict()))
        assert all(parameter.grad is None for parameter in module.parameters())
    assert all(float(factors.b.abs().max()) > 0 for factors in published(trained).of("unet").values())
    assert {path.parts[0] for path in trained.outcome.files} == {"unet", "text_encoder", "training.json"}


def test_the_first_forward_is_bitwise_that_of_the_base(bench: Bench) -> None:
    run = bench.run(lora_spec(LOCON))
    model = load_trained_model(run, resolve_execution(run.spec, run.device))
    drawing = Drawing("a photo of sks dog", num_inference_steps=2, width_px=16, height_px=16)
    adapted, plain = (
        draw_latents(model.components, drawing),
        draw_latents(load_components(bench.model_folder), drawing),
    )
    assert torch.equal(adapted, plain)


def test_the_adapters_begin_with_the_jobs_seed(bench: Bench) -> None:
    def beginning(seed: int) -> dict[str, torch.Tensor]:
        run = bench.run(lora_spec(seed=seed))
        model = load_trained_model(run, resolve_execution(run.spec, run.device))
        return {name: parameter.detach() for name, parameter in model.parameters.items()}

    torch.manual_seed(1)
    first = beginning(7)
    torch.manual_seed(2)
    assert same_bits(first, beginning(7))
    assert not same_bits(first, beginning(8))


@pytest.mark.parametrize(
    ("switches", "parts"),
    [
        ({"train_text_encoder": False}, {"unet"}),
        ({"train_unet": False}, {"text_encoder"}),
        ({}, {"unet", "text_encoder"}),
    ],
    ids=["unet", "text encoder", "both"],
)
def test_the_switches_choose_the_parts_that_get_adapters(
    switches: dict[str, bool], parts: set[str], bench: Bench
) -> None:
    trained = bench.train(lora_spec(max_train_steps=1, **switches))
    assert {name.split(".")[0] for name in published(trained).modules} == parts
    assert {path.parts[0] for path in trained.outcome.files[:-1]} == parts


def test_a_text_encoder_without_adapter_encodes_each_prompt_once(bench: Bench) -> None:
    calls: list[int] = []
    with spying(CLIPTextModel, "forward", lambda *a, **k: calls.append(1)):
        bench.train(lora_spec(train_text_encoder=False, max_train_steps=6))
    # Two prompts while training; the drawing that proves the export asks twice more, once with the model read back.
    assert len(calls) == 4


def test_locon_changes_the_3x3_convolutions_too_with_their_own_rank(bench: Bench) -> None:
    plain = published(bench.train(lora_spec(LORA, max_train_steps=1), name="lora"))
    locon = published(bench.train(lora_spec(LOCON, max_train_steps=1), name="locon"))
    wide = {name: factors for name, factors in locon.modules.items() if factors.a.shape[2:] == (3, 3)}
    assert set(plain.modules) == set(locon.modules) - set(wide)
    assert {(factors.rank, factors.alpha) for factors in wide.values()} == {(2, 1.0)}
    assert {(factors.rank, factors.alpha) for factors in plain.modules.values()} == {(4, 8.0)}
    assert len(wide) >= 8


def test_alpha_scales_what_is_added(bench: Bench) -> None:
    # The first update of B has the size of the rate whatever alpha is, so the product is proportional to it.
    values: dict[str, Any] = {"max_train_steps": 1, "adam_weight_decay": 0.0, "max_grad_norm": 0.0}
    four, eight = (
        published(bench.train(lora_spec(alpha=alpha, **values), name=str(alpha))) for alpha in (4.0, 8.0)
    )
    name = next(iter(four.of("unet")))
    once, twice = four.modules[name].delta(), eight.modules[name].delta()
    assert float(twice.norm() / once.norm()) == pytest.approx(2, rel=0.05)


def test_dropout_changes_training_and_is_repeatable(bench: Bench) -> None:
    kept, dropped, again = (
        bench.train(lora_spec(lora={"dropout": rate}), name=name)
        for name, rate in (("kept", 0.0), ("dropped", 0.5), ("again", 0.5))
    )
    assert not same_bits(
        load_file(kept.run.export_folder / PEFT), load_file(dropped.run.export_folder / PEFT)
    )
    assert same_bits(load_file(again.run.export_folder / PEFT), load_file(dropped.run.export_folder / PEFT))


def test_both_files_hold_the_same_and_merging_them_draws_like_the_adapter(bench: Bench) -> None:
    trained = bench.train(lora_spec(LOCON, learning_rate=1e-2))
    assert trained.outcome.other_formats == {"lora_diffusers": PEFT, "lora_kohya": KOHYA}
    one, other = published(trained, PEFT), published(trained, KOHYA)
    for name, factors in one.modules.items():
        assert torch.equal(factors.delta(), other.modules[name].delta())
    drawing = Drawing("a photo of sks dog", num_inference_steps=2, width_px=16, height_px=16)
    components = load_components(bench.model_folder)
    before = draw_latents(components, drawing)
    merge(components.unet, one, part="unet")
    merge(components.text_encoder, one, part="text_encoder")
    merged = draw_latents(components, drawing)
    assert float((merged - before).norm() / before.norm()) > 0.05, "it has learned something"
    difference = trained.report()["proof_difference"]
    assert difference < 1e-4, "the picture of the model in memory and of the one read back"


def test_equal_trainings_publish_equal_bytes(bench: Bench) -> None:
    one, other = bench.train(lora_spec(), name="one"), bench.train(lora_spec(), name="other")
    for path in (PEFT, KOHYA):
        assert (one.run.export_folder / path).read_bytes() == (other.run.export_folder / path).read_bytes()


def test_the_files_header_says_what_it_is(bench: Bench) -> None:
    spec = lora_spec(max_train_steps=1, clip_skip=2, model_name="rex", base_model="tiny")
    spec.concepts.add(instance_prompt="a photo of sks dog")
    trained = bench.train(spec, family="sd1", license="mit")
    with safe_open(trained.run.export_folder / KOHYA, framework="pt") as file:
        header = dict(file.metadata())
    assert (header["ss_network_dim"], header["ss_network_alpha"], header["ss_clip_skip"]) == ("4", "8", "2")
    assert header["ss_base_model_version"] == "sd_v1"
    assert header["modelspec.trigger_phrase"] == "a photo of sks dog"
    assert header["modelspec.license"] == "mit"
    assert header["ss_sd_model_name"] == "tiny"


@pytest.mark.parametrize(("full", "expected"), [(True, torch.float32), (False, torch.float16)])
def test_save_full_precision_sets_the_type_of_both_files(
    full: bool, expected: torch.dtype, bench: Bench
) -> None:
    trained = bench.train(lora_spec(save_full_precision=full, max_train_steps=1))
    for path in (PEFT, KOHYA):
        tensors = load_file(trained.run.export_folder / path)
        assert {tensor.dtype for tensor in tensors.values() if tensor.ndim} == {expected}


def test_a_checkpoint_holds_the_adapters_and_names_the_base(bench: Bench) -> None:
    trained = bench.train(lora_spec(), recorder=Recorder(ask={2: Request.CHECKPOINT}))
    stored = checkpoints.read_newest(trained.run.checkpoint_folder)
    assert stored is not None
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in stored.weights)
    assert stored.state["configuration"]["model"] == "tiny"
    assert sum(tensor.numel() for tensor in stored.weights.values()) < 100_000


def test_a_low_precision_base_keeps_float32_adapters(bench: Bench) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def note(unet: Any, sample: torch.Tensor, *a: Any, **k: Any) -> None:
        if is_training(sample):
            seen.append((unet.conv_in.weight.dtype, unet.dtype))

    spec = lora_spec(mixed_precision=pb.MIXED_PRECISION_BF16, max_train_steps=3)
    with spying(UNet2DConditionModel, "forward", note):
        low = bench.train(spec, name="low")
    full = bench.train(lora_spec(max_train_steps=3), name="full")
    assert seen[0][0] is torch.bfloat16
    stored = load_file(low.run.export_folder / PEFT)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert low.losses == pytest.approx(full.losses, rel=0.03)


def test_a_lora_trains_on_top_of_a_lora(bench: Bench) -> None:
    first = bench.train(lora_spec(learning_rate=1e-2), name="first")
    folder = delivered(first, bench.folder / "model")
    drawing = Drawing("a photo of sks dog", num_inference_steps=2, width_px=16, height_px=16)
    second = bench.train(lora_spec(max_train_steps=1), name="second", model_folder=folder)
    assert Path("unet/lora-001.safetensors") in second.outcome.files
    run = second.run
    model = load_trained_model(run, resolve_execution(run.spec, run.device))
    assert torch.equal(
        draw_latents(model.components, drawing), draw_latents(load_components(folder), drawing)
    ), "it begins where the first ended"


def test_a_full_training_of_a_lora_has_it_in_its_weights_once(bench: Bench) -> None:
    first = bench.train(lora_spec(learning_rate=1e-2), name="first")
    folder = delivered(first, bench.folder / "model")
    spec = complete_spec(learning_rate=1e-9, train_text_encoder=False, max_train_steps=1)
    full = bench.train(spec, name="full", model_folder=folder)
    assert full.report()["proof_difference"] < 1e-4
    again = delivered(full, bench.folder / "again")
    assert sorted(path.name for path in again.glob("*/lora-*")) == ["lora-000.safetensors"]


def delivered(trained: Trained, folder: Path) -> Path:
    """The model's folder as whoever draws with it gets it."""
    assemble(trained.run, trained.outcome.files[:-1], folder)
    return folder


def test_unresolved_settings_are_refused(bench: Bench) -> None:
    with pytest.raises(InvalidSpec, match=r"lora\.rank: must be 1 or more"):
        bench.train(complete_spec(method=LORA))


def test_the_base_model_is_not_written_again(bench: Bench) -> None:
    trained = bench.train(lora_spec(max_train_steps=1))
    written = sum(path.stat().st_size for path in trained.run.export_folder.rglob("*.safetensors"))
    base = sum(tensor.nbytes for tensor in base_weights(bench.model_folder).values())
    assert written < base
