"""The recipes of the images: what they hold, as whom they run, and how they say that they are well."""

import asyncio
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import grimp
import pytest

from services.adapters.grpc_server import GrpcServer

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "deploy" / "docker"
NAMES = sorted(path.stem for path in DOCKER.glob("*.Dockerfile"))
HEALTHY = DOCKER / "healthy.py"

ENTRIES = {
    "gateway": ("services.gateway", "gateway"),
    "storage": ("services.storage", "storage"),
    "trainer-api": ("services.trainer api", "api"),
    "trainer-worker": ("services.trainer worker", "trainer"),
    "inference-api": ("services.inference api", "api"),
    "inference-worker": ("services.inference worker", "inference"),
}
"""What each image runs, and the extra whose packages it has."""

STARTS = {
    "services.trainer api": ("services.trainer.__main__", "services.trainer.api"),
    "services.inference api": ("services.inference.__main__", "services.inference.api"),
    "services.trainer worker": ("services.trainer.__main__", "services.trainer.child"),
    "services.inference worker": ("services.inference.__main__", "services.inference.child"),
}
"""Modules whose imports an image must hold, where one package has several roles."""


@cache
def recipe(name: str) -> str:
    return (DOCKER / f"{name}.Dockerfile").read_text()


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a recipe and what they say, with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined]


@cache
def packages_of(*modules: str) -> frozenset[str]:
    """The packages below `services` that modules import, directly or not."""
    graph = grimp.build_graph("services", cache_dir=None)
    found = set(modules).union(*(graph.find_upstream_modules(module) for module in modules))
    return frozenset(module.split(".")[1] for module in found if module.count("."))


def faults_of(name: str, text: str) -> list[str]:
    """Every rule that an image's recipe breaks."""
    steps = instructions(text)
    final = steps[max(place for place, (word, _) in enumerate(steps) if word == "FROM") :]
    module, extra = ENTRIES[name]
    return [
        *_base_faults(steps),
        *_content_faults(steps, module, extra),
        *_final_faults(dict(final), name, module),
        *(["copies more than the packages and the health check"] if _copied(final) != _KEPT else []),
    ]


_KEPT = ["--from=build /opt/venv /opt/venv", "deploy/docker/healthy.py /usr/local/lib/likeness/healthy.py"]


def _copied(steps: list[tuple[str, str]]) -> list[str]:
    return [what for word, what in steps if word == "COPY"]


def _base_faults(steps: list[tuple[str, str]]) -> list[str]:
    defaults = dict(what.split("=", 1) for word, what in steps if word == "ARG" and "=" in what)
    bases = [what.split()[0] for word, what in steps if word == "FROM"]
    faults = [] if len(bases) == 2 else ["is not built in two stages"]
    named = [defaults.get(base.strip("${}"), base) for base in bases]
    exact = re.compile(r"\S+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")
    return faults + [f"{base} is not an exact version" for base in named if not exact.fullmatch(base)]


def _content_faults(steps: list[tuple[str, str]], module: str, extra: str) -> list[str]:
    runs = " && ".join(what for word, what in steps if word == "RUN")
    extras = re.findall(r"\['optional-dependencies'\]\['(\w+)'\]", runs)
    faults = [] if extras == [extra] else [f"has the extras {extras} and needs {extra}"]
    installs = re.findall(r"pip install ([^&]*)", runs)
    faults += [f"installs {what.strip()} without pins" for what in installs if not _pinned(what)]
    copied = {match[1] for what in _copied(steps) if (match := re.match(r"services/(\w+) services/", what))}
    wanted = set(packages_of(*STARTS.get(module, (f"{module}.__main__",))))
    if copied != wanted:
        faults.append(f"holds the packages {sorted(copied)} and imports {sorted(wanted)}")
    if any("models/pocket/weights" in what for what in _copied(steps)) != (module == "services.storage"):
        faults.append("only storage holds the model that ships")
    return faults


def _pinned(what: str) -> bool:
    return "-c requirements.lock" in what or "--no-deps dist/" in what


def _final_faults(final: dict[str, str], name: str, module: str) -> list[str]:
    faults = []
    if not re.fullmatch(r"[1-9]\d+:[1-9]\d+", final.get("USER", "")):
        faults.append("does not name a user and a group by numbers above 0")
    if not re.search(
        r'CMD \["python", "/usr/local/lib/likeness/healthy\.py", "', final.get("HEALTHCHECK", "")
    ):
        faults.append("has no health check")
    labels = set(re.findall(r"org\.opencontainers\.image\.(\w+)=", final.get("LABEL", "")))
    faults += [f"lacks the label {label}" for label in sorted({"title", "version", "revision"} - labels)]
    if f'title="likeness/{name}"' not in final.get("LABEL", ""):
        faults.append("is labelled with another name")
    if final.get("ENTRYPOINT") != json.dumps(["python", "-m", *module.split()]):
        faults.append(f"does not start {module}")
    return faults


def test_every_process_of_the_platform_has_an_image() -> None:
    assert set(NAMES) == set(ENTRIES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_keeps_every_rule(name: str) -> None:
    assert faults_of(name, recipe(name)) == []


PLANTED = {
    "root": ("USER 10001:10001\n", "", "does not name a user and a group by numbers above 0"),
    "latest": ("python:3.11.14-slim-bookworm", "python:latest", "python:latest is not an exact version"),
    "all packages": ("['gateway']", "['trainer']", "has the extras ['trainer'] and needs gateway"),
    "unpinned": (
        " -c requirements.lock grpcio-tools",
        " grpcio-tools",
        "installs grpcio-tools hatchling without pins",
    ),
    "no health check": ("HEALTHCHECK", "EXPOSE 1\n#", "has no health check"),
    "another program": ('"services.gateway"', '"services.storage"', "does not start services.gateway"),
    "too little": (
        "COPY services/jobs services/jobs\n",
        "",
        "holds the packages ['adapters', 'domain', 'gateway'] and imports ['adapters', 'domain', 'gateway', 'jobs']",
    ),
    "the sources": (
        "COPY deploy/docker",
        "COPY . .\nCOPY deploy/docker",
        "copies more than the packages and the health check",
    ),
    "unlabelled": ("image.revision", "image.other", "lacks the label revision"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str) -> None:
    old, new, said = PLANTED[fault]
    assert old in recipe("gateway")
    found = faults_of("gateway", recipe("gateway").replace(old, new))
    assert said in found


def test_the_workers_alone_have_torch_and_say_for_which_device() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    with_torch = {
        name for name, (_, extra) in ENTRIES.items() if any(p.startswith("torch=") for p in extras[extra])
    }
    assert with_torch == {"trainer-worker", "inference-worker"}
    assert {name for name in NAMES if "ARG DEVICE=cuda" in recipe(name)} == with_torch


async def healthy(target: str) -> int:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(HEALTHY), target, stderr=subprocess.DEVNULL
    )
    return await process.wait()


async def test_the_health_check_hears_whether_a_service_serves() -> None:
    async with GrpcServer("127.0.0.1:0") as server:
        assert await healthy(server.address) == 0
        await server.set_serving(False)
        assert await healthy(server.address) == 1
    assert await healthy(server.address) != 0
