"""The child's side of a training: commands read, events told, faults put into words."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.json_format import MessageToDict
from likeness.storage.v1.artifact_pb2 import Dataset, DatasetImage, DatasetReport, ImageCaption
from likeness.training.v1 import training_job_pb2 as pb

from services.adapters.manifests import to_json
from services.domain.errors import BadInput, OutOfDeviceMemory
from services.domain.training_spec import resolve_training_spec
from services.trainer import child, updates
from services.trainer.buckets import Size
from services.trainer.checkpoint import CheckpointMismatch
from services.trainer.delivery import concept_entries
from services.trainer.run import Ending, Progress, Request, Stage
from services.trainer.support import check_supported
from tests.unit.trainer.harness import Bench, Recorder, complete_spec, make_concept


class Link:
    """Collects events, hands out commands."""

    def __init__(self, *commands: str) -> None:
        self.events: list[dict[str, Any]] = []
        self.commands = [{"command": command} for command in commands]

    def emit(self, event: Any) -> None:
        # What cannot be written as one line of JSON must fail here as it would on the socket.
        self.events.append(json.loads(json.dumps(event)))

    def poll(self) -> dict[str, str] | None:
        return self.commands.pop(0) if self.commands else None

    def observer(self) -> child.LinkObserver:
        return child.LinkObserver(self.emit, self.poll)

    def kinds(self) -> list[str]:
        return [event["event"] for event in self.events]


def a_concept() -> pb.Concept:
    concept = pb.Concept(instance_prompt="a sks dog", class_prompt="a dog", use_captions=True)
    concept.instance_data.dataset_key = concept.class_data.dataset_key = "given"
    return concept


def test_a_specification_with_only_defaults_is_one_the_recipe_supports() -> None:
    check_supported(resolve_training_spec(pb.TrainingSpec(concepts=[a_concept()])))


def test_a_train_command_becomes_a_run_with_captions_and_seeds(tmp_path: Path) -> None:
    spec = complete_spec(seed=2**63 - 1)
    spec.concepts.append(a_concept())
    instance = [
        {"id": "a.png", "path": "/x/0.png", "caption": "sks dog asleep"},
        {"id": "b.png", "path": "/x/1.png", "caption": ""},
    ]
    classes = [{"id": "c.png", "path": "/x/2.png", "caption": "never used"}]
    command = {
        "spec": MessageToDict(spec, preserving_proto_field_name=True),
        "model_folder": "/models/base",
        "model_digest": "abc",
        "concepts": concept_entries(spec, [(instance, classes)]),
        "workdir": str(tmp_path),
        "resume_from": None,
        "checkpoint_interval_s": 5,
    }
    run = child.run_of(json.loads(json.dumps(command)), torch.device("cpu"))
    assert run.spec == spec
    assert run.resume_from is None
    (concept,) = run.concepts
    assert [picture.prompt for picture in concept.instance_pictures] == ["sks dog asleep", "a sks dog"]
    assert [picture.prompt for picture in concept.class_pictures] == ["a dog"]
    assert {picture.seed for picture in concept.pictures} == {2**63 - 1}
    assert [picture.sample_id for picture in concept.pictures] == [
        "0/instance/a.png",
        "0/instance/b.png",
        "0/class/c.png",
    ]


def test_a_captioned_training_gets_what_storage_says_of_its_pictures(tmp_path: Path) -> None:
    spec = complete_spec(seed=9)
    spec.concepts.append(a_concept())
    images = [
        DatasetImage(
            id="x/a.png",
            width_px=80,
            height_px=60,
            caption_parts=ImageCaption(text="a", source="CAPTION_SOURCE_TEXT"),
        ),
        DatasetImage(id="x/b.png", width_px=60, height_px=80, caption_parts=ImageCaption()),
    ]
    file = tmp_path / "dataset.json"
    file.write_bytes(to_json(Dataset(images=images, report=DatasetReport(read=2))))
    stored = [{"id": image.id, "path": f"/x/{image.id}", "caption": ""} for image in images]
    command = {
        "spec": MessageToDict(spec, preserving_proto_field_name=True),
        "model_folder": "/models/base",
        "model_digest": "abc",
        "concepts": concept_entries(spec, [(stored, [])]),
        "workdir": str(tmp_path),
        "checkpoint_interval_s": 5,
    }
    assert child.run_of(command, torch.device("cpu")).captioned is None
    found = child.run_of(command | {"dataset": str(file)}, torch.device("cpu")).captioned
    assert found is not None
    assert found.report == DatasetReport(read=2)
    assert [(picture.prompt, picture.size, picture.seed) for picture in found.pictures] == [
        ("a", Size(80, 60), 9),
        ("a sks dog", Size(60, 80), 9),
    ]
    (concept,) = child.run_of(command, torch.device("cpu")).concepts
    assert [(picture.sample_id, picture.path) for picture in found.pictures] == [
        (picture.sample_id, picture.path) for picture in concept.instance_pictures
    ]


def test_a_concept_s_own_seed_goes_with_its_pictures() -> None:
    spec = complete_spec()
    spec.concepts.append(a_concept())
    spec.concepts[0].seed = 0
    (entry,) = concept_entries(spec, [([], [])])
    assert entry["seed"] == 0


def numbers(step: int, total: int = 100) -> Progress:
    return Progress(step, total, 0.5, 1e-6, 2.0, 9.0, 4.0)


def test_progress_is_thinned_out_but_never_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    link = Link()
    observer = link.observer()
    for step in range(1, 101):
        clock[0] += 0.01
        observer.progress(numbers(step))
    told = [event["step"] for event in link.events]
    assert told[0] == 1
    assert told[-1] == 100
    assert len(told) <= 6


def test_the_newest_wish_of_the_parent_counts() -> None:
    observer = Link("checkpoint", "yield").observer()
    assert observer.request() is Request.YIELD
    assert observer.request() is Request.NOTHING


def test_a_training_tells_its_stages_and_ends_with_its_files(bench: Bench) -> None:
    link = Link("checkpoint")
    run = bench.run(complete_spec(max_train_steps=2))
    outcome = child.train(run, link.observer())
    link.emit(child.ended_event(outcome))
    stages = [event for event in link.events if event["event"] == "stage"]
    assert [event["stage"] for event in stages] == list(Stage)
    assert [event["detail"] for event in stages] == ["", "fp32, sdpa, AdamW 32-bit, deterministic", ""]
    last = link.events[-1]
    assert (last["event"], last["ending"], last["step"]) == ("ended", "trained", 2)
    assert all(Path(file["file"]).is_file() for file in last["files"])
    assert "unet/diffusion_pytorch_model.safetensors" in {file["path"] for file in last["files"]}


def test_a_checkpoint_of_another_configuration_starts_the_training_anew_and_says_so(bench: Bench) -> None:
    data = (make_concept(bench.folder / "data"),)
    first = bench.train(complete_spec(), data, recorder=Recorder(ask={1: Request.YIELD}))
    run = bench.run(complete_spec(seed=8), data)
    with pytest.raises(CheckpointMismatch):
        bench.train(complete_spec(seed=8), data, resume_from=first.outcome.checkpoint)
    outcome = child.train(run, Link().observer())
    assert outcome.ending is Ending.TRAINED
    assert "started anew" in outcome.warnings[-1]


def test_a_known_fault_keeps_its_words_and_an_unknown_one_does_not() -> None:
    known = child.failed_event(BadInput("the model's unet lacks weights", "base_model"))
    assert (known["reason"], known["field"], known["retryable"]) == ("BAD_INPUT", "base_model", False)
    assert known["message"] == "base_model: the model's unet lacks weights"
    unknown = child.failed_event(RuntimeError("secret detail"))
    assert (unknown["reason"], unknown["message"], unknown["retryable"]) == (
        "INTERNAL",
        "internal error",
        True,
    )


def test_too_little_memory_ends_a_training_with_words_about_its_plan(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(updates, "per_sample_mse", no_memory)
    with pytest.raises(OutOfDeviceMemory) as caught:
        child.train(bench.run(complete_spec()), Link().observer())
    event = child.failed_event(caught.value)
    assert (event["reason"], event["retryable"]) == ("OUT_OF_DEVICE_MEMORY", False)
    assert event["message"].startswith(
        "the device's memory is too small for this training, which needs about"
    )


def test_the_worker_s_parent_process_starts_without_torch() -> None:
    program = "import sys, services.trainer.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
