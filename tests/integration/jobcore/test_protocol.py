"""The protocol of the job core, tried at random against a real server that is killed meanwhile.

More of it: `PROTOCOL_SEEDS=20 pytest tests/integration/jobcore/test_protocol.py`, which takes about a
quarter of a minute for each seed.
"""

import os
from pathlib import Path

import pytest

from services.domain.job import JobState
from tests.integration.jobcore.simulation import Plan, simulate
from tests.integration.nats_server import NatsCluster, NatsServer

SEEDS = range(1, 1 + int(os.environ.get("PROTOCOL_SEEDS", "1")))


@pytest.mark.parametrize("seed", SEEDS)
async def test_no_accident_breaks_a_rule_of_the_log(own_nats_server: NatsServer, seed: int) -> None:
    report = await simulate(own_nats_server, Plan(seed))

    assert report.violations == []
    assert report.takings > 150, "the run went through too little to prove anything"
    assert report.refused > 20
    assert set(report.states) >= {JobState.SUCCEEDED, JobState.CANCELLED, JobState.FAILED}


async def test_no_accident_breaks_a_rule_of_the_log_on_a_cluster_that_loses_its_leader(
    tmp_path: Path,
) -> None:
    cluster = NatsCluster(tmp_path)
    try:
        cluster.start()
        report = await simulate(cluster, Plan(seed=1, jobs=60, kills=1))
    finally:
        cluster.kill()

    assert report.violations == []
    assert report.takings > 40, "the run went through too little to prove anything"


async def test_the_checker_notices_workers_that_write_without_comparing(own_nats_server: NatsServer) -> None:
    plan = Plan(seed=1, jobs=60, kills=0, accidents=0.3, blind_workers=True, patience_s=4)

    report = await simulate(own_nats_server, plan)

    assert len(report.violations) >= 5
    assert any("ended 2 times" in fault or "became" in fault for fault in report.violations)
