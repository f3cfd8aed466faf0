"""A worker that is meant for one training: it does that one, or none, and ends by itself."""

import asyncio
from pathlib import Path

from PIL import Image

from tests.integration.trainer.platform import WEIGHTS, open_platform
from tests.integration.trainer.test_worker import FAKE, spec_of


async def test_a_worker_for_one_training_leaves_the_next_one_to_others(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / WEIGHTS).parent.mkdir(parents=True)
    (base / WEIGHTS).write_bytes(b"base")
    picture = tmp_path / "picture.png"
    Image.new("RGB", (16, 16)).save(picture)
    async with open_platform(tmp_path) as platform:
        await platform.add_base_model(base)
        for _ in range(2):
            platform.api.waiting.append(await platform.assignment(spec_of(), ([picture], [picture])))
        async with platform.worker("trains", module=FAKE, one_job_within_s=60) as worker:
            await asyncio.wait_for(asyncio.shield(worker.task), 60)
        assert platform.api.kinds() == ["training", "uploading", "trained"]
        assert len(platform.api.waiting) == 1


async def test_a_worker_for_one_training_ends_when_none_comes(tmp_path: Path) -> None:
    async with (
        open_platform(tmp_path) as platform,
        platform.worker("trains", module=FAKE, one_job_within_s=0.2) as worker,
    ):
        await asyncio.wait_for(asyncio.shield(worker.task), 30)
        assert worker.process.pid is None
        assert platform.api.reports == []
