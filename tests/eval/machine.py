"""What a result was measured with: model, machine, versions."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.eval.pipelines import digest_of

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scipy", "pillow")


def about_run(model: Path) -> dict[str, Any]:
    """The record that each JSON file opens with."""
    return {
        "date": date.today().isoformat(),
        "model": model.resolve().name if model.is_absolute() else str(model),
        "model_digest": digest_of(model),
        "machine": _machine(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return f"{os.cpu_count()} cores, {', '.join(sorted(names)) or platform.machine()}, no GPU used"
