"""The gRPC services as somebody with nothing but their address meets them: by reflection."""

import time
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.e2e.running import Platform

DEV = "dev"


class Reflected:
    """A service known only by what its server says about itself."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = DescriptorPool(self.database)

    def services(self) -> set[str]:
        return set(self.database.get_services())

    def call(self, method: str, **body: Any) -> dict[str, Any]:
        """A unary call, JSON in and out."""
        return next(self.stream(method, **body))

    def stream(self, method: str, **body: Any) -> Iterator[dict[str, Any]]:
        """A call whose answers may be many."""
        service, name = method.split("/")
        described = self.pool.FindServiceByName(service).FindMethodByName(name)
        answer_class = GetMessageClass(described.output_type)
        request = json_format.ParseDict(body, GetMessageClass(described.input_type)())
        # Reflection does not say here whether answers stream; a streaming call reads one answer as well as many.
        caller = self.channel.unary_stream(
            f"/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer_class.FromString,
        )
        for answer in caller(request, timeout=120):
            yield json_format.MessageToDict(answer, preserving_proto_field_name=True)


@pytest.fixture(scope="module")
def training(platform: Platform) -> Iterator[Reflected]:
    service = Reflected(platform.address("TRAINING"))
    yield service
    service.channel.close()


@pytest.fixture(scope="module")
def inference(platform: Platform) -> Iterator[Reflected]:
    service = Reflected(platform.address("INFERENCE"))
    yield service
    service.channel.close()


def training_spec(archive: str, updates: int) -> dict[str, Any]:
    concept = {
        "instance_data": {"archive_url": archive, "field": "pictures"},
        "instance_prompt": "a photo of a sks robot",
        "class_prompt": "a robot",
        "num_class_images": 1,
    }
    return {"concepts": [concept], "max_train_steps": updates, "resolution": 256}


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("TRAINING", {"likeness.training.v1.TrainingService", "likeness.worker.v1.WorkerService"}),
        ("INFERENCE", {"likeness.inference.v1.InferenceService", "likeness.worker.v1.WorkerService"}),
        ("STORAGE", {"likeness.storage.v1.StorageService", "likeness.access.v1.AccessService"}),
    ],
    ids=["training", "inference", "storage"],
)
def test_each_server_names_its_services_and_is_healthy(
    platform: Platform, where: str, names: set[str]
) -> None:
    reflected = Reflected(platform.address(where))
    with reflected.channel:
        assert names <= reflected.services()
        health = health_pb2_grpc.HealthStub(reflected.channel)
        for name in names:
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_training_is_created_read_listed_watched_and_cancelled(training: Reflected, archive: str) -> None:
    service = "likeness.training.v1.TrainingService"
    request_id = str(uuid.uuid4())
    spec = training_spec(archive, updates=5000) | {"preview_prompts": ["a sks robot"], "preview_steps": 10}
    created = training.call(f"{service}/CreateTrainingJob", project_id=DEV, spec=spec, request_id=request_id)[
        "job"
    ]
    again = training.call(f"{service}/CreateTrainingJob", project_id=DEV, spec=spec, request_id=request_id)[
        "job"
    ]
    name = {"job_id": created["job_id"], "project_id": DEV}
    assert created["state"] == "JOB_STATE_QUEUED"
    assert again["job_id"] == created["job_id"], "the same request id gives the same job"
    assert created["spec"]["num_train_epochs"], "a stored specification is complete"

    events: list[dict[str, Any]] = []
    for answer in training.stream(f"{service}/WatchTrainingJob", **name):
        event = answer["event"]
        events.append(event)
        numbers = [int(seen["progress"].get("step", 0)) for seen in events if "progress" in seen]
        pictures = [seen["message"] for seen in events if "image_key" in seen]
        if event["stage"] == "JOB_STAGE_TRAINING" and pictures and numbers[-1:] >= [2]:
            break
    assert pictures[0] == "preview-000010-1.png"
    order = ["JOB_STAGE_QUEUED", "JOB_STAGE_FETCHING", "JOB_STAGE_CLASS_IMAGES", "JOB_STAGE_TRAINING"]
    places = [order.index(event["stage"]) for event in events]
    assert places == sorted(places)

    read = training.call(f"{service}/GetTrainingJob", **name)["job"]
    assert read["state"] == "JOB_STATE_RUNNING"
    listed = training.call(f"{service}/ListTrainingJobs", project_id=DEV, page_size=5)["jobs"]
    assert listed[0]["job_id"] == created["job_id"]
    cancelled = training.call(f"{service}/CancelTrainingJob", **name)["job"]
    assert cancelled["state"] == "JOB_STATE_CANCELLED"
    last = list(training.stream(f"{service}/WatchTrainingJob", **name))[-1]["event"]
    assert last["state"] == "JOB_STATE_CANCELLED", "watching an ended job tells its end and stops"


def test_a_drawing_is_created_and_its_progress_streams(inference: Reflected) -> None:
    service = "likeness.inference.v1.InferenceService"
    spec = {"prompt": "a red circle", "num_inference_steps": 30, "num_images": 2, "seed": "5", "width_px": 256,
            "height_px": 256}  # fmt: skip
    job = inference.call(f"{service}/CreateGenerationJob", project_id=DEV, spec=spec)["job"]
    name = {"job_id": job["job_id"], "project_id": DEV}
    began = time.monotonic()
    events = [answer["event"] for answer in inference.stream(f"{service}/WatchGenerationJob", **name)]
    assert events[-1]["state"] == "JOB_STATE_SUCCEEDED", events[-1]
    fractions = [event["progress"]["fraction"] for event in events if "fraction" in event.get("progress", {})]
    assert fractions == sorted(fractions)
    assert time.monotonic() - began < 60
    done = inference.call(f"{service}/GetGenerationJob", **name)["job"]
    assert [image["seed"] for image in done["result"]["images"]] == ["5", "6"]
    assert all(image["width_px"] == 256 for image in done["result"]["images"])


def test_faults_of_a_specification_are_named_together(training: Reflected) -> None:
    spec = {"concepts": [], "max_train_steps": 10**7, "learning_rate": -1}
    with pytest.raises(grpc.RpcError) as caught:
        training.call("likeness.training.v1.TrainingService/CreateTrainingJob", project_id=DEV, spec=spec)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    for field in ("concepts", "max_train_steps", "learning_rate"):
        assert field in str(caught.value.details())


def test_another_project_does_not_find_the_job(training: Reflected, archive: str) -> None:
    service = "likeness.training.v1.TrainingService"
    job = training.call(f"{service}/CreateTrainingJob", project_id=DEV, spec=training_spec(archive, 1))["job"]
    with pytest.raises(grpc.RpcError) as caught:
        training.call(f"{service}/GetTrainingJob", project_id="other", job_id=job["job_id"])
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    training.call(f"{service}/CancelTrainingJob", project_id=DEV, job_id=job["job_id"])
