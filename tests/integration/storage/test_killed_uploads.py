"""Storage and its S3 server killed in the middle of uploads; `python -m tests.chaos.storing` kills more often."""

from pathlib import Path

import pytest

from tests.chaos.storing import campaign
from tests.integration.s3_server import S3Server


@pytest.mark.timeout(400)  # processes start four times
async def test_no_registered_model_is_lost_and_nothing_half_is_seen(
    bucket_server: S3Server, tmp_path: Path
) -> None:
    outcome = await campaign(bucket_server, tmp_path, kills=3, seed=2)
    assert outcome.faults == []
    assert len(outcome.committed) >= 3
    assert outcome.seen >= 3 * len(outcome.committed)
