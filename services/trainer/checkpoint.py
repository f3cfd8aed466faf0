"""Recovery checkpoints: all state of a run, written so that a kill at any moment leaves a whole one behind.

A checkpoint is a folder `step-<updates>` with the trained weights (float32; of a low-rank training the adapters alone,
while the configuration names the base), their moving average if there is one, the optimizer's state by parameter name,
`state.json` (counters, schedule, configuration) and, written last, `manifest.json` with every file's size and SHA-256.
It is made under a temporary name, flushed and renamed; without a manifest that fits, it does not count. What is
random needs no state here: it follows from the job's seed and the counters (see `randomness`).
"""

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
AVERAGE = "average.safetensors"
FORMAT_VERSION = 1
KEPT = 2
_SEPARATOR = "::"
_READ_FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)

NamedParameters = Mapping[str, torch.nn.Parameter]


class CheckpointDamaged(Exception):
    """A checkpoint folder is incomplete or its contents do not fit its manifest."""


class CheckpointMismatch(Exception):
    """A whole checkpoint belongs to another run: its configuration, model or data differ."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State of a run between two updates, on the CPU and independent of the living model.

    Attributes:
        step: updates that are over.
        weights: float32 master weights by parameter name.
        optimizer: tensors of the optimizer's state, named `<parameter>::<entry>`.
        scalars: plain numbers of the optimizer's state, by the same names.
        state: everything else that JSON can hold; `configuration` in it decides who may resume.
        average: moving average of the weights by parameter name; empty where there is none.
    """

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    scalars: dict[str, int | float | bool]
    state: dict[str, Any]
    average: dict[str, torch.Tensor] = field(default_factory=dict)


def capture(
    parameters: NamedParameters,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    state: dict[str, Any],
    average: Mapping[str, torch.Tensor] | None = None,
) -> Checkpoint:
    """Copies the state of a run to host memory; training may go on at once."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, int | float | bool] = {}
    for name, parameter in parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[name + _SEPARATOR + entry] = _copy(value)
            elif value is not None:
                scalars[name + _SEPARATOR + entry] = value
    weights = {name: _copy(parameter) for name, parameter in parameters.items()}
    averages = {name: _copy(tensor) for name, tensor in (average or {}).items()}
    return Checkpoint(step, weights, tensors, scalars, state, averages)


def restore(checkpoint: Checkpoint, parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights and optimizer state back, bit for bit; raises as :func:`restore_weights`."""
    restore_weights(checkpoint, parameters)
    optimizer.state.clear()
    for key, value in {**checkpoint.optimizer, **checkpoint.scalars}.items():
        name, entry = key.rsplit(_SEPARATOR, 1)
        parameter = parameters[name]
        optimizer.state[parameter][entry] = _placed(value, parameter)


def restore_weights(checkpoint: Checkpoint, parameters: NamedParameters) -> None:
    """Puts the weights back, bit for bit.

    Raises:
        CheckpointMismatch: their names or shapes differ from the model's.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()}:
        raise CheckpointMismatch("the checkpoint's weights are not those of this model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.weights[name])


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint under `folder`, then removes all but the newest two.

    Returns:
        The finished folder; whoever sees it sees all of it.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {WEIGHTS: checkpoint.weights, OPTIMIZER: checkpoint.optimizer}
    if checkpoint.average:
        tensors[AVERAGE] = checkpoint.average
    for name, values in tensors.items():
        save_file(values, temporary / name)
    state = {"step": checkpoint.step, "optimizer_scalars": checkpoint.scalars, **checkpoint.state}
    (temporary / STATE).write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")
    files = [_described(temporary / name) for name in (*tensors, STATE)]
    manifest = {"format": FORMAT_VERSION, "step": checkpoint.step, "files": files}
    _write_flushed(temporary / MANIFEST, json.dumps(manifest, indent=1))
    _flush(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _flush(folder)
    _remove_old(folder)
    return final


def read(folder: Path, *, with_optimizer: bool = True) -> Checkpoint:
    """Reads one checkpoint folder and checks every byte of it.

    Args:
        folder: the checkpoint.
        with_optimizer: false leaves the optimizer's tensors out, which are twice as large as the weights.

    Raises:
        CheckpointDamaged: a file is missing, cut or altered.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for described in manifest["files"]:
            if described["name"] != PurePath(described["name"]).name:
                raise CheckpointDamaged(f"{folder.name}: its manifest names a file outside of it")
            if _described(folder / described["name"], flush=False) != described:
                raise CheckpointDamaged(f"{folder.name}: {described['name']} does not fit the manifest")
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
        optimizer = load_file(folder / OPTIMIZER) if with_optimizer else {}
        listed = {described["name"] for described in manifest["files"]}
        average = load_file(folder / AVERAGE) if AVERAGE in listed else {}
        scalars = state.pop("optimizer_scalars")
        return Checkpoint(state.pop("step"), weights, optimizer, scalars, state, average)
    except _READ_FAULTS as error:
        raise CheckpointDamaged(f"{folder.name}: {error}") from error


