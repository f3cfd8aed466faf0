"""Adapters against PEFT's, and against a merge of a few lines that is written here."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from services.diffusion.exporting import save_unet
from services.diffusion.loading import Components, ModelFolder, load_components
from services.diffusion.lora import (
    Adapter,
    Factors,
    LoraShape,
    LoraWeights,
    Part,
    attach,
    matching_modules,
    merge,
)
from services.domain.errors import BadInput, InvalidSpec

PLAIN = LoraShape(rank=4, alpha=8.0)
LOCON = LoraShape(rank=4, alpha=2.0, conv_rank=3, conv_alpha=6.0)
PEFT_TARGETS = {
    "unet": r".*\.attentions\.\d+\.(.*\.(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)|proj_in|proj_out)",
    "text_encoder": r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.\w+_proj|mlp\.fc[12])",
}
Call = Callable[[nn.Module], Tensor]


@pytest.fixture
def model(components: Components) -> Components:
    own = {part: copy.deepcopy(getattr(components, part)) for part in ("unet", "text_encoder")}
    return components.with_modules(**own)


def normal(name: str, shape: tuple[int, ...]) -> Tensor:
    seed = sum(ord(letter) * (index + 1) for index, letter in enumerate(name))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call_unet(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    dtype = next(unet.parameters()).dtype
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    context = torch.randn(2, 7, 32, generator=generator).to(dtype)
    return unet(latents, torch.tensor([3, 800]), encoder_hidden_states=context).sample


def call_text_encoder(encoder: nn.Module) -> Tensor:
    return encoder(torch.arange(20).view(2, 10)).last_hidden_state


def module_of(model: Components, part: Part) -> tuple[nn.Module, Call]:
    if part == "unet":
        return model.unet, call_unet
    return model.text_encoder, call_text_encoder


def attached(module: nn.Module, part: Part, shape: LoraShape = PLAIN, *, trained: bool = True) -> Adapter:
    """An adapter whose B is not zero, unless it shall be as new."""
    adapter = attach(module, shape, part=part, initial=normal)
    if trained:
        with torch.no_grad():
            for name, parameter in adapter.parameters().items():
                if "lora_B" in name:
                    parameter.copy_(normal(name, tuple(parameter.shape)) * 0.05)
    return adapter


def block_of(linear: nn.Linear) -> nn.Module:
    """A module under a path that is adapted in a UNet."""
    attentions = nn.ModuleList([nn.Sequential(linear)])
    return nn.ModuleDict({"mid_block": nn.ModuleDict({"attentions": attentions})})


def gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def is_bitwise(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


both_parts = pytest.mark.parametrize("part", ["unet", "text_encoder"])
both_shapes = pytest.mark.parametrize("shape", [PLAIN, LOCON], ids=["lora", "locon"])


# --- the base ------------------------------------------------------------------------------------------------


@both_parts
@both_shapes
def test_first_forward_is_bitwise_the_base_models(model: Components, part: Part, shape: LoraShape) -> None:
    module, call = module_of(model, part)
    with torch.no_grad():
        before = call(module)
        attached(module, part, shape, trained=False)
        assert torch.equal(call(module), before)


@both_parts
def test_only_adapter_tensors_get_gradients_when_the_base_is_frozen(model: Components, part: Part) -> None:
    module, call = module_of(model, part)
    module.requires_grad_(False)
    before = snapshot(module)
    adapter = attached(module, part, LOCON)
    optimizer = torch.optim.AdamW(adapter.parameters().values(), lr=0.1)
    torch.autograd.backward(call(module).square().mean())
    optimizer.step()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(bool(gradient(parameter).any()) for parameter in adapter.parameters().values())
    assert is_bitwise(before, module.state_dict())


@both_parts
def test_first_gradient_moves_b_and_leaves_a(model: Components, part: Part) -> None:
    module, call = module_of(model, part)
    adapter = attached(module, part, trained=False)
    torch.autograd.backward(call(module).square().mean())
    for name, parameter in adapter.parameters().items():
        assert bool(gradient(parameter).any()) == ("lora_B" in name)


@both_parts
def test_base_knows_nothing_of_its_adapter(model: Components, part: Part) -> None:
    module, _ = module_of(model, part)
    names, before = [name for name, _ in module.named_parameters()], snapshot(module)
    attached(module, part, LOCON)
    assert [name for name, _ in module.named_parameters()] == names
    assert is_bitwise(before, module.state_dict())


def test_export_of_a_model_with_an_adapter_is_the_bases(
    model: Components, tiny_model_dir: Path, tmp_path: Path
) -> None:
    attached(model.unet, "unet")
    for path in save_unet(model.unet, tmp_path):
        assert (tmp_path / path).read_bytes() == (tiny_model_dir / path).read_bytes()


@both_parts
def test_detached_model_is_bitwise_what_it_was(model: Components, part: Part) -> None:
    module, call = module_of(model, part)
    before, state = call(module), snapshot(module)
    adapter = attached(module, part, LOCON)
    assert not torch.equal(call(module), before)
    adapter.detach()
    adapter.detach()
    assert torch.equal(call(module), before)
    assert is_bitwise(state, module.state_dict())
    assert not any(child._forward_hooks for child in module.modules())


def test_disabled_adapter_leaves_the_base_alone(model: Components) -> None:
    before = call_unet(model.unet)
    adapter = attached(model.unet, "unet")
    with_adapter = call_unet(model.unet)
    adapter.enabled = False
    assert torch.equal(call_unet(model.unet), before)
    adapter.enabled = True
    assert torch.equal(call_unet(model.unet), with_adapter)


# --- the mathematics -----------------------------------------------------------------------------------------


def reference_delta(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """B A for linear layers and for convolutions of any kernel, output by output."""
    return factor * torch.einsum("or,r...->o...", b.reshape(b.shape[:2]), a)


@both_parts
@both_shapes
def test_merged_weights_compute_what_the_adapter_does(
    model: Components, part: Part, shape: LoraShape
) -> None:
    module, call = module_of(model, part)
    adapter = attached(module, part, shape)
    with torch.no_grad():
        wanted = call(module)
        parameters = adapter.parameters()
        adapter.detach()
        by_name = {name.removeprefix("text_model."): child for name, child in module.named_modules()}
        for name in adapter.modules:
            path = name.removeprefix("unet.").removeprefix("text_encoder.").removeprefix("text_model.")
            a, b = parameters[f"{name}.lora_A.weight"], parameters[f"{name}.lora_B.weight"]
            wide = a.ndim == 4 and a.shape[-1] == 3
            alpha, rank = (shape.conv_alpha, shape.conv_rank) if wide else (shape.alpha, shape.rank)
            delta = reference_delta(a, b, alpha / rank)
            assert torch.allclose(adapter.merged_delta(name), delta, atol=1e-6)
            by_name[path].weight += delta
        assert float((call(module) - wanted).abs().max()) < 1e-5


@both_parts
def test_doubled_alpha_doubles_the_delta(model: Components, part: Part) -> None:
    module, _ = module_of(model, part)
    once = attached(module, part, LOCON)
    twice = attached(
        module, part, LoraShape(4, 2 * LOCON.alpha, conv_rank=3, conv_alpha=2 * LOCON.conv_alpha)
    )
    assert once.modules == twice.modules
    for name in once.modules:
        assert bool(once.merged_delta(name).any())
        assert torch.equal(2 * once.merged_delta(name), twice.merged_delta(name))


def test_two_adapters_add_up() -> None:
    linear = nn.Linear(5, 6)
    base = block_of(linear)
    x = torch.randn(3, 5)
    plain = linear(x)
    first = attached(base, "unet", LoraShape(2, 2.0))
    alone = linear(x) - plain
    second = attached(base, "unet", LoraShape(3, 1.0))
    first.enabled = False
    other = linear(x) - plain
    first.enabled = True
    assert torch.allclose(linear(x), plain + alone + other, atol=1e-6)
    assert first.modules == second.modules == ("unet.mid_block.attentions.0.0",)


def peft_twin(module: nn.Module, part: Part, adapter: Adapter, shape: LoraShape) -> nn.Module:
    """The same adapter in PEFT's layers on a copy of the base."""
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=PEFT_TARGETS[part],
    )
    twin: Any = inject_adapter_in_model(config, copy.deepcopy(module))
    ours = {name.split(".", 1)[1]: tensor for name, tensor in adapter.parameters().items()}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".lora_" in name:
                plain = name.replace(".default.", ".")
                plain = plain if part == "unet" or plain.startswith("text_model.") else f"text_model.{plain}"
                parameter.copy_(ours.pop(plain))
    assert not ours
    return twin


