"""The API's description in OpenAPI 3.1, made from the tables that the dialects read requests by."""

from importlib.metadata import version as version_of
from typing import Any

from likeness.training.v1 import training_job_pb2

from services.domain.errors import InvalidSpec
from services.gateway.dialects.base import TrainingEndpoint
from services.gateway.dialects.runpod import dream_booth_v1, everydream_v1

ENDPOINTS: tuple[TrainingEndpoint, ...] = (dream_booth_v1, everydream_v1)
"""The endpoints of the RunPod dialect."""

_STATES = ["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
_JOB = "1f0c9a52-6a0e-4c1b-9a3e-52d1b7f3a9c4"
_PROGRESS = {
    "stage": "training",
    "step": 320,
    "total_steps": 800,
    "percent": 40.0,
    "total_percent": 43.0,
    "loss": 0.11,
}
_ERRORS = {
    "400": ("the request breaks rules", {"error": "ttl must be an integer of at least 10000 ms"}),
    "401": ("no key, or one that is not known", {"error": "unauthorized"}),
    "404": ("no such endpoint or job", {"error": "job not found"}),
    "413": ("the body is too long", {"error": "request body exceeds 10 MB"}),
    "429": ("too many requests, or a full queue; Retry-After says when", {"error": "too many requests"}),
    "500": ("a fault of the service", {"error": "internal error", "details": ["ref 5d1c2e"]}),
    "503": ("a part of the service does not answer", {"error": "service unavailable"}),
}


def document(base_url: str) -> dict[str, Any]:
    """The whole description.

    Args:
        base_url: where the API is, for the examples' server.
    """
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        for version in ("v1", "v2"):
            paths |= _endpoint_paths(endpoint, version)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Likeness",
            "version": version_of("likeness"),
            "description": "Teach a text-to-image model the likeness of a subject, and draw it. "
            "v1 and v2 serve the same jobs; v1 echoes the input, v2 shows progress as output of a running job.",
        },
        "servers": [{"url": base_url or "/"}],
        "security": [{"key": []}],
        "paths": paths | _file_paths(),
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(),
        },
    }


def _endpoint_paths(endpoint: TrainingEndpoint, version: str) -> dict[str, Any]:
    root = f"/{version}/{endpoint.ENDPOINT}"
    name = f"{endpoint.ENDPOINT}_{version}".replace("-", "_")
    wait = _query("wait", "Longest time to hold the request, 1000 to 300000 ms.", 90_000)
    hold = _query("wait", "Longest time to hold the request, 1000 to 300000 ms.", 5_000)
    ttl = _query("ttl", "Keep the result for this long only, at least 10000 ms.", None)
    queued = {"id": _JOB, "status": "IN_QUEUE"}
    job, running = _completed(endpoint, version), _running(endpoint, version)
    cancelled = _body(endpoint, version, "CANCELLED", 15_820)
    waited = job | {"id": f"sync-{_JOB}"}
    return {
        f"{root}/run": {"post": _submit(endpoint, "Submit a training", queued, [])},
        f"{root}/runsync": {"post": _submit(endpoint, "Submit a training and wait for it", waited, [wait])},
        f"{root}/status/{{id}}": _both("Read a job", running, [_ID, ttl], f"{name}_status"),
        f"{root}/status-sync/{{id}}": _both("Wait for a job", job, [_ID, wait], f"{name}_status_sync"),
        f"{root}/stream/{{id}}": _both(
            "Progress and pictures, each once", _STREAM, [_ID, hold], f"{name}_stream"
        ),
        f"{root}/cancel/{{id}}": {"post": _operation("Cancel a job", cancelled, [_ID])},
        f"{root}/retry/{{id}}": {"post": _operation("Run a failed job again", queued, [_ID])},
        f"{root}/purge-queue": {
            "post": _operation("Cancel all queued jobs", {"removed": 3, "status": "completed"}, [])
        },
        f"{root}/health": {"get": _operation("Figures of jobs and workers", _HEALTH, [])},
    }


_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}, "description": "The job."}
_STREAM = {"id": _JOB, "status": "IN_PROGRESS", "stream": [{"output": {"progress": _PROGRESS}}]}
_HEALTH = {
    "jobs": {"completed": 12, "failed": 1, "inProgress": 1, "inQueue": 0, "retried": 0},
    "workers": {"idle": 0, "initializing": 0, "ready": 1, "running": 1, "throttled": 0, "unhealthy": 0},
}


def _query(name: str, meaning: str, default: int | None) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"} | ({"default": default} if default is not None else {})
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": meaning}


def _example_of(endpoint: TrainingEndpoint) -> Any:
    """An input that the endpoint accepts."""
    return endpoint.input_schema()["examples"][0]


def _body(
    endpoint: TrainingEndpoint, version: str, status: str, execution_ms: int, **more: Any
) -> dict[str, Any]:
    """A status body, as :func:`services.gateway.dialects.runpod.envelope.status_body` makes it."""
    times = {"delayTime": 5210, "executionTime": execution_ms, "workerId": "trainer-7c9f4"}
    own = {"gpu": "24", "input": _example_of(endpoint)} if version == "v1" else {}
    return {"id": _JOB, "status": status} | times | own | more


