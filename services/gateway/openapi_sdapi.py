"""The stablediffusionapi paths in OpenAPI 3.1, made from the tables that bodies are read by."""

from collections.abc import Mapping, Sequence
from typing import Any

from services.gateway.dialects.sdapi import drawing, schedulers, training
from services.gateway.dialects.sdapi.envelope import BAD_KEY, error_body, spoken
from services.gateway.dialects.sdapi.values import Parameter, body_schema
from services.gateway.sdapi import ROUTES

_ID = "Qk3vT9xLm2"
_STARTED = {
    "status": "success",
    **spoken("deploying_gpu"),
    "data": "it will take upto 25 minutes.",
    "training_id": _ID,
    "model_id": _ID,
}
_STATUS = {
    "status": "success",
    **spoken("training_started"),
    "data": "it will take upto 25 minutes. /n step 1: training started, 1400 steps",
    "training_id": _ID,
    "model_id": _ID,
    "model_training_status": "training_started",
    "training_status": "training_started",
    "logs": "step 1: training started, 1400 steps",
    "eta": 840,
    "progress": 0.41,
    "current_step": 574,
    "max_train_steps": 1400,
    "test_image": None,
    "created_at": "2026-11-21T19:02:11.250Z",
}
_PICTURES = {
    "status": "success",
    "id": 5102,
    "generationTime": 6.25,
    "output": ["https://likeness.example.org/generations/dev/5102/0-6f1c.png"],
    "proxy_links": ["https://likeness.example.org/generations/dev/5102/0-6f1c.png"],
    "webhook_status": "",
    "meta": {"prompt": "photo of adhik person on the beach", "W": 512, "H": 512, "seed": 7, "steps": 30},
    "track_id": None,
}
_KEY = Parameter("key", "text", "The project's key; absent: the Authorization header counts.")
_REQUEST = Parameter(
    "request_id", "integer", "`id` of the answer to the request for pictures.", required=True
)
_DETAIL = Parameter("detail", "switch", "Objects instead of ids.", "no")
_MODEL = {
    "model_id": "pocket",
    "status": "model_ready",
    "created_at": None,
    "instance_prompt": None,
    "model_name": "pocket",
    "description": "",
    "screenshots": "",
    "model_category": "stable_diffusion",
}

_SANDBOX = {name: value for name, value in training.EXAMPLE.items() if name != "base_model_id"}
_OPERATIONS: Mapping[str, tuple[str, Sequence[Parameter], Any, Any]] = {
    "fine_tune": ("Train a model", training.FINE_TUNE, training.EXAMPLE, _STARTED),
    "fine_tune_v2": ("Train UNet and text encoder apart", training.FINE_TUNE_V2, training.EXAMPLE, _STARTED),
    "lora_fine_tune": ("Train a LoRA", training.LORA_FINE_TUNE, training.EXAMPLE, _STARTED),
    "sandbox_fine_tune": ("Train briefly, to try", training.SANDBOX_FINE_TUNE, _SANDBOX, _STARTED),
    "fine_tune_status": ("How a training goes", (), {}, _STATUS),
    "sandbox_status": ("How a training of the sandbox goes", (), {}, _STATUS),
    "finetune_list": ("Own models and trainings", (_DETAIL,), {}, training.list_body([_ID])),
    "finetune_delete": ("Delete a training and its model", (), {}, training.gone_body("model deleted", _ID)),
    "cancel_training": ("Cancel a training", (), {}, training.gone_body("training cancelled", _ID)),
    "text_to_image": ("Draw pictures", drawing.TEXT_TO_IMAGE, drawing.EXAMPLE, _PICTURES),
    "image_to_image": (
        "Draw from a picture",
        drawing.IMAGE_TO_IMAGE,
        drawing.IMAGE_EXAMPLE,
        _PICTURES,
    ),
    "inpaint": ("Repaint a part of a picture", drawing.INPAINT, drawing.INPAINT_EXAMPLE, _PICTURES),
    "fetch": ("Fetch pictures", (_REQUEST,), {"request_id": 5102}, _PICTURES),
    "model_list": ("The catalogue, as a bare list", (), {}, [_MODEL]),
    "schedulers_list": ("Noise schedulers", (), {}, schedulers.list_body()),
    "system_load": ("Pictures that wait", (), {}, {"status": "ok", "queue_num": 3, "queue_time": 4.5}),
}
"""Summary, parameters, example of a body and of an answer, by operation."""


def paths() -> dict[str, Any]:
    """All paths of the dialect, and where its pictures are."""
    found = {path: {"post": _operation(path, operation)} for path, operation in ROUTES.items()}
    return found | {"/generations/{project}/{id}/{name}": {"get": _picture()}}


def _operation(path: str, name: str) -> dict[str, Any]:
    summary, rows, body, answer = _OPERATIONS[name]
    in_path = "{id}" in path
    rows = [row for row in rows if not (in_path and row is _REQUEST)]
    sent = {"key": "lk-..."} | {key: value for key, value in body.items() if not in_path}
    failed = error_body(BAD_KEY.message)
    return {
        "summary": summary,
        "operationId": "sdapi" + path.replace("/", "_").replace("{id}", "id"),
        "tags": ["stablediffusionapi"],
        "security": [{"key": []}, {}],
        "parameters": [_path_parameter("id")] if in_path else [],
        "requestBody": {
            "content": {"application/json": {"schema": body_schema((_KEY, *rows)), "example": sent}}
        },
        "responses": {
            "200": _json(
                f"what was asked for; or, unless LIKENESS_SDAPI_STRICT is set, an error: {failed}", answer
            ),
            "413": _json("the body is too long", error_body("The body exceeds 4 MB")),
        },
    }


def _picture() -> dict[str, Any]:
    return {
        "summary": "A picture under the name that was promised",
        "security": [{}],
        "parameters": [_path_parameter(name) for name in ("project", "id", "name")],
        "responses": {
            "200": {
                "description": "the picture; under the names that base64 requests get, as text",
                "content": {"image/png": {}, "text/plain": {}},
            },
            "404": _json("there is none, or not yet", {"error": "picture not found"}),
        },
    }


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _json(meaning: str, example: Any) -> dict[str, Any]:
    return {"description": meaning, "content": {"application/json": {"example": example}}}
