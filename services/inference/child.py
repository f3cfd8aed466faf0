"""The process that holds the device: commands in, pictures out, one engine tick after the other.

Commands (JSON objects with a `command`): `load`, `draw`, `cancel`, `evict`, `shutdown`. Events (with an `event`):
`ready`, `alive`, `loading`, `models`, `progress`, `drawn`, and for each `draw` exactly one of `finished`, `failed`
and `cancelled`. Pictures are files in the folder that the parent names. It uses no network and holds no secrets;
when the device's context breaks it ends, and the parent starts another.
"""

import argparse
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from google.protobuf.json_format import ParseDict
from likeness.inference.v1 import generation_job_pb2 as pb

from services.adapters.child_process import ParentLink
from services.adapters.telemetry import configure_logging
from services.diffusion.devices import (
    as_device_memory_error,
    device_memory_bytes,
    device_name,
    inference_dtype,
    pick_device,
    use_cpu_threads,
)
from services.diffusion.loading import Components, quiet_libraries
from services.domain.errors import InvalidSpec, public_text, row_of
from services.inference.adapters import AdapterStore, EmbeddingFile, LoraFile, embeddings_for
from services.inference.engine import Engine
from services.inference.model_cache import ModelCache, ModelFiles
from services.inference.slot import Slot, drawings_of, open_slots, truncation_warnings, worded
from services.inference.stages import finish, init_image_of

_log = logging.getLogger(__name__)
_PROGRESS_PAUSE_S = 0.1
_ALIVE_S = 2.0
_CPU_BUDGET_BYTES = 8 * 1024**3
_DEVICE_SHARE = 0.6
DEFAULT_ADAPTER_BYTES = 1 << 30

Event = Mapping[str, Any]


@dataclass(slots=True)
class _Request:
    """One `draw` command until its last event."""

    job: str
    model: str
    folder: Path
    image_format: int
    open: int
    calls: int
    warnings: list[str]
    done: int = 0
    device_s: float = 0.0
    told_at: float = field(default=float("-inf"))


class DrawingSession:
    """All state of the child: models, engine, requests.

    Args:
        emit: sends an event to the parent.
        engine: draws.
        models: loads.
        adapters: parses LoRAs.
    """

    def __init__(
        self, emit: Callable[[Event], None], engine: Engine, models: ModelCache, adapters: AdapterStore
    ) -> None:
        self._emit = emit
        self._engine = engine
        self._models = models
        self._adapters = adapters
        self._requests: dict[str, _Request] = {}

    @property
    def is_idle(self) -> bool:
        """No picture is under way."""
        return self._engine.is_idle

    def handle(self, command: Mapping[str, Any]) -> None:
        """Obey one command; what goes wrong with a request becomes its `failed` event."""
        kind = command["command"]
        if kind == "draw":
            self._draw(command)
        elif kind == "cancel":
            self._cancel(str(command["job"]))
        elif kind == "load":
            self._load_ahead(_model_files(command["model"]))
        elif kind == "evict":
            self._models.evict(str(command["model"]))
            self._tell_models()
        else:
            _log.error("unknown command %r", kind)

    def tick(self) -> None:
        """Make one UNet call and finish the pictures that are complete after it."""
        tick = self._engine.tick()
        for slot in tick.stepped:
            self._count(slot)
        for slot in tick.finished:
            self._finish(slot)
        for slot, error in tick.failed:
            self._fail(slot.job, error)

    def _draw(self, command: Mapping[str, Any]) -> None:
        job, files = str(command["job"]), _model_files(command["model"])
        try:
            spec = ParseDict(command["spec"], pb.GenerationSpec(), ignore_unknown_fields=True)
            drawings = drawings_of(spec)
            components = self._acquired(files)
        except Exception as error:
            self._emit_failure(job, error)
            return
        try:
            loras = self._adapters.fitted(components, _lora_files(command))
            embeddings = embeddings_for(components, _embedding_files(command))
            drawings = worded(drawings, embeddings)
            init_image = init_image_of(components, drawings[0], command.get("pictures", {}))
            unet = files.parts.get("unet", files.digest)
            slots = open_slots(job, unet, components, drawings, loras, init_image, embeddings)
            warnings = truncation_warnings(components, drawings[0], embeddings)
        except Exception as error:
            self._models.release(files.digest)
            self._emit_failure(job, error)
            return
        self._requests[job] = _Request(
            job=job,
            model=files.digest,
            folder=Path(command["folder"]),
            image_format=spec.image_format,
            open=len(slots),
            calls=sum(slot.sampler.calls for slot in slots),
            warnings=warnings,
        )
        self._engine.add(slots)

    def _load_ahead(self, files: ModelFiles) -> None:
        try:
            self._acquired(files)
        except Exception as error:
            _reraise_if_fatal(error)
            _log.warning("model %s cannot be loaded ahead: %s", files.digest, public_text(error))
            self._tell_models()
        else:
            self._models.release(files.digest)

    def _acquired(self, files: ModelFiles) -> Components:
        if files.digest in self._models.held:
            return self._models.acquire(files)
        self._emit({"event": "loading", "model": files.digest})
        started = time.perf_counter()
        components = self._models.acquire(files)
        _log.info("model %s loaded in %.2f s", files.digest, time.perf_counter() - started)
        self._tell_models()
        return components

    def _count(self, slot: Slot) -> None:
        request = self._requests[slot.job]
        request.done += 1
        now = time.monotonic()
        if now - request.told_at >= _PROGRESS_PAUSE_S or request.done == request.calls:
            request.told_at = now
            event = {"event": "progress", "job": slot.job, "done": request.done, "total": request.calls}
            self._emit(event)

    def _finish(self, slot: Slot) -> None:
        request = self._requests.get(slot.job)
        if request is None:
            return
        path = request.folder / str(slot.number)
        try:
            drawn = finish(slot, path, request.image_format)
        except Exception as error:
            self._fail(slot.job, error)
            return
        if drawn.is_black:
            request.warnings.append(f"picture {slot.number + 1} is black all over")
        facts = asdict(drawn) | {"path": str(path), "seed": slot.drawing.seed, "number": slot.number}
        self._emit({"event": "drawn", "job": slot.job} | facts)
        request.device_s += slot.device_s
        request.open -= 1
        if request.open == 0:
            facts = {"warnings": request.warnings, "device_s": request.device_s}
            self._emit({"event": "finished", "job": slot.job} | facts)
            self._forget(slot.job)

    def _cancel(self, job: str) -> None:
        if job in self._requests:
            self._forget(job)
            self._emit({"event": "cancelled", "job": job})

    def _fail(self, job: str, error: Exception) -> None:
        if job in self._requests:
            self._forget(job)
            self._emit_failure(job, error)

    def _forget(self, job: str) -> None:
        self._engine.remove(lambda slot: slot.job == job)
        held = set(self._models.held)
        self._models.release(self._requests.pop(job).model)
        if held != set(self._models.held):
            self._tell_models()

    def _emit_failure(self, job: str, error: Exception) -> None:
        _reraise_if_fatal(error)
        error = as_device_memory_error(error) or error
        row = row_of(error)
        _log.warning("request failed: %s", row.reason, exc_info=error if row.reason == "INTERNAL" else None)
        violations = error.violations if isinstance(error, InvalidSpec) else ()
        self._emit(
            {
                "event": "failed",
                "job": job,
                "reason": row.reason,
                "message": public_text(error),
                "field": violations[0].field if violations else "",
                "retryable": row.retry_job,
            }
        )

    def _tell_models(self) -> None:
        self._emit({"event": "models", "held": self._models.held})


