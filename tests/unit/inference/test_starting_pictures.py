"""Drawings that start from pictures: among others in the engine, and from a request's keys to the child's files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from likeness.inference.v1 import generation_job_pb2 as pb
from PIL import Image

from services.diffusion.drawing import Drawing, draw
from services.diffusion.init_images import InitImage, prepare_init_image
from services.diffusion.loading import Components
from services.domain.errors import NotFound
from services.inference.device_process import DeviceProcess
from services.inference.engine import Engine
from services.inference.slot import Slot, open_slots
from services.inference.stages import finish
from tests.unit.inference.fake_child import __name__ as FAKE
from tests.unit.inference.test_child import SPEC, Recorder, draw_command
from tests.unit.inference.test_worker import running_bench

BASE = Drawing("a photo of a dog", "blurry", num_inference_steps=6, seed=5)
FROM_PICTURE = replace(BASE, strength=0.5, scheduler=pb.SCHEDULER_EULER_ANCESTRAL_DISCRETE)
INPAINTED = replace(BASE, strength=0.8, scheduler=pb.SCHEDULER_HEUN_DISCRETE, seed=6)


def picture() -> Image.Image:
    levels = numpy.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=numpy.uint8)
    return Image.fromarray(levels, "RGB")


def half_mask() -> Image.Image:
    """White, so repainted, on the right."""
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    return mask


def levels_of(image: Image.Image) -> Any:
    return numpy.asarray(image).astype(int)


def test_pictures_do_not_depend_on_neighbours_that_start_otherwise(
    components: Components, tmp_path: Path
) -> None:
    plain = prepare_init_image(components, (16, 16), picture())
    masked = prepare_init_image(components, (16, 16), picture(), half_mask())
    wishes: list[tuple[Drawing, InitImage | None]] = [
        (BASE, None),
        (FROM_PICTURE, plain),
        (INPAINTED, masked),
        (replace(BASE, scheduler=pb.SCHEDULER_PNDM, seed=9), None),
        (replace(FROM_PICTURE, scheduler=pb.SCHEDULER_UNIPC_MULTISTEP), plain),
    ]
    slots = [
        open_slots(str(number), "m", components, [drawing], init_image=start)[0]
        for number, (drawing, start) in enumerate(wishes)
    ]
    engine, finished, largest = Engine(4), list[Slot](), 0
    for slot in slots:  # one joins at each tick
        engine.add([slot])
        tick = engine.tick()
        finished, largest = finished + tick.finished, max(largest, len(tick.stepped))
    while not engine.is_idle:
        finished += engine.tick().finished
    assert (len(finished), largest) == (5, 4)
    for slot, (drawing, start) in zip(slots, wishes, strict=True):
        drawn = Image.open(finish(slot, tmp_path / "picture").path)
        alone = draw(components, drawing, init_image=start)
        assert abs(levels_of(drawn) - levels_of(alone)).max() <= 2


def starting_spec(**changes: Any) -> pb.GenerationSpec:
    spec = pb.GenerationSpec(init_image_key="i", strength=0.5)
    spec.MergeFrom(SPEC)
    spec.MergeFrom(pb.GenerationSpec(**changes))
    return spec


def test_request_with_a_mask_keeps_what_is_black(model_command: dict[str, Any], tmp_path: Path) -> None:
    recorder = Recorder()
    command = draw_command(model_command, tmp_path, spec=starting_spec(mask_image_key="m"))
    for field, image in {"init_image_key": picture(), "mask_image_key": half_mask().convert("RGB")}.items():
        image.save(tmp_path / field, "PNG")
        command.setdefault("pictures", {})[field] = str(tmp_path / field)
    recorder.session.handle(command)
    recorder.run()
    drawn = [levels_of(Image.open(event["path"])) for event in recorder.of("drawn", "j1")]
    assert recorder.of("progress", "j1")[-1]["total"] == 4, (
        "half of three steps, rounded up, for two pictures"
    )
    assert all(numpy.array_equal(levels[:, :8], levels_of(picture())[:, :8]) for levels in drawn)
    assert not numpy.array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize("broken", ["missing", "no picture", "another type"])
def test_picture_that_cannot_be_read_fails_the_request_by_its_field(
    model_command: dict[str, Any], tmp_path: Path, broken: str
) -> None:
    recorder, path = Recorder(), tmp_path / "picture"
    if broken == "no picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    elif broken == "another type":
        picture().save(path, "BMP")
    command = draw_command(model_command, tmp_path, spec=starting_spec())
    recorder.session.handle(command | {"pictures": {"init_image_key": str(path)}})
    (failed,) = recorder.of("failed", "j1")
    assert (failed["reason"], failed["field"], failed["retryable"]) == ("BAD_INPUT", "init_image_key", False)


async def test_worker_fetches_the_pictures_of_a_job_for_its_child(tmp_path: Path) -> None:
    async with DeviceProcess(module=FAKE, silence_s=2.0, loading_s=20.0) as device:
        bench = await running_bench(tmp_path, device)
        keys = {field: bench.storage.keep(field.encode()) for field in ("init_image_key", "mask_image_key")}
        _, result = await bench.end_of(bench.give("x", **keys))
        assert list(result.warnings) == ["2", *(f"{field} {field}" for field in keys)]
        await bench.stop()
        bench.cache.close()


async def test_picture_that_is_gone_fails_the_job(tmp_path: Path) -> None:
    async with DeviceProcess(module=FAKE, silence_s=2.0, loading_s=20.0) as device:
        bench = await running_bench(tmp_path, device)

        async def gone(key: str, path: Path) -> int:
            raise NotFound("there is no such artifact")

        await bench.end_of(bench.give("x"))
        bench.storage.download_blob = gone  # type: ignore[method-assign]
        handle = bench.give("x", "j2", init_image_key="projects/p1/blobs/sha256/" + "0" * 64)
        assert (await bench.end_of(handle))[1][0] == "NOT_FOUND"
        await bench.stop()
        bench.cache.close()
