from typing import Any

import pytest

from services.adapters import subjects
from services.adapters.jetstream_connection import ServerClock, time_ms_of
from services.adapters.jetstream_streams import (
    GIB,
    ServerRefused,
    check_answers,
    check_version,
    differences,
    stream_configs,
)


def answer(name: str, version: str = "2.15.1", sync: bool = True) -> dict[str, Any]:
    config = {"sync_always": True} if sync else {}
    return {"server": {"name": name, "ver": version}, "data": {"config": config}}


@pytest.mark.parametrize("version", ["2.15.1", "2.15.2", "2.16.0", "3.0.0", "2.100.0"])
def test_the_tried_version_and_newer_ones_are_accepted(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["2.15.0", "2.9.99", "1.99.0", "0.0.0", ""])
def test_an_older_version_is_refused(version: str) -> None:
    with pytest.raises(ServerRefused):
        check_version(version)


def test_a_cluster_whose_servers_all_sync_is_accepted() -> None:
    check_answers([answer("a"), answer("b"), answer("c")], nodes=3)


def test_a_cluster_with_a_server_missing_is_refused() -> None:
    with pytest.raises(ServerRefused, match="2 of 3 servers of the job log answered: a, b"):
        check_answers([answer("b"), answer("a")], nodes=3)


def test_one_server_that_does_not_sync_is_named() -> None:
    with pytest.raises(ServerRefused, match="server b does not sync"):
        check_answers([answer("a"), answer("b", sync=False), answer("c")], nodes=3)


def test_one_server_of_an_older_version_is_refused() -> None:
    with pytest.raises(ServerRefused, match=r"2\.14\.0"):
        check_answers([answer("a"), answer("b", "2.14.0"), answer("c")], nodes=3)


def test_a_single_node_keeps_passing_things_in_a_file_and_a_cluster_in_memory() -> None:
    alone, cluster = stream_configs(1), stream_configs(3)

    assert (alone[subjects.LIVE]["storage"], alone[subjects.LIVE]["persist_mode"]) == ("file", "async")
    assert cluster[subjects.LIVE]["storage"] == "memory"
    assert "persist_mode" not in cluster[subjects.LIVE]
    assert (alone[subjects.JOBS]["max_bytes"], cluster[subjects.JOBS]["max_bytes"]) == (4 * GIB, 32 * GIB)
    assert {config["num_replicas"] for config in cluster.values()} == {3}


def test_no_record_is_ever_dropped_to_make_room() -> None:
    jobs = stream_configs(1)[subjects.JOBS]

    assert (jobs["discard"], jobs["max_msgs_per_subject"], jobs["max_age"]) == ("new", -1, 0)


def test_what_the_server_fills_in_is_no_difference() -> None:
    wanted = stream_configs(1)[subjects.JOBS]
    filled = {
        "sealed": False,
        "compression": "none",
        "duplicate_window": 120_000_000_000,
        "consumer_limits": {},
    }

    assert differences(wanted, wanted | filled | {"metadata": {"_nats.ver": "2.15.1"}}) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_replicas", 3),
        ("discard", "old"),
        ("allow_atomic", True),
        ("compression", "s2"),
        ("republish", {"src": ">", "dest": "x"}),
        ("metadata", {"owner": "somebody"}),
    ],
)
def test_any_other_field_is_a_difference(field: str, value: Any) -> None:
    wanted = stream_configs(1)[subjects.JOBS]

    (fault,) = differences(wanted, wanted | {field: value})

    assert fault.startswith(f"{field} is {value!r}")


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [
        ("1970-01-01T00:00:01Z", 1_000),
        ("1970-01-01T00:00:01.5Z", 1_500),
        ("2023-11-14T22:13:20.123456789Z", 1_700_000_000_123),
        ("2023-11-14T22:13:20.00012Z", 1_700_000_000_000),
    ],
)
def test_the_servers_time_stamps_are_read_to_the_millisecond(stamp: str, expected: int) -> None:
    assert time_ms_of(stamp) == expected


def test_the_servers_clock_is_followed_and_never_goes_back() -> None:
    clock = ServerClock()
    clock.set(server_ms=10**15, sent=0.0, received=0.0)
    far = clock.now_ms()
    clock.set(server_ms=0, sent=0.0, received=0.0)

    assert far >= 10**15
    assert clock.now_ms() == far
