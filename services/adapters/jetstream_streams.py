"""The streams of the job core, exactly as they must be, and what is asked of the server that holds them.

Nothing here changes a stream that exists: one that differs in any field is refused, because a record that is
dropped by a wrong limit is a lost job.
"""

import asyncio
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Final

from nats.aio.client import Client
from nats.aio.msg import Msg

from services.adapters import subjects
from services.adapters.jetstream_connection import (
    STREAM_NOT_FOUND,
    Backoff,
    Connection,
    NoAnswer,
    NotSent,
    Refused,
)
from services.domain.errors import Unavailable

logger = logging.getLogger(__name__)

OLDEST_SERVER: Final = (2, 15, 1)
KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
_SECOND_NS: Final = 1_000_000_000
_HOUR_NS: Final = 3600 * _SECOND_NS
_CREATE_PATIENCE_S: Final = 20.0
_CLUSTER_WAIT_S: Final = 1.0

_UNSET_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "compression": ("none",),
    "persist_mode": ("", "default"),
    "duplicate_window": (2 * 60 * _SECOND_NS,),
}
"""What the server writes for a field that was left unset, where that is not empty."""


class ServerRefused(Exception):
    """The server or a stream is not what this platform relies on; the text names everything that differs."""


def stream_configs(replicas: int, jobs_max_bytes: int | None = None) -> dict[str, dict[str, Any]]:
    """The configuration of every stream, in the server's own spelling.

    Args:
        replicas: copies of each stream: 1, or 3 on a cluster.
        jobs_max_bytes: room for job records; default 4 GiB, on a cluster 32 GiB.
    """
    room = jobs_max_bytes or (4 * GIB if replicas == 1 else 32 * GIB)
    kept = {"storage": "file", "discard": "new", "deny_delete": True}
    passing = {"storage": "file", "persist_mode": "async"} if replicas == 1 else {"storage": "memory"}
    particular: dict[str, dict[str, Any]] = {
        subjects.JOBS: kept | _limits(room, -1, 64 * KIB, 0) | {"allow_direct": True},
        subjects.IDEM: kept | _limits(64 * MIB, 1, KIB, 24 * _HOUR_NS),
        subjects.HOOKS: kept | _limits(256 * MIB, 8, 4 * KIB, 0),
        subjects.LIVE: passing
        | _limits(256 * MIB, 500, 16 * KIB, 48 * _HOUR_NS)
        | {"discard": "old", "allow_direct": True},
    }
    return {name: _common(name, replicas) | special for name, special in particular.items()}


def _limits(max_bytes: int, per_subject: int, max_message: int, max_age_ns: int) -> dict[str, Any]:
    return {
        "max_bytes": max_bytes,
        "max_msgs_per_subject": per_subject,
        "max_msg_size": max_message,
        "max_age": max_age_ns,
    }


def _common(name: str, replicas: int) -> dict[str, Any]:
    return {
        "name": name,
        "subjects": list(subjects.STREAM_SUBJECTS[name]),
        "retention": "limits",
        "num_replicas": replicas,
        "max_msgs": -1,
        "max_consumers": -1,
        "deny_delete": False,
        "deny_purge": False,
        "allow_direct": False,
    }


