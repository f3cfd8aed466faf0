"""Writes the Secrets of a new installation, with fresh random passwords: `python new_secrets.py | kubectl apply -f -`.

Standard library only, so that it runs wherever kubectl does. Whoever has the passwords can read the job log; keep no
copy. Running it again makes new ones: restart NATS first, then the services.
"""

import argparse
import json
import secrets
import sys

USERS = ("gateway", "trainer-api", "inference-api")
SERVERS = 3


def manifests(replicas: int, namespace: str) -> list[dict[str, object]]:
    """The Secrets.

    Args:
        replicas: servers of the job log, 1 or 3.
        namespace: where the platform is.

    Returns:
        One for the servers, one for each service that has a user there, and the first API key for storage.
    """
    passwords = {name: secrets.token_urlsafe(32) for name in (*USERS, "checker", "route")}
    hosts = [f"nats-{number}.nats-peers" for number in range(SERVERS)]
    conf = {
        "passwords.conf": {f"{_variable(user)}_PASSWORD": passwords[user] for user in (*USERS, "checker")}
    }
    if replicas > 1:
        routes = {
            f"ROUTE_{n}": f"nats://route:{passwords['route']}@{host}:6222" for n, host in enumerate(hosts)
        }
        conf["routes.conf"] = {"ROUTE_PASSWORD": passwords["route"], **routes}
    system = f"nats://checker:{passwords['checker']}@nats:4222"
    made = [_secret("nats-secrets", namespace, {name: _lines(values) for name, values in conf.items()})]
    for user in USERS:
        files = {"nats-url": f"nats://{user}:{passwords[user]}@nats:4222", "nats-system-url": system}
        if user == "gateway":
            files["webhook-secret"] = secrets.token_urlsafe(32)
        made.append(_secret(f"{user}-secrets", namespace, files))
    first_key = f"lk_{secrets.token_urlsafe(32)}"
    return [*made, _secret("storage-secrets", namespace, {"api-key": first_key})]


def _variable(user: str) -> str:
    return user.upper().replace("-", "_")


def _lines(values: dict[str, str]) -> str:
    """Variables as nats-server reads them."""
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())


def _secret(name: str, namespace: str, files: dict[str, str]) -> dict[str, object]:
    metadata = {
        "name": name,
        "namespace": namespace,
        "labels": {
            "app.kubernetes.io/name": name.removesuffix("-secrets"),
            "app.kubernetes.io/part-of": "likeness",
        },
    }
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": files}


def main() -> None:
    """Writes them to standard output, as one list."""
    parser = argparse.ArgumentParser(description="Secrets of a new installation, for kubectl apply -f -")
    parser.add_argument("--replicas", type=int, choices=(1, 3), default=3, help="servers of the job log (3)")
    parser.add_argument("--namespace", default="likeness")
    given = parser.parse_args()
    listed = {"apiVersion": "v1", "kind": "List", "items": manifests(given.replicas, given.namespace)}
    sys.stdout.write(json.dumps(listed, indent=2) + "\n")


if __name__ == "__main__":
    main()
