"""Pictures of the stablediffusionapi dialect: drawing, fetching, the pictures' own addresses, and webhooks."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from likeness.inference.v1 import generation_job_pb2 as pb
from likeness.storage.v1 import model_pb2

from services.adapters.clock import RealClock
from services.domain import life_cycle as life
from services.domain.job import JobFailure, JobKind, JobRef, Stage
from services.domain.ports import Revision
from services.gateway.dialects.sdapi.schedulers import SCHEDULERS
from services.gateway.sdapi import SdapiPolicy
from services.gateway.webhooks import WebhookSender
from services.jobs.views import Views, parsed
from tests.unit.gateway.harness import KEY, OTHER_KEY
from tests.unit.gateway.sdapi_world import World, world

V3, V4, V6 = "/api/v3/dreambooth", "/api/v4/dreambooth", "/api/v6/images"
PICTURE, MASK = "https://f.example.org/1.png", "https://f.example.org/mask.png"
PLAIN: dict[str, Any] = {"model_id": "pocket", "prompt": "a robot", "enhance_prompt": "no"}

META: dict[str, Any] = {
    "prompt": str, "model_id": str, "negative_prompt": str, "scheduler": str, "scheduler_requested": str,
    "safetychecker": str, "safety_checker": str, "W": int, "H": int, "guidance_scale": float, "seed": int,
    "steps": int, "n_samples": int, "full_url": str, "upscale": str, "multi_lingual": str, "panorama": str,
    "self_attention": str, "highres_fix": str, "embeddings": type(None), "lora": type(None),
    "lora_strength": int, "clip_skip": int, "temp": str, "base64": str, "tomesd": str,
    "use_karras_sigmas": str, "vae": type(None), "outdir": str, "file_prefix": str,
}  # fmt: skip


@pytest.fixture
async def sd() -> AsyncIterator[World]:
    async with world() as made:
        yield made


async def spec_of(sd: World, job_id: object) -> pb.GenerationSpec:
    record = (await sd.drawing.records.read(JobRef(JobKind.GEN, "first", str(job_id)))).record
    spec = record.spec or json.loads(sd.documents.held[record.spec_key])
    return parsed(spec, pb.GenerationSpec())


async def asked(sd: World, path: str = V4, **changes: Any) -> dict[str, Any]:
    body = await sd.post(path, PLAIN | changes)
    assert body["status"] == "processing", body
    return dict(body)


async def drawn(sd: World, path: str = V4, **changes: Any) -> dict[str, Any]:
    body = await asked(sd, path, **changes)
    await sd.draw(str(body["id"]))
    return dict(await sd.post(f"{V4}/fetch", {"request_id": body["id"]}))


def check_types(body: dict[str, Any], more: dict[str, Any] | None = None) -> None:
    assert isinstance(body["id"], int)
    assert 0 < body["id"] < 2**31
    assert all(isinstance(link, str) for link in body["output"])
    meta = META | (more or {})
    assert body["meta"].keys() == meta.keys()
    for key, kind in meta.items():
        assert isinstance(body["meta"][key], kind), key


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (V3, "Try to fetch request after given estimated time"),
        (V4, "Try to fetch request after seconds estimated"),
        ("/api/v6/images/text2img", "Try to fetch request after seconds estimated"),
    ],
)
async def test_a_request_that_takes_long_is_promised_where_its_pictures_will_be(
    sd: World, path: str, sentence: str
) -> None:
    body = await asked(sd, path, samples="2", track_id="order-17")
    check_types(body)
    assert body["messege"] == body["message"] == sentence
    assert body["fetch_result"] == f"http://likeness.test/api/v3/dreambooth/fetch/{body['id']}"
    assert (body["output"], body["webhook_status"], body["track_id"]) == ([], "", "order-17")
    assert isinstance(body["eta"], int)
    assert body["eta"] >= 1
    prefix = body["meta"]["file_prefix"]
    assert [link.rsplit("/", 1)[1] for link in body["future_links"]] == [f"0-{prefix}.png", f"1-{prefix}.png"]


@pytest.mark.parametrize(
    "path",
    [
        f"{V4}/fetch",
        "/api/v3/dreambooth/fetch/ID",
        f"{V4}/fetch/ID",
        "/api/v3/fetch/ID",
        "/api/v6/images/fetch/ID",
    ],
)
async def test_every_path_fetches_the_same(sd: World, path: str) -> None:
    body = await asked(sd, V3, samples=2, track_id=12345678901)
    path = path.replace("ID", str(body["id"]))
    # A client posts its whole payload again.
    again = PLAIN | {"request_id": str(body["id"]), "unknown": [1]}
    under_way = await sd.post(path, again)
    assert (under_way["status"], under_way["messege"]) == ("processing", body["messege"])
    assert under_way["future_links"] == body["future_links"]
    await sd.draw(str(body["id"]))
    done = await sd.post(path, again)
    check_types(done)
    assert (done["status"], done["id"], done["track_id"]) == ("success", body["id"], 12345678901)
    assert done["output"] == done["proxy_links"] == body["future_links"]
    assert done["generationTime"] == 6.0
    assert done["meta"] == body["meta"]


async def test_a_quick_drawing_is_answered_at_once() -> None:
    async with world(SdapiPolicy(sync_wait_s=20.0)) as sd:
        asking = asyncio.create_task(sd.post(V4, PLAIN))
        ids: list[str] = []
        while not ids:
            await asyncio.sleep(0.02)
            page, _ = await sd.drawing.reading.page("first", 10, "", frozenset(), "")
            ids = [revision.record.id for revision in page]
        await sd.draw(ids[0])
        body = await asyncio.wait_for(asking, 10)
    assert (body["status"], body["id"]) == ("success", int(ids[0]))


async def test_a_picture_is_there_once_it_is_drawn_for_whoever_has_its_address(sd: World) -> None:
    body = await asked(sd)
    [link] = body["future_links"]
    assert (await sd.http.get(link)).status_code == 404
    await sd.draw(str(body["id"]))
    for method, length in (("GET", None), ("HEAD", 0)):
        answer = await sd.http.request(method, link, headers={"Origin": "https://app.example.org"})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        assert answer.headers["access-control-allow-origin"] == "*"
        assert length is None or len(answer.content) == length
    assert b"PNG picture-" in (await sd.http.get(link)).content
    guessed = link.replace(body["meta"]["file_prefix"], "00000000-0000-4000-8000-000000000000")
    assert (await sd.http.get(guessed)).status_code == 404


async def test_the_drawing_is_what_was_asked_for(sd: World) -> None:
    body = await asked(
        sd,
        negative_prompt="blue",
        width="518",
        height=" 256 ",
        samples="3",
        num_inference_steps="400",
        guidance_scale="9",
        seed="77",
        scheduler="eulerdiscretescheduler",
        clip_skip="2",
    )
    spec = await spec_of(sd, body["id"])
    assert (spec.model, spec.prompt, spec.negative_prompt) == ("pocket", "a robot", "blue")
    assert (spec.width_px, spec.height_px, spec.num_images, spec.num_inference_steps) == (520, 256, 3, 51)
    assert (spec.guidance_scale, spec.seed, spec.clip_skip) == (9.0, 77, 2)
    assert (spec.scheduler, spec.use_karras_sigmas) == (pb.SCHEDULER_EULER_DISCRETE, True)
    meta = body["meta"]
    assert (meta["W"], meta["H"], meta["steps"], meta["seed"], meta["n_samples"]) == (520, 256, 51, 77, 3)
    assert (meta["scheduler"], meta["use_karras_sigmas"]) == ("EulerDiscreteScheduler", "yes")


@pytest.mark.parametrize("path", [f"{V3}/img2img", f"{V4}/img2img", f"{V6}/img2img"])
async def test_a_drawing_starts_from_a_picture(sd: World, path: str) -> None:
    body = await asked(sd, path, init_image=PICTURE, prompt=None, strength="0.55", num_inference_steps="21")
    check_types(body, {"init_image": str, "strength": float})
    spec = await spec_of(sd, body["id"])
    assert sd.storage.blobs[spec.init_image_key] == b"PNG of " + PICTURE.encode()
    assert (spec.strength, spec.num_inference_steps, spec.prompt, spec.mask_image_key) == (0.55, 21, "", "")
    assert (body["meta"]["init_image"], body["meta"]["strength"]) == (PICTURE, 0.55)
    await sd.draw(str(body["id"]))
    done = await sd.post(f"/api/v3/fetch/{body['id']}")
    assert (done["status"], done["meta"]) == ("success", body["meta"])


@pytest.mark.parametrize("path", [f"{V3}/inpaint", f"{V4}/inpaint", f"{V6}/inpaint"])
async def test_a_part_of_a_picture_is_repainted(sd: World, path: str) -> None:
    body = await asked(sd, path, init_image=PICTURE, mask_image=MASK, steps="9", strength=None)
    check_types(body, {"init_image": str, "strength": float, "mask_image": str})
    spec = await spec_of(sd, body["id"])
    keys = (spec.init_image_key, spec.mask_image_key)
    assert [sd.storage.blobs[key] for key in keys] == [b"PNG of " + url.encode() for url in (PICTURE, MASK)]
    assert (spec.strength, spec.num_inference_steps, body["meta"]["mask_image"]) == (0.7, 9, MASK)


async def test_a_picture_in_the_request_itself_is_stored_and_can_be_seen(sd: World) -> None:
    coded = "data:image/png;base64," + base64.b64encode(b"PNG of a cat").decode()
    body = await asked(sd, f"{V4}/img2img", init_image=coded)
    assert sd.storage.blobs[(await spec_of(sd, body["id"])).init_image_key] == b"PNG of a cat"
    assert (await sd.http.get(body["meta"]["init_image"])).content == b"PNG of a cat"


BROKEN = {
    "an address": "https://f.example.org/broken",
    "the file itself": base64.b64encode(b"no picture").decode(),
    "neither": "a cat!",
}


@pytest.mark.parametrize("field", ["init_image", "mask_image"])
@pytest.mark.parametrize("value", BROKEN.values(), ids=list(BROKEN))
async def test_a_picture_that_cannot_be_used_is_an_error_of_its_field(
    sd: World, field: str, value: str
) -> None:
    sent = PLAIN | {"init_image": PICTURE, "mask_image": MASK} | {field: value}
    body = await sd.post(f"{V4}/inpaint", sent)
    assert (body["status"], list(body["message"])) == ("error", [field])
    [sentence] = body["message"][field]
    assert sentence.startswith(f"The {field.replace('_', ' ')} must be ")


async def test_pictures_that_are_needed_are_missed_by_name(sd: World) -> None:
    required = {
        name: [f"The {name.replace('_', ' ')} field is required."] for name in ("init_image", "mask_image")
    }
    assert (await sd.post(f"{V4}/inpaint", PLAIN | {"mask_image": "null"}))["message"] == required
    lacking = await sd.post(f"{V3}/img2img", PLAIN | {"init_image": ""})
    assert lacking["message"] == {"init_image": required["init_image"]}
    assert (await sd.post(f"{V4}/img2img", PLAIN | {"init_image": PICTURE, "strength": 1.5}))["message"] == {
        "strength": ["The strength must be between 0 and 1."]
    }


async def test_pictures_are_told_as_text_where_that_is_asked_for(sd: World) -> None:
    hook = "https://hooks.example.org/x"
    body = await asked(sd, samples=2, base64="yes", webhook=hook)
    assert (await sd.http.get(body["future_links"][0])).status_code == 404
    done = await drawn(sd, samples=2, base64="yes")
    assert done["meta"]["base64"] == "yes"
    for index, text in enumerate(done["output"]):
        assert base64.b64decode(text).startswith(f"PNG picture-{done['id']}-{index} ".encode())
        answer = await sd.http.get(done["proxy_links"][index])
        assert (answer.text, answer.headers["content-type"]) == (text, "text/plain; charset=utf-8")
    job = await sd.drawing.records.read(JobRef(JobKind.GEN, "first", str(done["id"])))
    told = json.loads(
        sd.api.drawing_document(await Views(sd.documents, sd.platform.progress).generation_job(job, 0), "")
    )
    assert all(link.endswith(".png") for link in told["output"])


async def test_text_is_echoed_in_plain_letters(sd: World) -> None:
    answer = await sd.http.post(
        V4, json=PLAIN | {"key": KEY, "prompt": "ein Häuschen, 家", "track_id": "a/b"}
    )
    assert "ein Häuschen, 家" in answer.content.decode()
    assert '"a/b"' in answer.text


def add_ons(sd: World) -> None:
    """Registers two LoRAs of a training and of the catalogue, an embedding, and a LoRA for other models."""
    for owner, name, family in (("first", "rex", ""), ("", "noir", ""), ("", "stranger", "sdxl")):
        lora = model_pb2.ModelManifest(format=model_pb2.MODEL_FORMAT_LORA, family=family)
        lora.components.add(path="unet/lora-000.safetensors")
        sd.storage.add(owner, name, lora)
    word = model_pb2.ModelManifest(format=model_pb2.MODEL_FORMAT_EMBEDDING)
    word.components.add(path="embedding.safetensors")
    sd.storage.add("", "bad-hands", word)
    sd.storage.models["", "pocket"].manifest.family = "flat"


@pytest.mark.parametrize(
    ("sent", "strengths", "echoed"),
    [
        ({"lora_model": "rex"}, [1.0], 1),
        ({"lora_model": "rex,noir", "lora_strength": "0.5"}, [0.5, 0.5], 0.5),
        ({"lora": ["rex", "noir"], "lora_strength": "0.5,"}, [0.5, 1.0], "0.5,1"),
        ({"lora_model": "rex , noir", "lora_strength": "0.2,0.3,0.4"}, [0.2, 0.3], "0.2,0.3"),
        ({"lora_model": None, "lora_strength": 0.4}, [], 1),
    ],
    ids=["alone", "one-for-all", "missing", "too-many", "none"],
)
async def test_loras_are_added_with_their_strengths(
    sd: World, sent: dict[str, Any], strengths: list[float], echoed: float | str
) -> None:
    add_ons(sd)
    body = await asked(sd, **sent)
    spec = await spec_of(sd, body["id"])
    assert [(lora.model, lora.strength) for lora in spec.loras] == list(
        zip(["rex", "noir"], strengths, strict=False)
    )
    assert all(lora.model_digest == f"digest-{lora.model}" for lora in spec.loras)
    names = ",".join(lora.model for lora in spec.loras) or None
    assert (body["meta"]["lora"], body["meta"]["lora_strength"]) == (names, echoed)


async def test_embeddings_are_added(sd: World) -> None:
    add_ons(sd)
    body = await asked(sd, embeddings_model="bad-hands")
    assert [entry.model for entry in (await spec_of(sd, body["id"])).embeddings] == ["bad-hands"]
    assert body["meta"]["embeddings"] == "bad-hands"


async def test_loras_that_cannot_be_added_are_named_together(sd: World) -> None:
    add_ons(sd)
    body = await sd.post(V4, PLAIN | {"lora_model": "nobody,rex,stranger", "embeddings_model": "rex"})
    assert body["message"] == {
        "lora_model": [
            "The lora model 'nobody' does not exist.",
            "The lora model 'stranger' is a LoRA for models of the family sdxl, not flat.",
        ],
        "embeddings_model": ["The embeddings model 'rex' is not an embedding."],
    }
    body = await sd.post(V4, PLAIN | {"lora_model": "a,b,c,d,e,f"})
    assert body["message"] == {"lora_model": ["The lora model must have at most 5 elements."]}


async def test_words_of_style_and_quality_are_added_unless_they_are_there(sd: World) -> None:
    body = await asked(sd, prompt="Sharp focus, a robot", enhance_prompt="yes", negative_prompt="watermark")
    meta = body["meta"]
    assert meta["prompt"] == "Sharp focus, a robot, highly detailed, professional lighting"
    assert meta["negative_prompt"] == "watermark, blurry, low quality, deformed"
    assert (await asked(sd, enhance_prompt=None))["meta"]["prompt"] != "a robot", "the default is yes"


async def test_words_that_call_a_catalogue_models_subject_are_put_first(sd: World) -> None:
    sd.storage.models["", "pocket"].manifest.trigger_words.append("mdjrny-v4 style")
    assert (await asked(sd))["meta"]["prompt"] == "mdjrny-v4 style, a robot"
    assert (await asked(sd, prompt="mdjrny-v4 style robot"))["meta"]["prompt"] == "mdjrny-v4 style robot"


@pytest.mark.parametrize("name", SCHEDULERS)
async def test_every_scheduler_that_is_listed_is_accepted(sd: World, name: str) -> None:
    body = await asked(sd, scheduler=name)
    spec = await spec_of(sd, body["id"])
    assert spec.scheduler == SCHEDULERS[name].value
    assert body["meta"]["scheduler_requested"] == name
    if name == "DDIMInverseScheduler":
        assert body["meta"]["scheduler"] == "DDIMScheduler"
        assert "DDIMScheduler" in body["tip"]


@pytest.mark.parametrize(
    ("name", "scheduler", "karras", "algorithm"),
    [
        ("Euler a", pb.SCHEDULER_EULER_ANCESTRAL_DISCRETE, False, 0),
        ("DPM++ 2M Karras", pb.SCHEDULER_DPM_SOLVER_MULTISTEP, True, 0),
        ("dpm++ 2m  sde", pb.SCHEDULER_DPM_SOLVER_MULTISTEP, False, 2),
        ("LMS", pb.SCHEDULER_LMS_DISCRETE, False, 0),
        ("null", pb.SCHEDULER_UNIPC_MULTISTEP, True, 0),
    ],
)
async def test_schedulers_have_other_names_too(
    sd: World, name: str, scheduler: int, karras: bool, algorithm: int
) -> None:
    spec = await spec_of(sd, (await asked(sd, scheduler=name))["id"])
    assert (spec.scheduler, spec.use_karras_sigmas, spec.solver_algorithm) == (scheduler, karras, algorithm)


REFUSED: dict[str, Any] = {
    "samples": 5, "width": 2048, "height": "8", "guidance_scale": 0.5, "seed": "abc", "clip_skip": 9,
    "scheduler": "DPM fast", "algorithm_type": "dpm", "multi_lingual": "yes", "panorama": True,
    "self_attention": "yes", "highres_fix": 1, "safety_checker": "yes", "base64": "maybe", "upscale": "2",
    "lora_model": "contrast-fix,yae-miko-genshin", "embeddings_model": "x", "vae": "y",
    "webhook": "not a url", "num_inference_steps": "many", "track_id": {"a": 1}, "negative_prompt": 7,
}  # fmt: skip


@pytest.mark.parametrize("field", [*REFUSED])
async def test_what_cannot_be_done_is_an_error_that_names_the_field(sd: World, field: str) -> None:
    body = await sd.post(V4, PLAIN | {field: REFUSED[field]})
    assert body["status"] == "error"
    assert list(body["message"]) == [field]
    assert body["message"] == body["messege"]
    assert all(sentence.startswith("The ") for sentence in body["message"][field])


async def test_a_scheduler_that_is_not_known_is_refused_with_the_list(sd: World) -> None:
    [sentence] = (await sd.post(V4, PLAIN | {"scheduler": "DPM adaptive"}))["message"]["scheduler"]
    assert len(SCHEDULERS) == 18
    assert all(known in sentence for known in SCHEDULERS)


async def test_the_errors_have_their_sentences() -> None:
    async with world(SdapiPolicy(strict=True, sync_wait_s=0)) as sd:

        async def said(path: str, **body: Any) -> tuple[int, Any]:
            answer = await sd.http.post(path, json={"key": KEY} | body)
            return answer.status_code, answer.json()["message"]

        assert await said(V4, model_id="pocket") == (400, {"prompt": ["The prompt field is required."]})
        assert await said(V4, prompt="x") == (404, "Model id not found")
        assert await said(V4, prompt="x", model_id="nothing") == (404, "Model id not found")
        assert await said(f"{V4}/fetch", request_id=5) == (404, "Request id not found")
        assert await said(f"{V4}/fetch", request_id="x/y") == (404, "Request id not found")
        assert await said(f"{V4}/fetch") == (400, {"request_id": ["The request id field is required."]})


async def test_another_keys_pictures_are_unknown(sd: World) -> None:
    body = await asked(sd)
    answer = await sd.http.post(f"/api/v3/fetch/{body['id']}", json={"key": OTHER_KEY})
    assert answer.json()["message"] == "Request id not found"


async def test_a_failed_drawing_says_why_and_keeps_its_types(sd: World) -> None:
    body = await asked(sd)
    failure = JobFailure("BAD_INPUT", "the model cannot be read")
    await sd.move_drawing(str(body["id"]), lambda record, now: life.fail(record, failure, now))
    failed = await sd.post(f"/api/v3/fetch/{body['id']}")
    assert failed == {
        "status": "failed",
        "id": body["id"],
        "messege": "the model cannot be read",
        "message": "the model cannot be read",
        "output": [],
        "track_id": None,
    }


async def test_the_estimate_follows_the_share_that_is_done(sd: World) -> None:
    body = await asked(sd)
    job_id = str(body["id"])
    ref = JobRef(JobKind.GEN, "first", job_id)
    sequence = (await sd.drawing.records.read(ref)).sequence
    await sd.move_drawing(
        job_id,
        lambda record, now: life.take(record, sequence, "drawer-1", now - 30_000),
        lambda record, now: life.report_stage(record, record.epoch, Stage.DRAWING, "drawing"),
    )
    progress = {"stage": "JOB_STAGE_DRAWING", "step": "15", "total_steps": "30", "fraction": 0.5}
    await sd.platform.progress.publish_progress("first", job_id, progress)
    assert 29 <= (await sd.post(f"/api/v3/fetch/{job_id}"))["eta"] <= 33


async def test_a_project_has_so_many_drawings_under_way_and_no_more() -> None:
    async with world(SdapiPolicy(jobs_at_once=1, sync_wait_s=0)) as sd:
        body = await asked(sd)
        assert (await sd.post(V4, PLAIN))["message"] == "Rate limit exceeded"
        await sd.draw(str(body["id"]))
        await asked(sd)


async def test_a_trained_model_draws_under_its_trainings_id(sd: World) -> None:
    training_id = await sd.train()
    await sd.succeed(training_id)
    assert (await drawn(sd, model_id=training_id))["meta"]["model_id"] == training_id
    await sd.post(f"/api/v3/finetune/delete/{training_id}")
    assert (await sd.post(V4, PLAIN | {"model_id": training_id}))["message"] == "Model id not found"


async def test_the_small_lists_have_their_shapes(sd: World) -> None:
    models = await sd.post(f"{V4}/model_list")
    assert [model["model_id"] for model in models] == ["pocket", "portraitplus-diffusion", "your_model_id"]
    assert all(
        isinstance(model[key], str)
        for model in models
        for key in ("model_name", "description", "screenshots")
    )
    for path in ("/api/v1/enterprise/schedulers_list", "/api/v4/schedulers_list"):
        body = await sd.post(path)
        assert body == {"status": "success", "schedulers": list(SCHEDULERS)}
    await asked(sd)
    load = await sd.post("/api/v3/system_load")
    assert (load["status"], load["queue_num"]) == ("ok", 1)
    assert load["queue_time"] >= 0
    refused = (await sd.http.post(f"{V4}/model_list", json={"key": "wrong"})).json()
    assert refused["message"] == "Invalid Api Key"


async def test_a_webhook_is_told_of_the_end_once(sd: World) -> None:
    hook = "https://hooks.example.org/x"
    good, bad = await asked(sd, webhook=hook, track_id="order-17"), await asked(sd, webhook=hook)
    await sd.draw(str(good["id"]))
    await sd.move_drawing(
        str(bad["id"]), lambda record, now: life.fail(record, JobFailure("BAD_INPUT", "why"), now)
    )
    got: dict[int, dict[str, Any]] = {}
    both = asyncio.Event()

    async def post(url: str, body: bytes, headers: Any, timeout_s: float) -> int:
        told = json.loads(body)
        assert told["id"] not in got
        got[told["id"]] = told
        if len(got) == 2:
            both.set()
        return 200

    views = Views(sd.documents, sd.platform.progress)

    async def render(revision: Revision, number: int) -> bytes:
        return sd.api.drawing_document(await views.generation_job(revision, 0), "")

    sender = WebhookSender(
        feed=sd.platform.job_feed,
        log=sd.platform.job_log,
        hooks=sd.platform.small,
        clock=RealClock(),
        post=post,
        render=render,
        dialects=frozenset({"sdapi"}),
        kind=JobKind.GEN,
    )
    task = asyncio.create_task(sender.run())
    await asyncio.wait_for(both.wait(), 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    told = got[good["id"]]
    assert (told["status"], told["track_id"], told["output"]) == ("success", "order-17", good["future_links"])
    check_types(told)
    assert got[bad["id"]] == {
        "status": "failed", "id": bad["id"], "output": [], "message": "why", "messege": "why", "track_id": None,
    }  # fmt: skip
