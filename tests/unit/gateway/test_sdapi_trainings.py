"""Trainings of the stablediffusionapi dialect: the conventions of the wire, and the life of a training."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import pytest
from likeness.training.v1 import training_job_pb2 as pb

from services.adapters.clock import RealClock
from services.domain import life_cycle as life
from services.domain.job import JobKind, JobRef, Stage
from services.domain.ports import Revision
from services.gateway.dialects.sdapi import training as trainings
from services.gateway.limits import Limit, RateLimiter
from services.gateway.sdapi import SdapiPolicy
from services.gateway.webhooks import WebhookPolicy, WebhookSender
from services.jobs.views import Views, parsed
from tests.unit.gateway.harness import KEY, OTHER_KEY
from tests.unit.gateway.sdapi_world import BODY, World, world

START, STATUS = "/api/v3/fine_tune", "/api/v3/fine_tune_status"


@pytest.fixture
async def sd() -> AsyncIterator[World]:
    async with world() as made:
        yield made


async def spec_of(sd: World, training_id: str) -> pb.TrainingSpec:
    record = await sd.record(training_id)
    spec = record.spec or json.loads(sd.documents.held[record.spec_key])
    return parsed(spec, pb.TrainingSpec())


async def test_a_start_is_answered_with_an_id_under_both_names(sd: World) -> None:
    body = await sd.post(START, BODY)
    training_id = body["training_id"]
    assert len(training_id) == 10
    assert training_id.isalnum()
    assert body == {
        "status": "success",
        "messege": "deploying_gpu",
        "message": "deploying_gpu",
        "data": "it will take upto 25 minutes.",
        "training_id": training_id,
        "model_id": training_id,
    }


async def test_the_training_is_what_was_asked_for(sd: World) -> None:
    spec = await spec_of(sd, await sd.train())
    [concept] = spec.concepts
    assert list(concept.instance_data.image_urls.urls) == BODY["images"]
    assert (concept.instance_prompt, concept.class_prompt) == ("photo of adhik person", "photo of person")
    assert (spec.base_model, spec.seed, spec.max_train_steps) == ("portraitplus-diffusion", 0, 2000)
    assert (spec.learning_rate, concept.num_class_images) == (3e-4, 48), "as the catalogue advises"
    assert (spec.resolution, spec.center_crop, spec.min_usable_images) == (512, True, 3)
    assert spec.with_prior_preservation
    assert spec.train_text_encoder


async def test_the_key_is_kept_nowhere(sd: World) -> None:
    training_id = await sd.train()
    record = await sd.record(training_id)
    assert KEY not in json.dumps([dict(record.spec), dict(record.options)])
    assert not any(KEY.encode() in held for held in sd.documents.held.values())


@pytest.mark.parametrize("sent", [{}, {"key": ""}, {"key": None}, {"key": "null"}])
async def test_without_a_key_in_the_body_the_header_counts(sd: World, sent: dict[str, Any]) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = await sd.http.post("/api/v3/finetune_list", json=sent, headers=headers)
    assert answer.json()["data"] == []


@pytest.mark.parametrize(
    "content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded", ""]
)
async def test_json_is_read_whatever_its_content_type(sd: World, content_type: str) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = await sd.http.post(START, content=json.dumps(BODY), headers=headers)
    assert answer.json()["status"] == "success"


@pytest.mark.parametrize("name", ["images[]", "images[0]", "images"])
async def test_a_form_is_read_with_lists_in_any_spelling(sd: World, name: str) -> None:
    fields = [(key, str(value)) for key, value in BODY.items() if key != "images"]
    form = urlencode([*fields, *((name, url) for url in BODY["images"])])
    answer = await sd.http.post(
        START, content=form, headers={"Content-Type": "application/x-www-form-urlencoded"}
    )
    spec = await spec_of(sd, answer.json()["training_id"])
    assert list(spec.concepts[0].instance_data.image_urls.urls) == BODY["images"]


async def test_any_page_may_call_with_any_headers(sd: World) -> None:
    asked = {
        "Origin": "https://app.example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type, access-control-allow-origin",
    }
    preflight = await sd.http.options(START, headers=asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert preflight.headers["access-control-allow-headers"] == asked["Access-Control-Request-Headers"]
    answer = await sd.http.post(START, json=BODY, headers={"Origin": asked["Origin"]})
    assert answer.headers["access-control-allow-origin"] == "*"


async def test_calls_from_pages_can_be_switched_off() -> None:
    async with world(settings={"sdapi_cors": False}) as sd:
        answer = await sd.http.post(START, json=BODY, headers={"Origin": "https://app.example.org"})
        assert "access-control-allow-origin" not in answer.headers


async def test_only_post_is_served_with_or_without_a_slash_at_the_end(sd: World) -> None:
    answer = await sd.http.get(START)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST, OPTIONS")
    assert answer.json()["status"] == "error"
    assert (await sd.post(START + "/", BODY))["status"] == "success"
    unknown = await sd.http.post("/api/v3/no_such", json={})
    assert (unknown.status_code, unknown.json()["status"]) == (404, "error")


async def test_a_body_that_is_too_large_is_refused(sd: World) -> None:
    answer = await sd.http.post(START, json=BODY | {"x": "y" * 5_000_000})
    assert (answer.status_code, answer.json()["status"]) == (413, "error")


# --- errors --------------------------------------------------------------------------------------------------

ERRORS = {
    "bad key": (START, {"key": "wrong"}, 401, "Invalid Api Key"),
    "key that is no text": (START, {"key": 5}, 401, "Invalid Api Key"),
    "unknown base": (START, BODY | {"base_model_id": "nothing"}, 404, "Model id not found"),
    "base that is no id": (START, BODY | {"base_model_id": "no/../thing"}, 404, "Model id not found"),
    "unknown training": (f"{STATUS}/F5jvdzGnYi", {"key": KEY}, 404, "Training id not found"),
    "unknown training to delete": ("/api/v3/finetune/delete/x", {"key": KEY}, 404, "Training id not found"),
    "missing fields": (
        START,
        {"key": KEY},
        400,
        {
            "instance_prompt": ["The instance prompt field is required."],
            "images": ["The images field is required."],
        },
    ),
    "bad values": (
        START,
        BODY | {"max_train_steps": "-3", "seed": "x"},
        400,
        {
            "seed": ["The seed must be an integer."],
            "max_train_steps": ["The max train steps must be at least 0."],
        },
    ),
    "bad webhook": (
        START,
        BODY | {"webhook": "ftp://x"},
        400,
        {"webhook": ["The webhook must be a usable address (only http and https addresses are fetched)."]},
    ),
}


@pytest.mark.parametrize("strict", [False, True], ids=["legacy", "strict"])
@pytest.mark.parametrize("case", ERRORS)
async def test_an_error_has_its_sentence_under_both_names(case: str, strict: bool) -> None:
    path, body, status, message = ERRORS[case]
    async with world(SdapiPolicy(strict=strict)) as sd:
        answer = await sd.http.post(path, json=body)
    assert answer.status_code == (status if strict else 200)
    shown = answer.json()
    assert shown["status"] == "error"
    assert shown["messege"] == shown["message"]
    assert shown["message"] == message


async def test_malformed_json_says_so(sd: World) -> None:
    for content in (b"{nonsense", b"[1]", b"nonsense", b'"text"', b"\xff\xfe"):
        body = (await sd.http.post(START, content=content)).json()
        assert (body["status"], body["message"]) == ("error", "Invalid JSON body"), content
        assert body["tip"]


async def test_a_private_webhook_is_refused(sd: World) -> None:
    body = await sd.post(START, BODY | {"webhook": "http://127.0.0.1:9000/x"})
    [sentence] = body["message"]["webhook"]
    assert sentence.startswith("The webhook must be a usable address (")
    assert "loopback" in sentence


async def test_too_many_requests_are_told_to_wait() -> None:
    limits = RateLimiter({"start": Limit(9, 9), "read": Limit(1, 1), "steer": Limit(1, 1)})
    async with world(SdapiPolicy(strict=True), limits) as sd:
        answers = [await sd.http.post("/api/v3/finetune_list", json={"key": KEY}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert answers[1].headers["retry-after"] == "5"
    assert answers[1].json()["message"] == "Rate limit exceeded"
    assert answers[1].json()["tips"]


async def test_a_project_has_so_many_trainings_under_way_and_no_more() -> None:
    async with world(SdapiPolicy(jobs_at_once=2)) as sd:
        first = await sd.train()
        await sd.train()
        assert (await sd.post(START, BODY))["message"] == "Rate limit exceeded"
        await sd.fail(first)
        assert (await sd.post(START, BODY))["status"] == "success"


async def test_without_storage_the_answer_is_503(sd: World) -> None:
    sd.access.down = True
    answer = await sd.http.post(START, json=BODY)
    assert (answer.status_code, answer.json()["status"]) == (503, "error")


# --- the life of a training ----------------------------------------------------------------------------------

STATUS_KEYS: dict[str, Any] = {
    "status": str, "messege": str, "message": str, "data": str, "training_id": str, "model_id": str,
    "model_training_status": str, "training_status": str, "logs": str, "eta": int, "progress": float,
    "current_step": int, "max_train_steps": int, "test_image": (str, type(None)), "created_at": str,
}  # fmt: skip


def check_shape(body: dict[str, Any]) -> None:
    assert body.keys() == STATUS_KEYS.keys()
    for key, kind in STATUS_KEYS.items():
        assert isinstance(body[key], kind), key


async def test_the_status_words_follow_the_training(sd: World) -> None:
    training_id = await sd.train()
    words = [(await sd.status(training_id))["messege"]]
    await sd.run_to_training(training_id)
    words.append((await sd.status(training_id))["messege"])
    for stage in (Stage.EXPORTING, Stage.UPLOADING):
        await sd.enter(training_id, stage)
        words.append((await sd.status(training_id))["messege"])
    await sd.finish(training_id)
    body = await sd.status(training_id)
    assert [*words, body["messege"]] == [
        "deploying_gpu",
        "training_started",
        "trained_model_compressing",
        "trained_model_uploading",
        "model_ready",
    ]
    check_shape(body)
    assert (body["eta"], body["progress"], body["current_step"]) == (0, 1.0, 2000)
    assert body["test_image"].startswith("http://likeness.test/files/")
    lines = body["data"].split(" /n ")
    assert lines[0] == "it will take upto 25 minutes."
    assert lines[-1] == "the model is ready"
    assert "a remark" in lines
    assert "loss 0.1250" in body["data"]


async def test_numbers_of_a_running_training_move(sd: World) -> None:
    training_id = await sd.train(max_train_steps=40)
    await sd.run_to_training(training_id)
    report = {"stage": "JOB_STAGE_TRAINING", "total_steps": "40", "fraction": 0.5, "seconds_left": 12.25}
    await sd.platform.progress.publish_progress("first", training_id, report | {"step": "20"})
    body = await sd.status(training_id)
    check_shape(body)
    assert (body["current_step"], body["max_train_steps"], body["eta"], body["progress"]) == (20, 40, 13, 0.5)
    await sd.platform.progress.publish_progress("first", training_id, report | {"step": "40"})
    assert (await sd.status(training_id))["messege"] == "training_success"


async def test_a_failure_says_why_with_the_callers_field(sd: World) -> None:
    training_id = await sd.train()
    await sd.fail(training_id)
    body = await sd.status(training_id)
    check_shape(body)
    assert (body["status"], body["messege"]) == ("failed", "training_failed")
    assert body["data"].endswith("images: no picture could be read")


@pytest.mark.parametrize("path", ["cancle_training", "cancel_training"])
async def test_a_cancelled_training_stays_cancelled(sd: World, path: str) -> None:
    training_id = await sd.train()
    for _ in range(2):
        body = await sd.post(f"/api/v3/{path}/{training_id}")
        assert body == {
            "status": "success",
            "messege": "training cancelled",
            "message": "training cancelled",
            "data": "",
            "training_id": training_id,
        }
    shown = await sd.status(training_id)
    assert (shown["status"], shown["messege"]) == ("failed", "training_cancelled")


async def test_what_has_ended_is_not_cancelled(sd: World) -> None:
    training_id = await sd.train()
    await sd.succeed(training_id)
    assert (await sd.post(f"/api/v3/cancel_training/{training_id}"))["status"] == "error"
    assert (await sd.status(training_id))["messege"] == "model_ready"


async def test_the_list_has_ids_newest_first_and_details_when_asked(sd: World) -> None:
    ids = [await sd.train() for _ in range(3)]
    await sd.succeed(ids[0])
    await sd.fail(ids[1])
    body = await sd.post("/api/v3/finetune_list")
    assert (body["status"], body["messege"]) == ("success", "model list")
    assert body["data"] == [ids[2], ids[0]]
    detailed = (await sd.post("/api/v3/finetune_list", {"detail": "yes"}))["data"]
    assert [item["status"] for item in detailed] == ["deploying_gpu", "model_ready"]
    assert detailed[0]["instance_prompt"] == "photo of adhik person"
    other = await sd.http.post("/api/v3/finetune_list", json={"key": OTHER_KEY})
    assert other.json()["data"] == []


async def test_a_deleted_training_is_gone_with_its_model(sd: World) -> None:
    done, running = await sd.train(), await sd.train()
    await sd.succeed(done)
    for training_id in (done, running):
        body = await sd.post(f"/api/v3/finetune/delete/{training_id}")
        assert (body["status"], body["messege"]) == ("success", "model deleted")
        assert (await sd.status(training_id))["message"] == "Training id not found"
    assert ("first", done) not in sd.storage.models
    assert (await sd.post("/api/v3/finetune_list"))["data"] == []


async def test_another_keys_training_is_unknown(sd: World) -> None:
    training_id = await sd.train()
    await sd.succeed(training_id)
    for path in (STATUS, "/api/v3/finetune/delete", "/api/v3/cancle_training"):
        answer = await sd.http.post(f"{path}/{training_id}", json={"key": OTHER_KEY})
        assert answer.json()["message"] == "Training id not found"
    assert (await sd.status(training_id))["messege"] == "model_ready"


async def test_the_status_of_a_catalogue_model_is_ready(sd: World) -> None:
    body = await sd.status("pocket")
    assert (body["messege"], body["model_id"]) == ("model_ready", "pocket")


# --- the siblings of fine_tune -------------------------------------------------------------------------------


async def test_version_two_trains_each_part_for_its_own_steps(sd: World) -> None:
    asked = BODY | {"learning_rate_unet": "2e-6", "steps_unet": "1500", "steps_text_encoder": None}
    body = await sd.post("/api/v3/fine_tune_v2", asked)
    spec = await spec_of(sd, body["training_id"])
    assert (spec.max_train_steps, spec.unet_steps, spec.text_encoder_steps) == (1500, 0, 350)
    assert (spec.learning_rate, spec.text_encoder_learning_rate) == (2e-6, 1e-6)
    assert spec.train_text_encoder


async def test_version_two_leaves_a_part_alone_that_gets_no_steps(sd: World) -> None:
    body = await sd.post("/api/v3/fine_tune_v2", BODY | {"steps_text_encoder": "0", "steps_unet": 20})
    spec = await spec_of(sd, body["training_id"])
    assert (spec.max_train_steps, spec.train_text_encoder) == (20, False)
    assert spec.learning_rate == 3e-4, "the catalogue's, as the request has none"
    refused = await sd.post("/api/v3/fine_tune_v2", BODY | {"learning_rate_unet": "0.1", "steps_unet": 9999})
    assert list(refused["message"]) == ["learning_rate_unet", "steps_unet"]


@pytest.mark.parametrize(
    ("sent", "method"),
    [(None, "LORA"), ("lora", "LORA"), ("LyCORIS", "LOCON")],
    ids=["absent", "lora", "lycoris"],
)
async def test_a_lora_is_trained_by_the_catalogues_numbers(sd: World, sent: str | None, method: str) -> None:
    defaults = sd.storage.models["", "pocket"].manifest.training_defaults
    defaults.lora_rank, defaults.lora_alpha, defaults.lora_learning_rate = 8, 4.0, 2e-4
    asked = BODY | {"lora_type": sent, "base_model_id": None, "negative_prompt": "blue", "wandb_key": "w"}
    body = await sd.post("/api/v3/lora_fine_tune", asked)
    assert body["data"] == "it will take upto 30 minutes."
    spec = await spec_of(sd, body["training_id"])
    assert spec.method == pb.TrainingMethod.Value(f"TRAINING_METHOD_{method}")
    assert (spec.lora.rank, spec.lora.alpha, spec.learning_rate) == (8, 4.0, 2e-4)
    assert (spec.base_model, spec.test_negative_prompt) == ("pocket", "blue")


@pytest.mark.parametrize(
    ("name", "sent"), [("lora_type", "dora"), ("base_model_type", "flux"), ("base_model_type", "sdxl")]
)
async def test_a_lora_of_another_kind_is_refused(sd: World, name: str, sent: str) -> None:
    body = await sd.post("/api/v3/lora_fine_tune", BODY | {name: sent, "base_model_id": None})
    assert list(body["message"]) == [name]


async def test_the_sandbox_trains_shortly_on_the_embedded_model_and_apart(sd: World) -> None:
    start = await sd.post("/api/sandbox/v3/fine_tune", BODY | {"base_model_id": "nothing"})
    training_id = start["training_id"]
    assert (start["messege"], len(training_id)) == ("deploying_gpu", 10)
    spec = await spec_of(sd, training_id)
    assert (spec.base_model, spec.max_train_steps) == ("pocket", 200)
    await sd.succeed(training_id)
    shown = await sd.post(f"/api/sandbox/v3/fine_tune_status/{training_id}")
    check_shape(shown)
    assert shown["messege"] == "model_ready"
    for path in (STATUS, "/api/v3/finetune/delete", "/api/v3/cancle_training"):
        assert (await sd.post(f"{path}/{training_id}"))["message"] == "Training id not found"
    assert (await sd.post("/api/v3/finetune_list"))["data"] == []
    drawing = {"model_id": training_id, "prompt": "x"}
    assert (await sd.post("/api/v4/dreambooth", drawing))["status"] == "processing"
    real = await sd.train()
    assert (await sd.post(f"/api/sandbox/v3/fine_tune_status/{real}"))["message"] == "Training id not found"


async def test_what_the_sandbox_made_goes_with_its_record(sd: World) -> None:
    training_id = (await sd.post("/api/sandbox/v3/fine_tune", BODY))["training_id"]
    await sd.succeed(training_id)
    await sd.training.admission.delete(JobRef(JobKind.TRAIN, "first", training_id))
    drawing = {"model_id": training_id, "prompt": "x"}
    assert (await sd.post("/api/v4/dreambooth", drawing))["message"] == "Model id not found"


# --- webhooks ------------------------------------------------------------------------------------------------


async def told(sd: World, wanted: int, refused: int = 0) -> list[dict[str, Any]]:
    """What a receiver gets of all trainings, until it has taken as many calls as wanted.

    Args:
        sd: the world.
        wanted: calls that are taken.
        refused: how often each event is refused before it is taken.
    """
    got: list[dict[str, Any]] = []
    ids: list[str] = []
    enough = asyncio.Event()
    views = Views(sd.documents, sd.platform.progress)

    async def post(url: str, body: bytes, headers: Any, timeout_s: float) -> int:
        ids.append(headers["X-Webhook-Id"])
        if ids.count(ids[-1]) <= refused:
            return 500
        got.append(json.loads(body))
        if len(got) == wanted:
            enough.set()
        return 204

    async def render(revision: Revision, number: int) -> bytes:
        job = await views.training_job(revision, sd.training.records.now_ms())
        return await sd.api.training_document(job, number, "")

    sender = WebhookSender(
        feed=sd.platform.job_feed,
        log=sd.platform.job_log,
        hooks=sd.platform.small,
        clock=RealClock(),
        post=post,
        render=render,
        dialects=frozenset({"sdapi"}),
        kind=JobKind.TRAIN,
        events_of=trainings.events_of,
        policy=WebhookPolicy(tries=refused + 1, pause_s=0.02),
    )
    task = asyncio.create_task(sender.run())
    await asyncio.wait_for(enough.wait(), 10)
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(ids) == (refused + 1) * len(set(ids)), "one id an event, for every try of it"
    return got


async def test_a_webhook_is_told_of_all_eight_statuses_in_order(sd: World) -> None:
    training_id = await sd.train(webhook="https://hooks.example.org/x")
    await sd.succeed(training_id)
    got = await told(sd, 8)
    assert [body["training_status"] for body in got] == list(trainings.STATUSES)
    assert {body["status"] for body in got} == {"success"}
    last = got[-1]
    assert last["test_image"].startswith("http://likeness.test/files/")
    assert (last["model_id"], last["training_id"], last["eta"]) == (training_id, training_id, 0)
    assert last["messege"] == last["message"] == "model_ready"
    assert last["logs"] == "the model is ready"


async def test_a_status_that_is_refused_is_told_again_before_the_next(sd: World) -> None:
    training_id = await sd.train(webhook="https://hooks.example.org/x")
    await sd.succeed(training_id)
    got = await told(sd, 8, refused=2)
    assert [body["training_status"] for body in got] == list(trainings.STATUSES)


async def test_a_sender_that_comes_later_goes_on_where_the_one_before_ended(sd: World) -> None:
    training_id = await sd.train(webhook="https://hooks.example.org/x")
    await sd.run_to_training(training_id)
    first = await told(sd, 2)
    await sd.enter(training_id, Stage.EXPORTING)
    await sd.finish(training_id)
    then = await told(sd, 6)
    assert [body["training_status"] for body in first + then] == list(trainings.STATUSES)


async def test_a_webhook_is_told_of_a_failure_and_of_a_cancellation(sd: World) -> None:
    hook = "https://hooks.example.org/x"
    failed, cancelled = await sd.train(webhook=hook), await sd.train(webhook=hook)
    await sd.fail(failed)
    await sd.move(cancelled, life.cancel)
    got = await told(sd, 4)
    by_id = {
        name: [body["training_status"] for body in got if body["model_id"] == name]
        for name in (failed, cancelled)
    }
    assert by_id == {
        failed: ["deploying_gpu", "training_failed"],
        cancelled: ["deploying_gpu", "training_cancelled"],
    }
    assert {body["status"] for body in got if body["training_status"] == "training_failed"} == {"failed"}
