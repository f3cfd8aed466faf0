from io import BytesIO
from pathlib import Path

import numpy
from likeness.inference.v1 import generation_job_pb2 as pb
from PIL import Image

from services.diffusion.drawing import Drawing, draw
from services.diffusion.loading import Components
from services.inference.engine import Engine
from services.inference.slot import Slot, open_slots
from services.inference.stages import encode_image, finish

DRAWING = Drawing("a secret robot", num_inference_steps=2, seed=987654321)


def finished_slot(components: Components, drawing: Drawing = DRAWING) -> Slot:
    engine = Engine(1)
    (slot,) = open_slots("job", "m", components, [drawing])
    engine.add([slot])
    while not engine.is_idle:
        engine.tick()
    return slot


def test_file_holds_the_picture_that_drawing_alone_gives(components: Components, tmp_path: Path) -> None:
    drawn = finish(finished_slot(components), tmp_path / "0")
    written = numpy.asarray(Image.open(BytesIO(drawn.path.read_bytes())))
    assert numpy.array_equal(written, numpy.asarray(draw(components, DRAWING)))
    assert (drawn.width_px, drawn.height_px, drawn.media_type) == (16, 16, "image/png")


def test_facts_are_those_of_the_file(components: Components, tmp_path: Path) -> None:
    from hashlib import sha256

    drawn = finish(finished_slot(components), tmp_path / "0")
    content = drawn.path.read_bytes()
    assert (drawn.digest, drawn.size_bytes) == (sha256(content).hexdigest(), len(content))


def test_same_request_gives_the_same_bytes(components: Components, tmp_path: Path) -> None:
    digests = {finish(finished_slot(components), tmp_path / str(turn)).digest for turn in range(2)}
    assert len(digests) == 1


def test_files_carry_neither_prompt_nor_seed(components: Components, tmp_path: Path) -> None:
    drawn = finish(finished_slot(components), tmp_path / "0")
    content = drawn.path.read_bytes()
    assert b"secret" not in content
    assert b"987654321" not in content
    assert Image.open(BytesIO(content)).info == {}


def test_jpeg_is_written_on_request(components: Components, tmp_path: Path) -> None:
    drawn = finish(finished_slot(components), tmp_path / "0", pb.IMAGE_FORMAT_JPEG)
    assert drawn.media_type == "image/jpeg"
    assert drawn.path.read_bytes().startswith(b"\xff\xd8\xff")


def test_unspecified_format_is_png() -> None:
    assert encode_image(Image.new("RGB", (4, 4)), 0)[1] == "image/png"


def test_decoding_counts_as_device_time(components: Components, tmp_path: Path) -> None:
    slot = finished_slot(components)
    before = slot.device_s
    finish(slot, tmp_path / "0")
    assert slot.device_s > before > 0