def gradients(twin: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".default.", ".").removeprefix("text_model."): parameter.grad
        for name, parameter in twin.named_parameters()
        if ".lora_" in name and parameter.grad is not None
    }


@both_parts
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["no-dropout", "dropout"])
def test_outputs_and_gradients_are_those_of_peft(model: Components, part: Part, dropout: float) -> None:
    module, call = module_of(model, part)
    shape = LoraShape(4, 8.0, dropout)
    adapter = attached(copy.deepcopy(module), part, shape)
    twin = peft_twin(module, part, adapter, shape)
    adapter = attached(module, part, shape)
    outputs = []
    for network in (module, twin):
        network.train()
        torch.manual_seed(17)
        outputs.append(call(network))
        torch.autograd.backward(outputs[-1].square().sum())
    assert float((outputs[0] - outputs[1]).detach().abs().max()) < 1e-5
    theirs = gradients(twin)
    for name, parameter in adapter.parameters().items():
        mine = gradient(parameter)
        other = theirs.pop(name.split(".", 1)[1].removeprefix("text_model."))
        assert float((mine - other).norm()) <= 1e-4 * float(other.norm())
    assert not theirs


@both_parts
def test_dropout_works_in_training_mode_only(model: Components, part: Part) -> None:
    module, call = module_of(model, part)
    attached(module, part, LoraShape(4, 8.0, dropout=0.5))
    module.eval()
    assert torch.equal(call(module), call(module))
    module.train()
    assert not torch.equal(call(module), call(module))


