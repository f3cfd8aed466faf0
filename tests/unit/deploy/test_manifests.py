"""The manifests of deploy/k8s: schemas, policy, placement and reachability, read off what every overlay renders."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from services.adapters.settings import CONFIGURATION_FAULT
from services.jobs.scaler import METRICS, metric_of, target_of
from tests.unit.deploy.manifests import (
    COMPONENTS,
    K8S,
    OVERLAYS,
    WORKLOADS,
    Manifest,
    composed,
    environ_of,
    named,
    of_kind,
    pinned_kubectl,
    pod_of,
    rendered,
    schema_faults,
    template_of,
)
from tests.unit.deploy.policy import policy_faults
from tests.unit.deploy.reach import calls, others_may_call, reaches_address

TOGETHER = [name for name in COMPONENTS if name not in {"hpa", "ingress", "model-cache", "keda"}]
"""Components that no overlay shows; production has the others."""

CALLS = {
    ("gateway", "storage", 8103),
    ("gateway", "trainer-api", 8101),
    ("gateway", "inference-api", 8102),
    ("gateway", "nats", 4222),
    ("trainer-api", "storage", 8103),
    ("trainer-api", "inference-api", 8102),
    ("trainer-api", "nats", 4222),
    ("inference-api", "storage", 8103),
    ("inference-api", "nats", 4222),
    ("trainer-worker", "trainer-api", 8101),
    ("trainer-worker", "storage", 8103),
    ("inference-worker", "inference-api", 8102),
    ("inference-worker", "storage", 8103),
    ("nats", "nats", 6222),
}
"""Every call between pods that is part of the design; all others are refused."""

WEB = {"gateway", "storage"}
"""Who may reach addresses that users name: webhooks, and data and models."""


@pytest.fixture(scope="session")
def with_components(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """The base with the components that no overlay has."""
    return composed(tmp_path_factory.mktemp("composed"), TOGETHER)


def workload(manifests: Sequence[Manifest], name: str) -> Manifest:
    (found,) = [each for each in of_kind(manifests, *WORKLOADS) if each["metadata"]["name"] == name]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_the_schemas_and_the_policy(overlay: str) -> None:
    manifests = rendered(overlay)
    assert [fault for each in manifests for fault in schema_faults(each)] == []
    assert policy_faults(manifests) == []


def test_components_keep_the_schemas_and_the_policy(with_components: list[Manifest]) -> None:
    assert [fault for each in with_components for fault in schema_faults(each)] == []
    assert policy_faults(with_components) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_call_each_other_as_designed_and_not_otherwise(overlay: str) -> None:
    assert calls(rendered(overlay)) == CALLS


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize(
    ("address", "port", "who"),
    [
        ("93.184.216.34", 443, WEB),
        ("2606:2800:220:1::1", 443, WEB),
        ("93.184.216.34", 25, set()),
        ("10.1.2.3", 443, set()),
        ("192.168.1.1", 80, set()),
        ("169.254.169.254", 80, set()),
        ("fd00::1", 443, set()),
        ("127.0.0.1", 8000, set()),
    ],
    ids=["web", "web by IPv6", "mail", "cluster", "home", "cloud metadata", "private by IPv6", "loopback"],
)
def test_only_gateway_and_storage_reach_the_web_and_nobody_a_private_network(
    overlay: str, address: str, port: int, who: set[str]
) -> None:
    manifests = rendered(overlay)
    found = {
        each["metadata"]["name"]
        for each in of_kind(manifests, *WORKLOADS)
        if reaches_address(manifests, each, address, port)
    }
    assert found == who


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_edge_and_the_autoscaler_s_numbers_are_called_from_other_namespaces(overlay: str) -> None:
    assert others_may_call(rendered(overlay)) == {
        ("gateway", "{'likeness/edge': 'true'}"),
        ("trainer-api", "{'kubernetes.io/metadata.name': 'keda'}"),
        ("inference-api", "{'kubernetes.io/metadata.name': 'keda'}"),
    }


def places(manifests: Sequence[Manifest], name: str) -> tuple[str, set[str]]:
    """The pool whose machines a workload asks for, and the pools whose taint it bears."""
    pod = pod_of(workload(manifests, name))
    tolerated = {each["value"] for each in pod.get("tolerations", ()) if each["key"] == "likeness/pool"}
    return pod.get("nodeSelector", {}).get("likeness/pool", ""), tolerated


def test_training_and_drawing_have_pools_of_their_own() -> None:
    manifests = rendered("production")
    assert places(manifests, "trainer-worker") == ("training", {"training"})
    assert places(manifests, "inference-worker") == ("drawing", {"drawing"})


def test_on_one_gpu_both_kinds_of_workers_share_the_pool() -> None:
    manifests = rendered("small")
    assert (
        places(manifests, "trainer-worker") == places(manifests, "inference-worker") == ("shared", {"shared"})
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_workers_come_from_none_with_the_jobs_that_their_api_tells_of(overlay: str) -> None:
    manifests = rendered(overlay)
    trainings = named(manifests, "ScaledJob", "trainer-worker")["spec"]
    drawings = named(manifests, "ScaledObject", "inference-worker")["spec"]
    assert trainings["minReplicaCount"] == drawings["minReplicaCount"] == 0
    assert "replicas" not in named(manifests, "Deployment", drawings["scaleTargetRef"]["name"])["spec"]
    for scaled, api, port in ((trainings, "trainer-api", 8101), (drawings, "inference-api", 8102)):
        for trigger in scaled["triggers"]:
            metadata = trigger["metadata"]
            assert trigger["type"] == "external"
            assert metadata["scalerAddress"] == f"{api}.likeness:{port}"
            assert metric_of(metadata) in METRICS
            assert target_of(metadata) > 0
        assert named(manifests, "Service", api)["spec"]["ports"][0]["port"] == port


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_trainer_s_pod_does_one_training_and_a_disruption_is_no_failure(overlay: str) -> None:
    manifests = rendered(overlay)
    trainer = named(manifests, "ScaledJob", "trainer-worker")
    job = trainer["spec"]["jobTargetRef"]
    rules = {rule["action"]: rule for rule in job["podFailurePolicy"]["rules"]}
    assert float(environ_of(manifests, trainer)["LIKENESS_ONE_JOB_WITHIN_S"]) > 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert rules["Ignore"]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert rules["FailJob"]["onExitCodes"]["values"] == [CONFIGURATION_FAULT]
    assert rules["FailJob"]["onExitCodes"]["containerName"] == pod_of(trainer)["containers"][0]["name"]


def test_on_one_gpu_one_worker_is_there_at_a_time() -> None:
    manifests = rendered("small")
    assert [each["spec"]["maxReplicaCount"] for each in of_kind(manifests, "ScaledJob", "ScaledObject")] == [
        1,
        1,
    ]
    devices = [
        pod_of(workload(manifests, name))["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        for name in ("trainer-worker", "inference-worker")
    ]
    assert devices == ["1", "1"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_workers_ask_for_a_device_or_go_where_one_is(overlay: str) -> None:
    manifests = rendered(overlay)
    for each in of_kind(manifests, *WORKLOADS):
        name, pod = each["metadata"]["name"], pod_of(each)
        works = name.endswith("-worker")
        assert ("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]) == works, name
        assert bool(places(manifests, name)[0]) == works, name
        assert bool(pod.get("tolerations")) == works, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_hands_out_work_outranks_drawing_and_drawing_outranks_training(overlay: str) -> None:
    manifests = rendered(overlay)
    value = {each["metadata"]["name"]: each["value"] for each in of_kind(manifests, "PriorityClass")}
    rank = {
        each["metadata"]["name"]: value[pod_of(each)["priorityClassName"]]
        for each in of_kind(manifests, *WORKLOADS)
    }
    assert min(rank["gateway"], rank["nats"], rank["storage"], rank["trainer-api"]) > rank["inference-worker"]
    assert rank["inference-worker"] > rank["trainer-worker"]


def test_the_job_log_has_three_synced_servers_with_disks_of_their_own() -> None:
    manifests = rendered("production")
    nats = named(manifests, "StatefulSet", "nats")
    files = next(each["data"] for each in of_kind(manifests, "ConfigMap") if "nats.conf" in each["data"])
    assert nats["spec"]["replicas"] == 3
    assert [each["metadata"]["name"] for each in nats["spec"]["volumeClaimTemplates"]] == ["data"]
    assert "sync_interval: always" in files["nats.conf"]
    platform = next(
        each["data"] for each in of_kind(manifests, "ConfigMap") if "LIKENESS_NATS_REPLICAS" in each["data"]
    )
    assert platform["LIKENESS_NATS_REPLICAS"] == "3"


def test_every_component_is_rendered_by_an_overlay_or_by_the_test_of_components() -> None:
    shown = {
        name
        for name in COMPONENTS
        for o in OVERLAYS
        if f"components/{name}" in (K8S / "overlays" / o / "kustomization.yaml").read_text()
    }
    assert shown | set(TOGETHER) == set(COMPONENTS)


Change = Callable[[list[Manifest]], object]


def container(manifests: Sequence[Manifest], name: str = "gateway") -> Manifest:
    found: Manifest = pod_of(workload(manifests, name))["containers"][0]
    return found


def drop(manifests: list[Manifest], kind: str, name: str) -> None:
    manifests.remove(named(manifests, kind, name))


PLANTED: dict[str, tuple[Change, str]] = {
    "root": (
        lambda m: pod_of(workload(m, "gateway"))["securityContext"].pop("runAsNonRoot"),
        "gateway: may run as root",
    ),
    "rights": (lambda m: container(m)["securityContext"].pop("capabilities"), "gateway: may gain rights"),
    "writable": (
        lambda m: container(m, "nats")["securityContext"].update(readOnlyRootFilesystem=False),
        "nats: may write to its image",
    ),
    "token": (
        lambda m: pod_of(workload(m, "storage")).pop("automountServiceAccountToken"),
        "storage: gets a token of its ServiceAccount",
    ),
    "latest": (
        lambda m: container(m).update(image="likeness/gateway:latest"),
        "gateway: the image likeness/gateway:latest names no exact version",
    ),
    "untagged": (
        lambda m: container(m, "nats").update(image="nats"),
        "nats: the image nats names no exact version",
    ),
    "no probe": (lambda m: container(m).pop("livenessProbe"), "gateway: has no livenessProbe"),
    "no limits": (
        lambda m: container(m)["resources"]["limits"].pop("memory"),
        "gateway: limits say nothing of memory",
    ),
    "another image": (
        lambda m: container(m).update(image="likeness/storage:0.1.0"),
        "gateway: the image has another name or is missing",
    ),
    "no account": (
        lambda m: drop(m, "ServiceAccount", "nats"),
        "nats: the ServiceAccount has another name or is missing",
    ),
    "no budget": (
        lambda m: drop(m, "PodDisruptionBudget", "nats"),
        "nats: the budget has another name or is missing",
    ),
    "unlabelled": (
        lambda m: template_of(workload(m, "gateway"))["metadata"]["labels"].pop("app.kubernetes.io/part-of"),
        "gateway: its pods do not say that they are part of likeness",
    ),
    "open": (
        lambda m: drop(m, "NetworkPolicy", "default-deny"),
        "no policy denies what is not allowed, both ways",
    ),
    "privileged": (
        lambda m: named(m, "Namespace", "likeness")["metadata"]["labels"].clear(),
        "the namespace does not enforce the restricted profile",
    ),
    "elsewhere": (
        lambda m: named(m, "Ingress", "gateway")["metadata"].pop("namespace"),
        "Ingress gateway is not in the namespace likeness",
    ),
    "host path": (
        lambda m: pod_of(workload(m, "storage"))["volumes"].append(
            {"name": "root", "hostPath": {"path": "/"}}
        ),
        "storage: the volume root is of another kind, or has no bound",
    ),
    "unknown setting": (
        lambda m: container(m)["env"].append({"name": "LIKENESS_COLOUR", "value": "red"}),
        "gateway: LIKENESS_COLOUR: no such setting",
    ),
    "another's setting": (
        lambda m: container(m)["env"].append({"name": "LIKENESS_BATCH_CAP", "value": "4"}),
        "gateway: does not read LIKENESS_BATCH_CAP",
    ),
    "secret in the environment": (
        lambda m: container(m)["env"].append(
            {"name": "X", "valueFrom": {"secretKeyRef": {"name": "gateway-secrets", "key": "nats-url"}}}
        ),
        "gateway: has a secret in its environment",
    ),
    "no volume": (
        lambda m: container(m)["env"].append({"name": "LIKENESS_HOME", "value": "/data"}),
        "gateway: LIKENESS_HOME is on no volume",
    ),
    "killed early": (
        lambda m: pod_of(workload(m, "trainer-worker")).update(terminationGracePeriodSeconds=30),
        "trainer-worker: is killed before its grace is over",
    ),
    "another port": (
        lambda m: container(m, "storage")["ports"][0].update(containerPort=9000),
        "storage: does not listen on its port 9000",
    ),
    "wrong selector": (
        lambda m: named(m, "Service", "storage")["spec"]["selector"].update(
            {"app.kubernetes.io/name": "store"}
        ),
        "Service storage chooses 0 workloads",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_of_policy_is_found(fault: str) -> None:
    manifests = copy.deepcopy(rendered("production"))
    change, said = PLANTED[fault]
    change(manifests)
    assert said in policy_faults(manifests)


MISSHAPEN: dict[str, tuple[str, str, Callable[[dict[str, Any]], object]]] = {
    "unknown field": ("Deployment", "gateway", lambda m: m["spec"].update(replica=2)),
    "wrong type": ("Deployment", "gateway", lambda m: m["spec"].update(minReadySeconds="soon")),
    "no selector": ("StatefulSet", "nats", lambda m: m["spec"].pop("selector")),
    "a job's unknown field": (
        "ScaledJob",
        "trainer-worker",
        lambda m: m["spec"]["jobTargetRef"].update(tries=2),
    ),
    "a trigger's number": (
        "ScaledObject",
        "inference-worker",
        lambda m: m["spec"]["triggers"][0]["metadata"].update(target=4),
    ),
    "unknown kind": ("Service", "nats", lambda m: m.update(apiVersion="likeness.example/v1")),
}


@pytest.mark.parametrize("fault", MISSHAPEN)
def test_a_planted_fault_of_shape_is_found(fault: str) -> None:
    kind, name, change = MISSHAPEN[fault]
    manifest = copy.deepcopy(named(rendered("production"), kind, name))
    assert schema_faults(manifest) == []
    change(manifest)
    assert len(schema_faults(manifest)) == 1


def test_a_misspelt_field_of_a_custom_resource_is_found(with_components: list[Manifest]) -> None:
    route = copy.deepcopy(named(with_components, "HTTPRoute", "gateway"))
    route["spec"]["hostname"] = route["spec"].pop("hostnames")
    assert [fault.split(": ")[2] for fault in schema_faults(route)] == [
        "Additional properties are not allowed ('hostname' was unexpected)"
    ]


def test_a_policy_that_opens_one_side_only_opens_nothing_and_one_that_opens_both_is_found() -> None:
    manifests = copy.deepcopy(rendered("production"))
    named(manifests, "NetworkPolicy", "trainer-worker")["spec"]["egress"].append({})
    assert calls(manifests) == CALLS
    assert reaches_address(manifests, workload(manifests, "trainer-worker"), "93.184.216.34", 443)
    named(manifests, "NetworkPolicy", "nats")["spec"]["ingress"].append({"from": [{"podSelector": {}}]})
    assert calls(manifests) - CALLS >= {("trainer-worker", "nats", 4222), ("trainer-worker", "nats", 8222)}


def test_another_program_under_the_name_of_kubectl_is_not_run(tmp_path: Path) -> None:
    program = tmp_path / "kubectl"
    program.write_text("#!/bin/sh\n")
    with pytest.raises(AssertionError, match="is not the kubectl that is pinned"):
        pinned_kubectl(program)