async def ensure_streams(connection: Connection, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes the streams that are missing and compares those that exist, field by field.

    Raises:
        ServerRefused: a stream differs, or cannot be made as it must be; names every difference.
        Unavailable: the server does not answer.
    """
    faults: list[str] = []
    for name, wanted in configs.items():
        actual = await _existing(connection, name) or await _created(connection, name, wanted)
        faults += [f"stream {name}: {fault}" for fault in differences(wanted, actual)]
    if faults:
        raise ServerRefused("; ".join(faults))


async def _existing(connection: Connection, name: str) -> dict[str, Any] | None:
    try:
        answer = await connection.ask_patiently(subjects.stream_api("INFO", name))
    except Refused as error:
        if error.err_code == STREAM_NOT_FOUND:
            return None
        raise ServerRefused(f"stream {name}: {error}") from error
    return dict(answer["config"])


async def _created(connection: Connection, name: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Makes a stream; a cluster with a server down has no room for three copies, so this tries for a while."""
    backoff = Backoff(_CREATE_PATIENCE_S)
    while True:
        try:
            answer = await connection.ask(subjects.stream_api("CREATE", name), wanted)
            logger.info("made stream %s", name)
            return dict(answer["config"])
        except (NoAnswer, NotSent, Refused) as error:
            passing = not isinstance(error, Refused) or error.code == 503 or error.err_code == 10005
            if backoff.over or not passing:
                raise ServerRefused(f"stream {name} cannot be made: {error}") from error
        await backoff.pause()


def differences(wanted: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Every field of a stream's configuration that is not as it must be, one sentence part each."""
    wrong = [
        f"{field} is {actual.get(field)!r} and must be {value!r}"
        for field, value in wanted.items()
        if (actual.get(field) or 0) != (value or 0)
    ]
    extra = [
        f"{field} is {value!r} and must not be set"
        for field, value in actual.items()
        if field not in wanted and not _unset(field, value)
    ]
    return wrong + extra


def _unset(field: str, value: Any) -> bool:
    if field == "metadata":
        return all(key.startswith("_nats.") for key in value)
    return not value or value in _UNSET_VALUES.get(field, ())


def check_version(version: str) -> None:
    """Refuses servers older than the one this platform was tried with.

    Raises:
        ServerRefused: too old, or not a version.
    """
    try:
        found = tuple(int(part) for part in version.split("-")[0].split("."))
    except ValueError as error:
        raise ServerRefused(f"the server's version {version!r} cannot be read") from error
    if found < OLDEST_SERVER:
        oldest = ".".join(map(str, OLDEST_SERVER))
        raise ServerRefused(f"the server's version is {version}, and {oldest} or newer is needed")


async def check_monitor(monitor_url: str) -> None:
    """Asks a server's monitor whether every write reaches the disk before its acknowledgement.

    Args:
        monitor_url: where the server answers its monitor, `http://127.0.0.1:port`.

    Raises:
        ServerRefused: it does not sync every write.
        Unavailable: the monitor does not answer.
    """
    state = await asyncio.to_thread(_fetch_json, f"{monitor_url.rstrip('/')}/varz")
    _require_sync("the server", state.get("jetstream", {}).get("config", {}))


def _fetch_json(url: str) -> dict[str, Any]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the monitor is on this machine
    try:
        with opener.open(url, timeout=5) as answer:
            return dict(json.load(answer))
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise Unavailable(f"the job log's monitor does not answer at {url}") from error


def _require_sync(who: str, config: Mapping[str, Any]) -> None:
    if config.get("sync_always") is not True:
        raise ServerRefused(f"{who} does not sync every write: its configuration needs sync_interval: always")


async def check_cluster(servers: Sequence[str], nodes: int, wait_s: float = _CLUSTER_WAIT_S) -> None:
    """Asks every server of a cluster for its version and whether it syncs every write.

    Args:
        servers: addresses with the credentials of a user of the system account.
        nodes: how many servers must answer.
        wait_s: how long to gather answers.

    Raises:
        ServerRefused: a server is missing, too old, or does not sync every write.
    """
    client = Client()
    await client.connect(
        servers=list(servers), name="likeness-check", connect_timeout=5, allow_reconnect=False
    )
    answers: list[Msg] = []

    async def keep(message: Msg) -> None:
        answers.append(message)

    try:
        inbox = client.new_inbox()
        await client.subscribe(inbox, cb=keep)
        await client.publish(subjects.CLUSTER_PING, b'{"config": true}', reply=inbox)
        await asyncio.sleep(wait_s)
    finally:
        await client.close()
    check_answers([json.loads(message.data) for message in answers if message.data], nodes)


def check_answers(answers: Sequence[Mapping[str, Any]], nodes: int) -> None:
    """Judges what the servers of a cluster said of themselves.

    Raises:
        ServerRefused: as :func:`check_cluster`.
    """
    if len(answers) < nodes:
        names = ", ".join(sorted(str(answer["server"]["name"]) for answer in answers)) or "none"
        raise ServerRefused(f"{len(answers)} of {nodes} servers of the job log answered: {names}")
    for answer in answers:
        check_version(str(answer["server"]["ver"]))
        _require_sync(f"server {answer['server']['name']}", answer.get("data", {}).get("config", {}))