def pack(folder: Path, archive: Path) -> Path:
    """Writes a checkpoint folder as one zip archive, uncompressed: equal checkpoints are equal archives.

    Args:
        folder: a finished checkpoint.
        archive: file to write; its folder is made.

    Returns:
        The archive.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for path in sorted(folder.iterdir()):
            with (
                path.open("rb") as source,
                packed.open(zipfile.ZipInfo(path.name), "w", force_zip64=True) as to,
            ):
                shutil.copyfileobj(source, to, 1 << 20)
    return archive


def finished(folder: Path) -> list[Path]:
    """Returns the checkpoint folders under `folder` that have a manifest, newest first."""
    return sorted((path.parent for path in folder.glob(f"step-*/{MANIFEST}")), reverse=True)


def step_of(folder: Path) -> int:
    """Returns how many updates a checkpoint folder's name says are over."""
    return int(folder.name.removeprefix("step-"))


def read_newest(folder: Path) -> Checkpoint | None:
    """Reads the newest undamaged checkpoint under `folder`; a damaged one is logged and passed over."""
    for candidate in finished(folder):
        try:
            return read(candidate)
        except CheckpointDamaged as error:
            logger.warning("checkpoint passed over", extra={"error": str(error)})
    return None


def check_configuration(
    checkpoint: Checkpoint, configuration: Mapping[str, Any], *, may_differ: frozenset[str]
) -> None:
    """Refuses to resume a run under another configuration.

    Args:
        checkpoint: what was saved.
        configuration: the effective configuration of the run that wants to resume, JSON values only.
        may_differ: top-level names that a resume may change.

    Raises:
        CheckpointMismatch: naming what differs.
    """
    saved = checkpoint.state.get("configuration", {})
    names = (set(saved) | set(configuration)) - may_differ
    differing = sorted(name for name in names if saved.get(name) != configuration.get(name))
    if differing:
        raise CheckpointMismatch(f"the checkpoint was made with another {', '.join(differing)}")


class BackgroundWriter:
    """Writes checkpoints on a thread, one at a time, so that training only waits for the copy to host memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    @property
    def busy(self) -> bool:
        """Whether a write is under way, or its folder has not been collected yet."""
        return self._pending is not None

    def start(self, checkpoint: Checkpoint) -> None:
        """Begins to write; waits for an earlier write first, whose folder is not collected any more."""
        self.wait()
        self._pending = self._executor.submit(write, self._folder, checkpoint)

    def collect(self) -> Path | None:
        """Returns a folder once, after its write has ended; raises what the write raised."""
        if self._pending is None or not self._pending.done():
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """Waits for the write under way, if any, and returns its folder."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """Waits for the write under way and ends the thread."""
        self._executor.shutdown(wait=True)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _placed(value: Any, parameter: torch.nn.Parameter) -> Any:
    """Returns a state entry on the parameter's device and, where it has its shape, in its memory layout."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _described(path: Path, *, flush: bool = True) -> dict[str, Any]:
    """Returns name, size and digest of a file, after flushing it to the disk."""
    if flush:
        _flush(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "size_bytes": path.stat().st_size, "sha256": digest}


def _write_flushed(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_old(folder: Path) -> None:
    for outdated in finished(folder)[KEPT:]:
        shutil.rmtree(outdated, ignore_errors=True)
