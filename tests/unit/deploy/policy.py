"""The house's rules for what runs on a cluster; each says in one sentence what breaks it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from services.adapters import settings
from tests.unit.deploy.manifests import (
    K8S,
    ROOT,
    WORKLOADS,
    Manifest,
    environ_of,
    is_pinned,
    of_kind,
    pod_of,
    template_of,
)

READERS: Mapping[str, type[settings.CommonSettings]] = {
    "gateway": settings.GatewaySettings,
    "storage": settings.StorageSettings,
    "trainer-api": settings.TrainerApiSettings,
    "trainer-worker": settings.TrainerWorkerSettings,
    "inference-api": settings.InferenceApiSettings,
    "inference-worker": settings.InferenceWorkerSettings,
}
VOLUMES = {"configMap", "secret", "emptyDir", "persistentVolumeClaim", "ephemeral"}
RESOURCES = {"cpu", "memory", "ephemeral-storage"}


def policy_faults(manifests: Sequence[Manifest]) -> list[str]:
    """Every rule that rendered manifests break."""
    faults = list(_namespace_faults(manifests))
    for workload in of_kind(manifests, *WORKLOADS):
        name = workload["metadata"]["name"]
        found = [
            *_name_faults(manifests, workload),
            *_pod_faults(workload),
            *_container_faults(workload),
            *_settings_faults(manifests, workload),
        ]
        faults += [f"{name}: {fault}" for fault in found]
    return faults + [
        fault for service in of_kind(manifests, "Service") for fault in _service_faults(manifests, service)
    ]


def _namespace_faults(manifests: Sequence[Manifest]) -> Iterator[str]:
    for namespace in of_kind(manifests, "Namespace"):
        if namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
            yield "the namespace does not enforce the restricted profile"
    everybody = [
        each["spec"] for each in of_kind(manifests, "NetworkPolicy") if each["spec"]["podSelector"] == {}
    ]
    if not any(
        set(each["policyTypes"]) == {"Ingress", "Egress"} and not each.get("egress") for each in everybody
    ):
        yield "no policy denies what is not allowed, both ways"
    for each in manifests:
        if (
            each["kind"] not in {"Namespace", "PriorityClass"}
            and each["metadata"].get("namespace") != "likeness"
        ):
            yield f"{each['kind']} {each['metadata']['name']} is not in the namespace likeness"
    if of_kind(manifests, "Secret"):
        yield "a Secret is among the manifests"


def _name_faults(manifests: Sequence[Manifest], workload: Manifest) -> Iterator[str]:
    """One name for folder, image, workload, container, ServiceAccount, NetworkPolicy and budget."""
    name, pod = workload["metadata"]["name"], pod_of(workload)
    image = pod["containers"][0]["image"].split("@")[0].rpartition("/")[2].split(":")[0]
    labels = template_of(workload)["metadata"]["labels"]
    held = {
        "the folder": (K8S / "base" / name).is_dir(),
        "the image": image == name,
        "the recipe of the image": name == "nats"
        or (ROOT / "deploy" / "docker" / f"{name}.Dockerfile").is_file(),
        "the container": [each["name"] for each in pod["containers"]] == [name],
        "the ServiceAccount": pod.get("serviceAccountName") == name
        and _has(manifests, "ServiceAccount", name),
        "the NetworkPolicy": _has(manifests, "NetworkPolicy", name),
        "the label": labels.get("app.kubernetes.io/name") == name,
        "the budget": workload["kind"] == "ScaledJob" or _has(manifests, "PodDisruptionBudget", name),
    }
    yield from (f"{what} has another name or is missing" for what, right in held.items() if not right)
    if labels.get("app.kubernetes.io/part-of") != "likeness":
        yield "its pods do not say that they are part of likeness"


def _has(manifests: Sequence[Manifest], kind: str, name: str) -> bool:
    return any(each["metadata"]["name"] == name for each in of_kind(manifests, kind))


def _pod_faults(workload: Manifest) -> Iterator[str]:
    pod, security = pod_of(workload), pod_of(workload).get("securityContext", {})
    if security.get("runAsNonRoot") is not True or security.get("runAsUser", 0) == 0:
        yield "may run as root"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "has no seccomp profile"
    if pod.get("automountServiceAccountToken") is not False:
        yield "gets a token of its ServiceAccount"
    if pod.get("enableServiceLinks") is not False:
        yield "gets the names of Services as variables"
    if not pod.get("priorityClassName", "").startswith("likeness-"):
        yield "has no priority"
    if workload["kind"] != "ScaledJob" and not pod.get("topologySpreadConstraints"):
        yield "is not spread over machines"
    for volume in pod.get("volumes", ()):
        (kind,) = set(volume) - {"name"}
        if kind not in VOLUMES or (kind == "emptyDir" and "sizeLimit" not in volume[kind]):
            yield f"the volume {volume['name']} is of another kind, or has no bound"


def _container_faults(workload: Manifest) -> Iterator[str]:
    (container,) = pod_of(workload)["containers"]
    security, resources = container.get("securityContext", {}), container.get("resources", {})
    if not is_pinned(container["image"]):
        yield f"the image {container['image']} names no exact version"
    if security.get("allowPrivilegeEscalation") is not False or security.get("capabilities") != {
        "drop": ["ALL"]
    }:
        yield "may gain rights"
    if security.get("readOnlyRootFilesystem") is not True:
        yield "may write to its image"
    for side in ("requests", "limits"):
        if missing := sorted(RESOURCES - set(resources.get(side, {}))):
            yield f"{side} say nothing of {', '.join(missing)}"
    yield from (
        f"has no {probe}"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
        if probe not in container
    )
    if any("secretKeyRef" in each.get("valueFrom", {}) for each in container.get("env", ())):
        yield "has a secret in its environment"


def _settings_faults(manifests: Sequence[Manifest], workload: Manifest) -> Iterator[str]:
    """The program would start with these variables, listens where its port says, and ends before it is killed."""
    reader = READERS.get(workload["metadata"]["name"])
    if reader is None:
        return
    environ = environ_of(manifests, workload)
    mounts = [Path(each["mountPath"]) for each in pod_of(workload)["containers"][0]["volumeMounts"]]
    for name, value in environ.items():
        if value.startswith("/") and not any(Path(value).is_relative_to(mount) for mount in mounts):
            yield f"{name} is on no volume"
    try:
        read = settings.load(reader, {name: value for name, value in environ.items() if not _is_secret(name)})
    except settings.SettingsError as error:
        yield from error.faults
        return
    known = set(reader.model_fields)
    of_all = {name for source in of_kind(manifests, "ConfigMap") for name in source["data"]}
    for name in sorted(set(environ) - of_all):
        field = name.removeprefix(settings.PREFIX).lower()
        if name.startswith(settings.PREFIX) and not {field, field.removesuffix("_file")} & known:
            yield f"does not read {name}"
    port = pod_of(workload)["containers"][0]["ports"][0]["containerPort"]
    if f"0.0.0.0:{port}" not in environ.values():
        yield f"does not listen on its port {port}"
    if pod_of(workload)["terminationGracePeriodSeconds"] <= getattr(read, "grace_s", 0):
        yield "is killed before its grace is over"


def _is_secret(name: str) -> bool:
    """A variable whose value is a mounted file, which is not there when manifests are checked."""
    return name.endswith(settings.FILE_SUFFIX) and name not in settings.variables()


def _service_faults(manifests: Sequence[Manifest], service: Manifest) -> Iterator[str]:
    chosen = [
        pod_of(each)["containers"][0]
        for each in of_kind(manifests, *WORKLOADS)
        if service["spec"]["selector"].items() <= template_of(each)["metadata"]["labels"].items()
    ]
    name = service["metadata"]["name"]
    if len(chosen) != 1:
        yield f"Service {name} chooses {len(chosen)} workloads"
    for port in service["spec"]["ports"] if chosen else ():
        if port["targetPort"] not in [each["name"] for each in chosen[0]["ports"]]:
            yield f"Service {name} leads to no port {port['targetPort']}"