@both_parts
def test_gradient_checkpointing_changes_no_gradient(model: Components, part: Part) -> None:
    module, call = module_of(model, part)
    module.requires_grad_(False).train()
    adapter = attached(module, part, LoraShape(4, 8.0, 0.3, conv_rank=2, conv_alpha=1.0))
    found = []
    for checkpointing in (False, True):
        if checkpointing and part == "unet":
            model.unet.enable_gradient_checkpointing()
        elif checkpointing:
            model.text_encoder.activation_checkpointing_enable({"use_reentrant": False})
        calls: list[str] = []
        watched = next(child for name, child in module.named_modules() if name.endswith(("to_q", "q_proj")))
        handle = watched.register_forward_hook(lambda *_, calls=calls: calls.append("forward"))
        torch.manual_seed(3)
        torch.autograd.backward(call(module).square().mean())
        handle.remove()
        found.append({name: gradient(parameter) for name, parameter in adapter.parameters().items()})
        for parameter in adapter.parameters().values():
            parameter.grad = None
        assert len(calls) == (2 if checkpointing else 1)
    for name, plain in found[0].items():
        assert float((plain - found[1][name]).abs().max()) < 1e-6


# --- precision -----------------------------------------------------------------------------------------------


@both_parts
def test_factors_stay_in_full_precision_on_a_half_precision_base(tiny_model_dir: Path, part: Part) -> None:
    module, call = module_of(load_components(tiny_model_dir, torch.bfloat16), part)
    adapter = attached(module, part)
    output = call(module)
    torch.autograd.backward(output.float().square().mean())
    module.to(torch.float16).to(torch.bfloat16)  # as a drawing in between may do with a shared module
    assert output.dtype is torch.bfloat16
    for parameter in adapter.parameters().values():
        assert parameter.dtype is torch.float32
        assert gradient(parameter).dtype is torch.float32


@both_parts
def test_autocast_computes_the_same_within_its_precision(model: Components, part: Part) -> None:
    module, call = module_of(model, part)
    with torch.no_grad():
        base = call(module)
        adapter = attached(module, part)
        exact = call(module)
        with torch.autocast("cpu", torch.bfloat16):
            rough = call(module)
    with torch.autocast("cpu", torch.bfloat16):
        torch.autograd.backward(call(module).float().square().mean())
    assert float((rough.float() - exact).norm()) < 0.2 * float((exact - base).norm())
    assert all(gradient(parameter).dtype is torch.float32 for parameter in adapter.parameters().values())