def serve(
    session: DrawingSession, commands: "queue.Queue[Mapping[str, Any]]", emit: Callable[[Event], None]
) -> None:
    """Draw until `shutdown` comes.

    Args:
        session: what to draw with.
        commands: filled by another thread.
        emit: tells the parent that this thread is alive while it waits.
    """
    while True:
        try:
            command = commands.get(timeout=_ALIVE_S) if session.is_idle else commands.get_nowait()
        except queue.Empty:
            if session.is_idle:
                emit({"event": "alive"})
            else:
                session.tick()
            continue
        if command["command"] == "shutdown":
            return
        session.handle(command)


def memory_budget_bytes(device: torch.device, asked_bytes: int) -> int:
    """Weights that may stay loaded: what was asked for, else a share of the device's memory."""
    return asked_bytes or int(device_memory_bytes(device) * _DEVICE_SHARE) or _CPU_BUDGET_BYTES


def _model_files(model: Mapping[str, Any]) -> ModelFiles:
    return ModelFiles(str(model["digest"]), Path(model["folder"]), dict(model["parts"]))


def _lora_files(command: Mapping[str, Any]) -> list[LoraFile]:
    return [
        LoraFile(str(lora["name"]), str(lora["digest"]), Path(lora["path"]), float(lora["strength"]))
        for lora in command.get("loras", ())
    ]


def _embedding_files(command: Mapping[str, Any]) -> list[EmbeddingFile]:
    return [
        EmbeddingFile(str(one["name"]), Path(one["path"]), str(one["token"]), bool(one["negative"]))
        for one in command.get("embeddings", ())
    ]


def _reraise_if_fatal(error: Exception) -> None:
    if isinstance(error, torch.AcceleratorError) and as_device_memory_error(error) is None:
        raise error


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="draws pictures for the worker that started it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cpu-threads", type=int, default=0)
    parser.add_argument("--batch-cap", type=int, default=1)
    parser.add_argument("--model-memory-bytes", type=int, default=0)
    parser.add_argument("--adapter-memory-bytes", type=int, default=DEFAULT_ADAPTER_BYTES)
    return parser.parse_args(words)


def main() -> None:
    """Open the link to the parent, then draw until it says `shutdown`."""
    arguments = _arguments(sys.argv[1:])
    configure_logging("inference child", log_format="text")
    quiet_libraries()
    link = ParentLink.from_environ()
    use_cpu_threads(arguments.cpu_threads)
    device = pick_device(arguments.device)
    budget = memory_budget_bytes(device, arguments.model_memory_bytes)
    dtype = inference_dtype(device)
    models = ModelCache(budget, device, dtype)
    adapters = AdapterStore(arguments.adapter_memory_bytes, dtype)
    session = DrawingSession(link.emit, Engine(arguments.batch_cap), models, adapters)
    link.emit({"event": "ready", "device": device_name(device), "memory_bytes": device_memory_bytes(device)})
    commands: queue.Queue[Mapping[str, Any]] = queue.Queue()
    reader = threading.Thread(target=_pass_on, args=(link, commands), name="reader", daemon=True)
    reader.start()
    serve(session, commands, link.emit)


def _pass_on(link: ParentLink, commands: "queue.Queue[Mapping[str, Any]]") -> None:
    for command in link.commands():
        commands.put(command)


if __name__ == "__main__":
    main()
