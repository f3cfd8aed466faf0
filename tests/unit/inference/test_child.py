import hashlib
import queue
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.json_format import MessageToDict
from likeness.inference.v1 import generation_job_pb2 as pb
from safetensors.torch import save_file

from services.adapters.child_process import ChildProcess
from services.diffusion.drawing import decode
from services.domain.errors import OutOfDeviceMemory
from services.inference import child as child_module
from services.inference import engine as engine_module
from services.inference import stages
from services.inference.adapters import AdapterStore
from services.inference.child import DrawingSession, memory_budget_bytes, serve
from services.inference.engine import Engine
from services.inference.model_cache import ModelCache
from tests.unit.inference.conftest import model_of

SPEC = pb.GenerationSpec(
    prompt="a robot",
    num_images=2,
    num_inference_steps=3,
    guidance_scale=7.5,
    seed=7,
    image_format=pb.IMAGE_FORMAT_PNG,
)


class Recorder:
    """A session with everything it said."""

    def __init__(self, batch_cap: int = 1) -> None:
        self.events: list[dict[str, Any]] = []
        models = ModelCache(1 << 40, torch.device("cpu"), torch.float32)
        adapters = AdapterStore(1 << 40, torch.float32)
        self.session = DrawingSession(
            lambda event: self.events.append(dict(event)), Engine(batch_cap), models, adapters
        )

    def run(self) -> None:
        while not self.session.is_idle:
            self.session.tick()

    def of(self, kind: str, job: str = "") -> list[dict[str, Any]]:
        return [
            event for event in self.events if event["event"] == kind and (not job or event.get("job") == job)
        ]


def draw_command(
    model: dict[str, Any], folder: Path, job: str = "j1", spec: pb.GenerationSpec = SPEC
) -> dict[str, Any]:
    (folder / job).mkdir(parents=True, exist_ok=True)
    return {
        "command": "draw",
        "job": job,
        "model": model,
        "folder": str(folder / job),
        "spec": MessageToDict(spec, preserving_proto_field_name=True),
    }


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def test_request_is_drawn_into_files(
    recorder: Recorder, model_command: dict[str, Any], tmp_path: Path
) -> None:
    recorder.session.handle(draw_command(model_command, tmp_path))
    recorder.run()
    drawn = recorder.of("drawn", "j1")
    assert [event["seed"] for event in drawn] == [7, 8]
    for event in drawn:
        assert hashlib.sha256(Path(event["path"]).read_bytes()).hexdigest() == event["digest"]
    (finished,) = recorder.of("finished", "j1")
    assert finished["device_s"] > 0
    assert recorder.events[-1] == finished


def test_progress_counts_the_calls_of_all_pictures(
    recorder: Recorder, model_command: dict[str, Any], tmp_path: Path
) -> None:
    recorder.session.handle(draw_command(model_command, tmp_path))
    recorder.run()
    progress = recorder.of("progress", "j1")
    assert (progress[-1]["done"], progress[-1]["total"]) == (6, 6)


def test_loading_is_told_once_a_model(
    recorder: Recorder, model_command: dict[str, Any], tmp_path: Path
) -> None:
    for job in ("j1", "j2"):
        recorder.session.handle(draw_command(model_command, tmp_path, job))
    assert len(recorder.of("loading")) == 1
    assert recorder.of("models")[-1]["held"] == [model_command["digest"]]


def test_cancelled_request_is_forgotten_and_others_go_on(
    recorder: Recorder, model_command: dict[str, Any], tmp_path: Path
) -> None:
    for job in ("j1", "j2"):
        recorder.session.handle(draw_command(model_command, tmp_path, job))
    recorder.session.tick()
    recorder.session.handle({"command": "cancel", "job": "j1"})
    recorder.session.handle({"command": "cancel", "job": "j1"})
    recorder.run()
    assert len(recorder.of("cancelled", "j1")) == 1
    assert not recorder.of("drawn", "j1") + recorder.of("finished", "j1")
    assert len(recorder.of("drawn", "j2")) == 2


def test_wish_that_is_not_offered_fails_with_its_field(
    recorder: Recorder, model_command: dict[str, Any], tmp_path: Path
) -> None:
    spec = pb.GenerationSpec()
    spec.CopyFrom(SPEC)
    spec.panorama = True
    recorder.session.handle(draw_command(model_command, tmp_path, spec=spec))
    (failed,) = recorder.of("failed", "j1")
    assert (failed["reason"], failed["field"], failed["retryable"]) == ("INVALID_SPEC", "panorama", False)


def test_clip_skip_that_the_model_lacks_fails_and_frees_the_model(
    recorder: Recorder, model_command: dict[str, Any], tmp_path: Path
) -> None:
    spec = pb.GenerationSpec()
    spec.CopyFrom(SPEC)
    spec.clip_skip = 9
    recorder.session.handle(draw_command(model_command, tmp_path, spec=spec))
    assert recorder.of("failed", "j1")[0]["field"] == "clip_skip"
    recorder.session.handle({"command": "evict", "model": model_command["digest"]})
    assert recorder.of("models")[-1]["held"] == []


def test_lora_that_does_not_fit_fails_its_request_only(model_command: dict[str, Any], tmp_path: Path) -> None:
    recorder, file = Recorder(batch_cap=2), tmp_path / "odd.safetensors"
    name = "unet.mid_block.attentions.0.proj_in"
    save_file({f"{name}.lora_A.weight": torch.ones(1, 3), f"{name}.lora_B.weight": torch.ones(3, 1)}, file)
    lora = {"name": "odd", "digest": "c" * 64, "path": str(file), "strength": 1.0}
    recorder.session.handle(draw_command(model_command, tmp_path, "j1"))
    recorder.session.handle(draw_command(model_command, tmp_path, "j2") | {"loras": [lora]})
    recorder.run()
    (failed,) = recorder.of("failed")
    assert (failed["job"], failed["reason"], failed["retryable"]) == ("j2", "BAD_INPUT", False)
    assert failed["message"].startswith(f"loras: 'odd': the LoRA does not fit this model: {name}")
    assert len(recorder.of("finished", "j1")) == 1