def test_factors_are_cast_only_where_precisions_differ() -> None:
    linear = nn.Linear(8, 8)
    attached(block_of(linear), "unet", LoraShape(2, 1.0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear(torch.randn(4, 8))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::linear"] == 3
    assert counts["aten::add"] == 1
    assert "aten::_to_copy" not in counts


# --- what is adapted, and how it is named --------------------------------------------------------------------


def test_names_of_the_text_encoder_have_the_prefix_of_older_libraries(model: Components) -> None:
    adapter = attached(model.text_encoder, "text_encoder")
    layer = "text_encoder.text_model.encoder.layers.4"
    wanted = [f"{layer}.self_attn.{name}_proj" for name in ("k", "v", "q", "out")]
    wanted += [f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"]
    assert [name for name in adapter.modules if name.startswith(layer)] == wanted
    assert len(adapter.modules) == 5 * 6


def test_older_text_encoders_that_nest_their_layers_have_the_same_names(model: Components) -> None:
    nested = nn.Module()
    nested.text_model = model.text_encoder
    old = attached(nested, "text_encoder").parameters()
    new = attached(model.text_encoder, "text_encoder").parameters()
    assert list(old) == list(new)


def test_locon_adds_the_three_by_three_convolutions_and_nothing_else(model: Components) -> None:
    plain = attached(model.unet, "unet", PLAIN).modules
    locon = attached(model.unet, "unet", LOCON)
    convolutions = {
        f"unet.{name}"
        for name, child in model.unet.named_modules()
        if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3) and "_block" in name
    }
    assert set(locon.modules) - set(plain) == convolutions
    assert set(plain) < set(locon.modules)
    ranks = {
        parameter.shape[0]
        for name, parameter in locon.parameters().items()
        if "resnets" in name and "_A" in name
    }
    assert ranks == {3}
    assert (PLAIN.preset, LOCON.preset) == ("attn-mlp", "attn-mlp+conv3x3")


def test_initial_values_have_the_variance_of_the_usual_initialisation() -> None:
    adapter = attached(block_of(nn.Linear(640, 8)), "unet", LoraShape(rank=256, alpha=1.0), trained=False)
    ours = next(iter(adapter.parameters().values())).detach()
    usual = torch.empty(256, 640)
    nn.init.kaiming_uniform_(usual, a=math.sqrt(5))
    assert float(ours.std()) == pytest.approx(float(usual.std()), rel=0.01)
    assert float(ours.mean().abs()) < 1e-3


def test_initial_values_are_asked_for_by_parameter_name_and_shape(model: Components) -> None:
    asked: dict[str, tuple[int, ...]] = {}

    def initial(name: str, shape: tuple[int, ...]) -> Tensor:
        asked[name] = shape
        return torch.zeros(shape)

    adapter = attach(model.unet, PLAIN, part="unet", initial=initial)
    made = {name: tuple(tensor.shape) for name, tensor in adapter.parameters().items() if "lora_A" in name}
    assert asked == made


def test_initial_values_of_another_shape_are_refused(model: Components) -> None:
    with pytest.raises(ValueError, match="initial values"):
        attach(model.unet, PLAIN, part="unet", initial=lambda name, shape: torch.zeros(1))


def test_model_without_targets_is_refused(model: Components) -> None:
    with pytest.raises(BadInput, match="no module"):
        attach(model.vae, PLAIN, part="unet", initial=normal)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"rank": 0}, "lora.rank"),
        ({"alpha": 0.0}, "lora.alpha"),
        ({"alpha": math.inf}, "lora.alpha"),
        ({"dropout": 1.5}, "lora.dropout"),
        ({"conv_rank": -1}, "lora.conv_rank"),
        ({"conv_rank": 2}, "lora.conv_alpha"),
    ],
)
def test_shape_out_of_range_is_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        LoraShape(**({"rank": 4, "alpha": 4.0} | values))
    assert [violation.field for violation in caught.value.violations] == [field]


# --- merging -------------------------------------------------------------------------------------------------


