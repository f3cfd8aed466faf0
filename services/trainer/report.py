"""What a run says about itself: the configuration that decides its weights, versions, remarks."""

import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from google.protobuf.json_format import MessageToDict
from likeness.training.v1 import training_job_pb2 as pb

from services.trainer.conditioning import TextConditioner
from services.trainer.execution import Execution, schedule_name
from services.trainer.losses import NoiseSchedule
from services.trainer.randomness import GENERATOR_VERSION
from services.trainer.run import Run
from services.trainer.support import honoured

REPORT = "training.json"
"""File of the report in the export folder."""
LARGE_EPSILON = 1e-3


def configuration_of(run: Run, data: str, execution: Execution, schedule: NoiseSchedule) -> dict[str, Any]:
    """Returns everything that decides the weights, as JSON values; where the data came from is not among it.

    Args:
        run: what is asked for.
        data: fingerprint of pictures and captions.
        execution: how the device computes.
        schedule: the forward process.
    """
    fields = MessageToDict(run.spec, always_print_fields_with_no_presence=True)
    names = honoured(run.spec.recipe) - {"concepts"}
    camel = {field.json_name for field in run.spec.DESCRIPTOR.fields if field.name in names}
    return {name: value for name, value in fields.items() if name in camel} | {
        "model": run.model_digest,
        "data": data,
        "device": run.device.type,
        "execution": execution.summary,
        "predictionType": schedule.prediction_type,
        "generator": GENERATOR_VERSION,
    }


def versions_of(device: torch.device) -> dict[str, str]:
    """Returns what computed a run: packages with their versions, and the device."""
    packages = ("likeness", "torch", "diffusers", "transformers", "bitsandbytes", "numpy")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {package: version(package) for package in packages} | {"device": name}


def prompt_remarks(conditioner: TextConditioner, prompts: Iterable[str]) -> list[str]:
    """Returns a remark for each prompt that does not fit the text encoder."""
    lost = conditioner.truncated(sorted(set(prompts)))
    return [f'prompt "{prompt}" is too long; not used: "{rest}"' for prompt, rest in lost.items()]


def setting_remarks(spec: pb.TrainingSpec, warmup_steps: int, total: int) -> list[str]:
    """Returns remarks on settings that are legal and hardly meant.

    Args:
        spec: complete.
        warmup_steps: updates from zero to the peak learning rate.
        total: updates in all.
    """
    warnings = []
    if spec.adam_epsilon >= LARGE_EPSILON:
        warnings.append(f"adam_epsilon {spec.adam_epsilon:g} is so large that hardly anything is learned")
    if warmup_steps > total and schedule_name(spec) != "constant":
        warnings.append("warm-up is longer than the training: the peak learning rate is never reached")
    return warnings


def write_report(folder: Path, report: Mapping[str, Any]) -> Path:
    """Writes the report of a run that is over; returns its path relative to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(REPORT)