def test_embedding_changes_the_pictures_of_its_request_only(
    model_command: dict[str, Any], tmp_path: Path
) -> None:
    recorder, file = Recorder(), tmp_path / "rex.bin"
    torch.save({"<rex>": torch.ones(2, 32) * 3}, file)
    rex = {"name": "rex", "path": str(file), "token": "", "negative": False}
    for job, more in (("j1", {}), ("j2", {"embeddings": [rex]}), ("j3", {})):
        recorder.session.handle(draw_command(model_command, tmp_path, job) | more)
    recorder.run()
    digests = [[event["digest"] for event in recorder.of("drawn", job)] for job in ("j1", "j2", "j3")]
    assert digests[0] == digests[2]
    assert not set(digests[0]) & set(digests[1])


def test_damaged_model_fails_its_request_only(
    recorder: Recorder, model_command: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(tiny_model_dir, tmp_path / "broken"))
    shutil.rmtree(broken / "unet")
    recorder.session.handle(draw_command(model_of(broken, "b" * 64), tmp_path, "bad"))
    recorder.session.handle(draw_command(model_command, tmp_path, "good"))
    recorder.run()
    assert recorder.of("failed", "bad")[0]["reason"] == "BAD_INPUT"
    assert recorder.of("finished", "good")


def test_lack_of_memory_is_reported_as_such(
    recorder: Recorder, model_command: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine_module, "predict", no_memory)
    recorder.session.handle(draw_command(model_command, tmp_path))
    recorder.run()
    (failed,) = recorder.of("failed", "j1")
    assert (failed["reason"], failed["retryable"]) == ("OUT_OF_DEVICE_MEMORY", False)
    assert str(OutOfDeviceMemory("the device's memory is too small")) in failed["message"]


def test_unforeseen_fault_tells_nothing_and_may_be_tried_again(
    recorder: Recorder, model_command: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(child_module, "finish", fault)
    recorder.session.handle(draw_command(model_command, tmp_path))
    recorder.run()
    (failed,) = recorder.of("failed", "j1")
    assert (failed["reason"], failed["retryable"]) == ("INTERNAL", True)
    assert "secret" not in failed["message"]


def test_broken_device_ends_the_process(
    recorder: Recorder, model_command: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(engine_module, "predict", broken)
    recorder.session.handle(draw_command(model_command, tmp_path))
    with pytest.raises(torch.AcceleratorError):
        recorder.run()


def test_prompt_that_is_cut_ends_in_the_warnings(
    recorder: Recorder, model_command: dict[str, Any], tmp_path: Path
) -> None:
    spec = pb.GenerationSpec()
    spec.CopyFrom(SPEC)
    spec.prompt = "robot " * 90
    recorder.session.handle(draw_command(model_command, tmp_path, spec=spec))
    recorder.run()
    assert "too long" in recorder.of("finished", "j1")[0]["warnings"][0]


def test_black_picture_is_delivered_with_a_warning(
    recorder: Recorder, model_command: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[torch.Tensor] = []

    def decode_second_black(components: Any, latents: torch.Tensor) -> torch.Tensor:
        decoded.append(decode(components, latents))
        return decoded[-1] * (len(decoded) == 1)

    monkeypatch.setattr(stages, "decode", decode_second_black)
    recorder.session.handle(draw_command(model_command, tmp_path))
    recorder.run()
    assert len(recorder.of("drawn", "j1")) == 2
    assert recorder.of("finished", "j1")[0]["warnings"] == ["picture 2 is black all over"]


def test_model_can_be_loaded_ahead(recorder: Recorder, model_command: dict[str, Any], tmp_path: Path) -> None:
    recorder.session.handle({"command": "load", "model": model_command})
    recorder.session.handle(draw_command(model_command, tmp_path))
    assert len(recorder.of("loading")) == 1


def test_model_that_cannot_be_loaded_ahead_harms_nothing(recorder: Recorder, tmp_path: Path) -> None:
    recorder.session.handle({"command": "load", "model": model_of(tmp_path / "none", "c" * 64)})
    assert recorder.of("models")[-1]["held"] == []


def test_waiting_child_says_that_it_lives(
    recorder: Recorder, model_command: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "_ALIVE_S", 0.01)
    commands: queue.Queue[Any] = queue.Queue()
    said: list[str] = []

    def emit(event: Any) -> None:
        said.append(event["event"])
        if len(said) == 3:
            commands.put({"command": "shutdown"})

    serve(recorder.session, commands, emit)
    assert said[:3] == ["alive"] * 3


@pytest.mark.parametrize(("asked", "expected"), [(123, 123), (0, 8 * 1024**3)])
def test_memory_budget_on_a_cpu(asked: int, expected: int) -> None:
    assert memory_budget_bytes(torch.device("cpu"), asked) == expected


async def test_process_draws_and_ends_when_told(model_command: dict[str, Any], tmp_path: Path) -> None:
    seen = []
    async with await ChildProcess.start("services.inference.child", "--device", "cpu") as process:
        async for event in process.events():
            seen.append(event["event"])
            if event["event"] == "ready":
                await process.send(draw_command(model_command, tmp_path))
            if event["event"] == "finished":
                await process.send({"command": "shutdown"})
        status = await process.wait()
    assert status == "ended"
    assert (seen[0], seen[-1]) == ("ready", "finished")
    assert (tmp_path / "j1" / "1").read_bytes().startswith(b"\x89PNG")
