from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from likeness.inference.v1 import generation_job_pb2 as pb

from services.diffusion.drawing import Drawing, draw_latents, predict
from services.diffusion.loading import Components
from services.domain.errors import InvalidSpec, OutOfDeviceMemory
from services.domain.generation_spec import UNOFFERED
from services.inference import engine as engine_module
from services.inference.engine import Engine
from services.inference.slot import Slot, drawings_of, open_slots, truncation_warnings

BASE = Drawing("a photo of a dog", "blurry", num_inference_steps=4, seed=5)
MIXED = [
    BASE,
    replace(BASE, prompt="a red circle", scheduler=pb.SCHEDULER_EULER_ANCESTRAL_DISCRETE, seed=6),
    replace(BASE, num_inference_steps=7, scheduler=pb.SCHEDULER_DPM_SOLVER_MULTISTEP, guidance_scale=3.0),
    replace(BASE, scheduler=pb.SCHEDULER_HEUN_DISCRETE, seed=7),
    replace(BASE, guidance_scale=1.0),
    replace(BASE, width_px=24, height_px=8),
    replace(BASE, scheduler=pb.SCHEDULER_DDPM, clip_skip=2),
    replace(BASE, scheduler=pb.SCHEDULER_PNDM, num_inference_steps=2),
]


def slots_of(components: Components, drawings: Sequence[Drawing]) -> list[Slot]:
    return [
        slot
        for number, drawing in enumerate(drawings)
        for slot in open_slots(f"job-{number}", "m", components, [drawing])
    ]


def run(engine: Engine) -> list[Slot]:
    finished: list[Slot] = []
    while not engine.is_idle:
        tick = engine.tick()
        assert tick.failed == []
        finished += tick.finished
    return finished


def assert_same_picture(slot: Slot) -> None:
    """The latents are those of drawing alone, but for the last bits that differ between batch sizes."""
    alone = draw_latents(slot.components, slot.drawing)
    assert float((slot.latents - alone).abs().max() / alone.abs().max()) < 1e-5


@pytest.mark.parametrize("cap", [1, 4])
def test_mixed_slots_draw_what_each_draws_alone(components: Components, cap: int) -> None:
    engine = Engine(cap)
    slots = slots_of(components, MIXED)
    engine.add(slots)
    assert len(run(engine)) == len(MIXED)
    for slot, drawing in zip(slots, MIXED, strict=True):
        alone = draw_latents(components, drawing)
        if cap == 1:
            assert torch.equal(slot.latents, alone)
        assert_same_picture(slot)


def test_slots_join_and_leave_between_steps(components: Components) -> None:
    engine = Engine(4)
    first, second = slots_of(components, [replace(BASE, num_inference_steps=6), BASE])
    engine.add([first])
    engine.tick()
    engine.add([second])
    finished = run(engine)
    assert finished == [second, first]
    for slot in finished:
        assert_same_picture(slot)


def test_one_call_serves_no_more_slots_than_the_cap(components: Components) -> None:
    engine = Engine(3)
    engine.add(slots_of(components, [BASE] * 5))
    assert len(engine.tick().stepped) == 3


def test_slots_that_differ_in_shape_or_guidance_do_not_share_a_call(components: Components) -> None:
    engine = Engine(8)
    engine.add(slots_of(components, [BASE, replace(BASE, width_px=8), replace(BASE, guidance_scale=1.0)]))
    assert [len(engine.tick().stepped) for _ in range(3)] == [1, 1, 1]


def test_no_unconditional_branch_is_computed_without_guidance(components: Components) -> None:
    batches: list[int] = []
    hook = components.unet.register_forward_pre_hook(lambda _module, inputs: batches.append(len(inputs[0])))
    engine = Engine(1)
    engine.add(slots_of(components, [replace(BASE, guidance_scale=1.0), BASE]))
    engine.tick()
    engine.tick()
    hook.remove()
    assert batches == [1, 2]


def test_slots_take_turns_so_that_a_long_picture_delays_none(components: Components) -> None:
    engine = Engine(1)
    long, short = slots_of(components, [replace(BASE, num_inference_steps=50), BASE])
    engine.add([long])
    engine.tick()
    engine.add([short])
    order = [engine.tick().stepped[0] for _ in range(7)]
    assert order == [short, long, short, long, short, long, short]
    assert short.is_finished


def test_waiting_incompatible_slot_is_served_before_a_full_batch_runs_twice(components: Components) -> None:
    engine = Engine(2)
    wide = replace(BASE, width_px=24)
    slots = slots_of(components, [BASE, BASE, wide, BASE])
    engine.add(slots)
    assert [engine.tick().stepped for _ in range(3)] == [slots[:2], [slots[2]], [slots[3], slots[0]]]


