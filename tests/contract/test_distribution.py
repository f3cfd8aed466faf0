"""The distribution: what is pinned, and which processes start without torch."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from services.storage.catalogue import EMBEDDED_WEIGHTS
from services.storage.model_files import list_files

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and line[0] != "#"
)
# Modules that start a process which must be up in a moment; torch is loaded later, in their children.
WITHOUT_TORCH = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for name in ("__main__", "servicer", "worker", "phases", "app")
    for path in (ROOT / "services").glob(f"*/{name}.py")
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    extras = [entry for extra in PROJECT["optional-dependencies"].values() for entry in extra]
    names = [re.split(r"[\[=<>!~ ]", entry)[0] for entry in PROJECT["dependencies"] + extras]
    return sorted({canonical(name) for name in names} - {"likeness"})


@pytest.mark.parametrize("name", requirements())
def test_every_requirement_has_an_exact_pin(name: str) -> None:
    assert name in {canonical(pinned) for pinned in PINS}


def test_no_accelerator_library_is_pinned() -> None:
    assert [name for name in PINS if name.startswith(("nvidia", "cuda", "triton"))] == []


@pytest.mark.parametrize("extra", ["gateway", "storage", "cli"])
def test_an_image_without_a_model_needs_no_torch(extra: str) -> None:
    assert not [entry for entry in PROJECT["optional-dependencies"][extra] if entry.startswith("torch")]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_a_process_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(str(sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules))))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": ".:gen"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip() == "[]"


def test_the_wheel_holds_the_embedded_model_where_the_catalogue_looks_for_it() -> None:
    held = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    files = [path.relative_to(ROOT).as_posix() for path in list_files(EMBEDDED_WEIGHTS).paths.values()]
    assert "models/pocket/weights/unet/diffusion_pytorch_model.safetensors" in files
    assert set(files) <= held
    assert "services/storage/catalogue.py" in held