def _completed(endpoint: TrainingEndpoint, version: str) -> dict[str, Any]:
    """The end of the example, as the endpoint itself tells it."""
    job = training_job_pb2.TrainingJob(spec=endpoint.read_input(_example_of(endpoint), lambda: 11).spec)
    for index, asked in enumerate(job.spec.samples):
        for position in range(asked.num_images):
            sample = job.result.samples.add(sample_index=index, spec=asked)
            sample.image.key, sample.image.seed = f"{index}-{position}", asked.seed + position
    host = "https://likeness.example.org/files/TOKEN"
    urls = {file.key: f"{host}/{file.name}" for file in endpoint.files_of(job)}
    return _body(endpoint, version, "COMPLETED", 241_377, output=endpoint.render_output(job, urls))


def _running(endpoint: TrainingEndpoint, version: str) -> dict[str, Any]:
    progress = {"progress": _PROGRESS}
    more = progress if version == "v1" else {"output": progress}
    return _body(endpoint, version, "IN_PROGRESS", 93_844, **more)


def _refusal(endpoint: TrainingEndpoint) -> dict[str, Any]:
    """The answer to an input that lacks everything."""
    try:
        endpoint.read_input({}, lambda: 0)
    except InvalidSpec as error:
        return {"error": "invalid input", "details": [str(violation) for violation in error.violations]}
    return {"error": "invalid input"}


def _operation(summary: str, example: Any, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    schema = "#/components/schemas/Job" if "id" in example and "stream" not in example else None
    responses: dict[str, Any] = {"200": _response("what was asked for", schema, example)}
    for code, (meaning, body) in _ERRORS.items():
        responses[code] = _response(meaning, "#/components/schemas/Error", body)
    return {"summary": summary, "parameters": parameters, "responses": responses}


def _response(meaning: str, schema: str | None, example: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "schema": {"$ref": schema} if schema else {"type": "object"},
        "example": example,
    }
    return {"description": meaning, "content": {"application/json": content}}


def _both(summary: str, example: Any, parameters: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """An operation that old clients call by POST and others by GET."""
    return {
        method: _operation(summary, example, parameters) | {"operationId": f"{name}_{method}"}
        for method in ("get", "post")
    }


def _submit(
    endpoint: TrainingEndpoint, summary: str, example: Any, query: list[dict[str, Any]]
) -> dict[str, Any]:
    schema = {
        "type": "object",
        "required": ["input"],
        "properties": {
            "input": endpoint.input_schema(),
            "webhook": {"type": "string", "format": "uri", "description": "Told when the job has ended."},
            "policy": {"$ref": "#/components/schemas/Policy"},
        },
    }
    content = {"application/json": {"schema": schema, "example": {"input": _example_of(endpoint)}}}
    operation = _operation(summary, example, query)
    operation["responses"]["400"]["content"]["application/json"]["example"] = _refusal(endpoint)
    return operation | {"requestBody": {"required": True, "content": content}}


def _file_paths() -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "description": meaning}
        for name, meaning in (("token", "Names the file and lets it be read."), ("name", "File name."))
    ]
    binary = {"schema": {"type": "string", "format": "binary"}}
    responses = {
        "200": {"description": "the file", "content": {"image/png": binary}},
        "206": {"description": "a part of it", "content": {"image/png": binary}},
        "404": _response("expired or unknown", "#/components/schemas/Error", {"error": "file not found"}),
    }
    operation = {
        "summary": "Read a picture",
        "security": [],
        "parameters": parameters,
        "responses": responses,
    }
    return {"/files/{token}/{name}": {"get": operation}}


def _schemas() -> dict[str, Any]:
    span = {"type": "integer", "maximum": 604_800_000}
    return {
        "Error": {
            "type": "object",
            "required": ["error"],
            "properties": {
                "error": {"type": "string"},
                "details": {"type": "array", "items": {"type": "string"}},
            },
        },
        "Policy": {
            "type": "object",
            "description": "Limits and rank of a job; times in milliseconds.",
            "properties": {
                "executionTimeout": span | {"minimum": 5_000, "default": 21_600_000},
                "ttl": span | {"minimum": 10_000, "default": 86_400_000},
                "lowPriority": {"type": "boolean", "default": False},
            },
        },
        "Status": {"type": "string", "enum": _STATES},
        "Job": {
            "type": "object",
            "required": ["id", "status"],
            "properties": {
                "id": {"type": "string"},
                "status": {"$ref": "#/components/schemas/Status"},
                "delayTime": {"type": "integer", "description": "Milliseconds spent waiting."},
                "executionTime": {"type": "integer", "description": "Milliseconds of work."},
                "workerId": {"type": "string"},
                "gpu": {"type": "string", "description": "v1: memory of the device in GB."},
                "input": {"type": "object", "description": "v1: what was sent."},
                "progress": {"type": "object", "description": "v1: how far a running job is."},
                "output": {"description": "Pictures of a finished job; v2: progress of a running one."},
                "error": {"type": "string", "description": "Why there is no output."},
                "retries": {"type": "integer"},
            },
        },
    }