def test_removed_slots_make_no_further_step(components: Components) -> None:
    engine = Engine(4)
    unwanted, kept = slots_of(components, [BASE, BASE])
    engine.add([unwanted, kept])
    engine.tick()
    assert engine.remove(lambda slot: slot.job == "job-0") == [unwanted]
    assert run(engine) == [kept]
    assert unwanted.done == 1
    assert_same_picture(kept)


def test_batch_that_is_too_big_for_the_device_is_made_in_halves(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small_device(parts: Components, rows: list[Any], context: torch.Tensor) -> torch.Tensor:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return predict(parts, rows, context)

    monkeypatch.setattr(engine_module, "predict", small_device)
    engine = Engine(8)
    engine.add(slots_of(components, [replace(BASE, seed=seed) for seed in range(5)]))
    finished = run(engine)
    assert len(finished) == 5
    for slot in finished:
        assert_same_picture(slot)


def test_picture_that_does_not_fit_alone_fails_with_the_reason(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine_module, "predict", no_memory)
    engine = Engine(1)
    (slot,) = slots_of(components, [BASE])
    engine.add([slot])
    ((failed, error),) = engine.tick().failed
    assert failed is slot
    assert isinstance(error, OutOfDeviceMemory)
    assert engine.is_idle


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("out of memory"), ValueError("a bad step")])
def test_fault_in_one_slots_own_step_is_its_own_and_moves_no_neighbour_twice(
    fault: Exception, components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise fault

    first, faulty, last = slots = slots_of(components, [replace(BASE, seed=seed) for seed in range(3)])
    monkeypatch.setattr(faulty.sampler.scheduler, "step", broken)
    engine = Engine(3)
    engine.add(slots)
    tick = engine.tick()
    assert [slot for slot, _ in tick.failed] == [faulty]
    assert tick.stepped == [first, last]
    assert run(engine) == [first, last]
    for slot in (first, last):
        assert_same_picture(slot)


def test_tick_of_an_idle_engine_does_nothing() -> None:
    tick = Engine(2).tick()
    assert (tick.stepped, tick.finished, tick.failed) == ([], [], [])


def test_request_becomes_one_picture_a_seed() -> None:
    spec = pb.GenerationSpec(prompt="x", num_images=3, seed=40, num_inference_steps=9, guidance_scale=2.5)
    drawings = drawings_of(spec)
    assert [drawing.seed for drawing in drawings] == [40, 41, 42]
    assert {(drawing.num_inference_steps, drawing.guidance_scale) for drawing in drawings} == {(9, 2.5)}


@pytest.mark.parametrize("skipped", [0, 1])
def test_clip_skip_nought_and_one_mean_the_last_layer(skipped: int) -> None:
    assert drawings_of(pb.GenerationSpec(num_images=1, clip_skip=skipped))[0].clip_skip == 1


def test_wishes_that_are_not_fulfilled_are_refused_together() -> None:
    spec = pb.GenerationSpec(num_images=1, panorama=True, vae="other", translate_prompt=True)
    with pytest.raises(InvalidSpec) as caught:
        drawings_of(spec)
    assert {violation.field for violation in caught.value.violations} == {
        "panorama",
        "vae",
        "translate_prompt",
    }


def test_every_field_of_a_request_is_drawn_by_or_refused_or_not_the_engines_business() -> None:
    fields = set(pb.GenerationSpec.DESCRIPTOR.fields_by_name)
    refused = {name for name, _ in UNOFFERED}
    drawn_by = {
        "prompt",
        "negative_prompt",
        "width_px",
        "height_px",
        "num_images",
        "num_inference_steps",
        "guidance_scale",
        "guidance_rescale",
        "scheduler",
        "seed",
        "use_karras_sigmas",
        "solver_algorithm",
        "clip_skip",
        "eta",
        "image_format",
        "loras",
        "embeddings",
        "init_image_key",
        "mask_image_key",
        "strength",
    }
    elsewhere = {"model", "model_digest", "base64_output", "temporary_output", "passback", "output_names"}
    without_meaning_here = {"source_language"}
    assert fields == refused | drawn_by | elsewhere | without_meaning_here


def test_prompt_that_is_cut_is_reported(components: Components) -> None:
    warnings = truncation_warnings(components, replace(BASE, prompt="robot " * 80))
    assert len(warnings) == 1
    assert warnings[0].startswith("the prompt is too long for this model; left out: robot")


def test_equal_prompts_of_a_request_are_encoded_once(components: Components) -> None:
    calls: list[int] = []
    hook = components.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    open_slots("job", "m", components, [replace(BASE, seed=seed) for seed in range(4)])
    hook.remove()
    assert calls == [1]
