"""What a worker makes of a finished training: the model's manifest and the job's result. Pure functions."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

from likeness.storage.v1.artifact_pb2 import Blob
from likeness.storage.v1.model_pb2 import (
    Lineage,
    ModelComponent,
    ModelExport,
    ModelFormat,
    ModelManifest,
)
from likeness.training.v1 import training_job_pb2 as pb

from services.adapters.manifests import digest_of, to_json
from services.domain.artifacts import digest_of_key
from services.domain.training_spec import LOW_RANK
from services.trainer.shared_files import shared_paths

MAX_WARNINGS = 100


def model_manifest(
    base: ModelManifest,
    base_manifest_key: str,
    files: Mapping[str, Blob],
    spec: pb.TrainingSpec,
    lineage: Lineage,
    note: str = "",
    exports: Iterable[ModelExport] = (),
) -> ModelManifest:
    """Describes a trained model: what it changed, and the base's own files for all the rest.

    A LoRA is listed in the same way, as its base and one small file more beside each part that it changes: whoever
    loads that folder draws with both. `exports` are the LoRA alone, in the layouts that other programs read.

    Args:
        base: manifest of the model the training began with.
        base_manifest_key: its artifact key.
        files: the trained files by their path in the model's folder.
        spec: what was asked for.
        lineage: how it was made.
        note: remark for people.
        exports: the same weights in other formats.
    """
    low_rank = spec.method in LOW_RANK
    components = {component.path: component for component in shared_components(base, spec)}
    keys = {component.digest: component.key for component in base.components}
    for path, blob in files.items():
        key = keys.get(blob.digest, blob.key)
        components[path] = ModelComponent(path=path, key=key, digest=blob.digest, size_bytes=blob.size_bytes)
    return ModelManifest(
        format=ModelFormat.MODEL_FORMAT_LORA if low_rank else ModelFormat.MODEL_FORMAT_DIFFUSERS,
        family=base.family,
        components=[components[path] for path in sorted(components)],
        base_manifest_key=base_manifest_key,
        base_model=spec.base_model,
        lineage=lineage,
        trigger_words=base.trigger_words,
        license=base.license,
        native_size_px=base.native_size_px,
        training_defaults=base.training_defaults,
        clip_skip=spec.clip_skip,
        note=note or base.note,
        exports=exports,
    )


def model_export(name: str, file: str, blob: Blob) -> ModelExport:
    """Describes one file of a model in another format.

    Args:
        name: the format.
        file: path of the file that was stored.
        blob: where it is stored.
    """
    return ModelExport(format=name, key=blob.key, file_name=PurePath(file).name, size_bytes=blob.size_bytes)


def shared_components(base: ModelManifest, spec: pb.TrainingSpec) -> list[ModelComponent]:
    """The files that a trained model has in common with its base, where they lie in its folder."""
    parts = {"unet": spec.train_unet, "text_encoder": spec.train_text_encoder}
    components = {component.path: component for component in base.components}
    places = shared_paths(
        components, changed=[part for part, on in parts.items() if on], low_rank=spec.method in LOW_RANK
    )
    shared = []
    for path, original in places.items():
        moved = ModelComponent()
        moved.CopyFrom(components[original])
        moved.path = path
        shared.append(moved)
    return shared


def lineage_of(
    job_id: str, spec: pb.TrainingSpec, prepared: pb.PreparedInputs, ended: Mapping[str, Any], device: str
) -> Lineage:
    """Says how a model was made: enough to make it again.

    Args:
        job_id: the training.
        spec: what was asked for.
        prepared: the data it used.
        ended: the child's last event.
        device: the device in words.
    """
    keys = [key for dataset in prepared.datasets for key in (dataset.instance_key, dataset.class_key) if key]
    versions = {name: str(text) for name, text in ended["report"].get("versions", {}).items()}
    return Lineage(
        job_id=job_id,
        dataset_keys=keys,
        spec_digest=digest_of(to_json(spec)),
        code_version=version("likeness"),
        library_versions=versions,
        seed=spec.seed,
        steps=int(ended["step"]),
        device_type="cpu" if device == "cpu" else "cuda",
    )


def training_result(
    job_id: str,
    manifest_key: str,
    spec: pb.TrainingSpec,
    prepared: pb.PreparedInputs,
    ended: Mapping[str, Any],
    device: str,
    device_memory_bytes: int,
) -> pb.TrainingResult:
    """Says what came out of a training; arguments as for :func:`lineage_of`."""
    return pb.TrainingResult(
        model=job_id,
        manifest_key=manifest_key,
        manifest_digest=digest_of_key(manifest_key),
        steps=int(ended["step"]),
        final_loss=float(ended["final_loss"] or 0.0),
        seed=spec.seed,
        warnings=shortened([*prepared.warnings, *ended["warnings"]]),
        datasets=prepared.datasets,
        device=device,
        device_memory_bytes=device_memory_bytes,
        execution_summary=ended["execution_summary"],
    )


def shortened(warnings: Sequence[str]) -> list[str]:
    """The first remarks, cut to a length that a job's record can hold."""
    return [warning[:300] for warning in warnings[:MAX_WARNINGS]]


def concept_entries(
    spec: pb.TrainingSpec, pictures: Iterable[tuple[Sequence[Mapping[str, str]], Sequence[Mapping[str, str]]]]
) -> list[dict[str, Any]]:
    """The `concepts` of the child's `train` command.

    Args:
        spec: what was asked for.
        pictures: for each concept its instance and its class pictures: `id`, `path` and `caption` of each.
    """
    entries = []
    for concept, (instance, classes) in zip(spec.concepts, pictures, strict=True):
        seed = concept.seed if concept.HasField("seed") else spec.seed
        entries.append(
            {
                "seed": seed,
                "instance_pictures": [
                    _entry(picture, concept.instance_prompt, captions=concept.use_captions)
                    for picture in instance
                ],
                "class_pictures": [
                    _entry(picture, concept.class_prompt, captions=False) for picture in classes
                ],
            }
        )
    return entries


def _entry(picture: Mapping[str, str], prompt: str, *, captions: bool) -> dict[str, str]:
    own = picture["caption"] if captions else ""
    return {"id": picture["id"], "path": picture["path"], "prompt": own or prompt}