@both_parts
@both_shapes
def test_merge_computes_what_the_adapter_does_and_undo_is_exact(
    model: Components, part: Part, shape: LoraShape
) -> None:
    module, call = module_of(model, part)
    before = snapshot(module)
    tensors = dict(module.named_parameters())
    adapter = attached(module, part, shape)
    with torch.no_grad():
        wanted = call(module)
        adapter.detach()
        done = merge(module, adapter.weights(), part=part)
        assert float((call(module) - wanted).abs().max()) < 1e-5
        assert all(torch.equal(tensors[name], before[name]) for name in tensors)
        done.undo()
    assert is_bitwise(before, module.state_dict())
    assert all(tensors[name] is parameter for name, parameter in module.named_parameters())


def test_strength_scales_what_is_merged(model: Components) -> None:
    adapter = attached(model.unet, "unet")
    adapter.detach()
    name = adapter.modules[0]
    module = dict(model.unet.named_modules())[name.removeprefix("unet.")]
    original = module.weight.detach().clone()
    merge(model.unet, adapter.weights(), part="unet", strength=-0.5)
    wanted = original - 0.5 * adapter.merged_delta(name).view(original.shape)
    assert torch.allclose(module.weight, wanted, atol=1e-7)


def test_merges_are_undone_in_reverse_order(model: Components) -> None:
    weights = [attached(model.unet, "unet", LoraShape(rank, 1.0)).weights() for rank in (1, 2)]
    before = snapshot(model.unet)
    first, second = (merge(model.unet, each, part="unet") for each in weights)
    with pytest.raises(ValueError, match="reverse order"):
        first.undo()
    second.undo()
    first.undo()
    assert is_bitwise(before, model.unet.state_dict())


def test_half_precision_weights_are_summed_in_full(tiny_model_dir: Path) -> None:
    unet = ModelFolder(tiny_model_dir, torch.bfloat16).load_unet()
    adapter = attached(unet, "unet")
    adapter.detach()
    name = adapter.modules[0]
    module = dict(unet.named_modules())[name.removeprefix("unet.")]
    exact = module.weight.detach().float() + adapter.merged_delta(name).view(module.weight.shape)
    merge(unet, adapter.weights(), part="unet")
    assert torch.equal(module.weight, exact.to(torch.bfloat16))


def test_lora_of_another_architecture_is_refused_and_changes_nothing(model: Components) -> None:
    adapter = attached(model.unet, "unet")
    adapter.detach()
    before = snapshot(model.unet)
    weights = dict(adapter.weights().modules)
    name = adapter.modules[-1]
    narrow = Factors(torch.zeros(2, 7), torch.zeros(9, 2), 1.0)
    with pytest.raises(BadInput, match=r"proj_out is \[64, 64, 1, 1\], there \[9, 7\]"):
        merge(model.unet, LoraWeights(weights | {name: narrow}), part="unet")
    with pytest.raises(BadInput, match=r"has no unet\.down_blocks\.9\.to_q"):
        merge(model.unet, LoraWeights(weights | {"unet.down_blocks.9.to_q": narrow}), part="unet")
    assert is_bitwise(before, model.unet.state_dict())


def test_one_by_one_convolution_and_linear_layer_are_the_same_matrix(model: Components) -> None:
    adapter = attached(model.unet, "unet")
    adapter.detach()
    name = next(name for name in adapter.modules if name.endswith("proj_in"))
    wide = adapter.weights().modules[name]
    flat = LoraWeights({name: Factors(wide.a.flatten(1), wide.b.flatten(1), wide.alpha)})
    module = matching_modules(model.unet, flat, "unet")[name]
    original = module.weight.detach().clone()
    merge(model.unet, flat, part="unet")
    assert torch.allclose(module.weight - original, adapter.merged_delta(name), atol=1e-6)


def test_each_part_takes_its_own_modules_of_a_lora(model: Components) -> None:
    unet, text = attached(model.unet, "unet"), attached(model.text_encoder, "text_encoder")
    whole = LoraWeights(dict(unet.weights().modules) | dict(text.weights().modules))
    assert set(matching_modules(model.unet, whole, "unet")) == set(unet.modules)
    assert set(matching_modules(model.text_encoder, whole, "text_encoder")) == set(text.modules)
