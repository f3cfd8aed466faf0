"""Who may call whom, read off rendered NetworkPolicies as a cluster's network would: both sides must allow it."""

from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from typing import Any

from tests.unit.deploy.manifests import WORKLOADS, Manifest, of_kind, pod_of, template_of

Labels = dict[str, str]


def _matches(selector: dict[str, Any] | None, labels: Labels) -> bool:
    assert selector is not None
    return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items()) and all(
        _expressed(each, labels) for each in selector.get("matchExpressions", ())
    )


def _expressed(expression: dict[str, Any], labels: Labels) -> bool:
    assert expression["operator"] == "In", "no other operator is understood here"
    return labels.get(expression["key"]) in expression["values"]


def _allows_port(rule: dict[str, Any], port: int) -> bool:
    ports = rule.get("ports")
    return ports is None or any(
        each.get("protocol", "TCP") == "TCP" and each["port"] <= port <= each.get("endPort", each["port"])
        for each in ports
    )


def _rules(manifests: Sequence[Manifest], labels: Labels, direction: str) -> list[dict[str, Any]] | None:
    """The rules that hold for a pod; None when no policy isolates it."""
    policies = [
        each["spec"]
        for each in of_kind(manifests, "NetworkPolicy")
        if direction in each["spec"]["policyTypes"] and _matches(each["spec"]["podSelector"], labels)
    ]
    return [rule for each in policies for rule in each.get(direction.lower(), ())] if policies else None


def _passes(rules: list[dict[str, Any]] | None, side: str, labels: Labels, port: int) -> bool:
    if rules is None:
        return True
    return any(
        _allows_port(rule, port)
        and (
            side not in rule
            or any(
                "podSelector" in p and "namespaceSelector" not in p and _matches(p["podSelector"], labels)
                for p in rule[side]
            )
        )
        for rule in rules
    )


def labels_of(workload: Manifest) -> Labels:
    """Labels of a workload's pods."""
    labels: Labels = template_of(workload)["metadata"]["labels"]
    return labels


def calls(manifests: Sequence[Manifest]) -> set[tuple[str, str, int]]:
    """Every call between pods that the policies let pass: caller, called, port of the called container."""
    workloads = of_kind(manifests, *WORKLOADS)
    return {
        (caller["metadata"]["name"], called["metadata"]["name"], port["containerPort"])
        for caller in workloads
        for called in workloads
        for port in pod_of(called)["containers"][0].get("ports", ())
        if _passes(
            _rules(manifests, labels_of(caller), "Egress"), "to", labels_of(called), port["containerPort"]
        )
        and _passes(
            _rules(manifests, labels_of(called), "Ingress"), "from", labels_of(caller), port["containerPort"]
        )
    }


def reaches_address(manifests: Sequence[Manifest], workload: Manifest, address: str, port: int) -> bool:
    """Whether a workload's pods may call an address outside the cluster."""
    rules = _rules(manifests, labels_of(workload), "Egress")
    return rules is None or any(
        _allows_port(rule, port) and _names(rule.get("to"), address) for rule in rules
    )


def _names(peers: list[dict[str, Any]] | None, address: str) -> bool:
    blocks = [each["ipBlock"] for each in peers or () if "ipBlock" in each]
    ip = ip_address(address)
    return peers is None or any(
        ip in ip_network(block["cidr"])
        and not any(ip in ip_network(part) for part in block.get("except", ()))
        for block in blocks
    )


def others_may_call(manifests: Sequence[Manifest]) -> set[tuple[str, str]]:
    """Workloads that pods of other namespaces may call, each with the labels that those namespaces must have."""
    anybody: list[dict[str, Any]] = [{"from": [{"namespaceSelector": {}}]}]
    found = set()
    for workload in of_kind(manifests, *WORKLOADS):
        rules = _rules(manifests, labels_of(workload), "Ingress")
        peers = [
            peer
            for rule in (anybody if rules is None else rules)
            for peer in rule.get("from", anybody[0]["from"])
        ]
        selectors = [peer["namespaceSelector"] for peer in peers if "namespaceSelector" in peer]
        found |= {(workload["metadata"]["name"], str(each.get("matchLabels"))) for each in selectors}
    return found
