"""Work beside a training: in order, by the batch, and never its end."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.domain.errors import StaleEpoch, Unavailable
from services.trainer.upload_queue import UploadQueue, held, let_go


class Store:
    """Takes what it is given, but for one piece, which it cannot."""

    def __init__(self, refused: int = 0, error: Exception | None = None) -> None:
        self.batches: list[list[int]] = []
        self._refused = refused
        self._error = error

    async def __call__(self, pieces: Sequence[int]) -> None:
        self.batches.append(list(pieces))
        await asyncio.sleep(0)
        if self._error is not None and self._refused in pieces:
            raise self._error


async def stored(store: Store, pieces: Sequence[int], at_once: int | None) -> list[list[int]]:
    queue = UploadQueue[int]("pieces", store, at_once)
    running = asyncio.create_task(queue.run())
    for piece in pieces:
        queue.add(piece)
    await asyncio.wait_for(queue.drain(), 10)
    running.cancel()
    return store.batches


@pytest.mark.parametrize(
    ("at_once", "batches"), [(1, [[1], [2], [3]]), (2, [[1, 2], [3]]), (None, [[1, 2, 3]])]
)
async def test_all_that_is_added_is_handed_over_in_its_order(
    at_once: int | None, batches: list[list[int]]
) -> None:
    assert await stored(Store(), [1, 2, 3], at_once) == batches


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (Unavailable("storage is away"), logging.WARNING),
        (StaleEpoch("another has the job"), logging.INFO),
        (KeyError("nobody thought of this"), logging.ERROR),
    ],
)
async def test_a_piece_that_cannot_be_stored_is_logged_and_holds_up_nothing(
    error: Exception, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert await stored(Store(2, error), [1, 2, 3], 1) == [[1], [2], [3]]
    assert [record.levelno for record in caplog.records if "pieces" in record.getMessage()] == [level]


async def test_a_held_checkpoint_outlives_its_folder_until_it_is_let_go(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000003"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("3")
    copy = await held(checkpoint, tmp_path / "held")
    assert copy is not None
    (checkpoint / "weights").unlink()
    checkpoint.rmdir()
    assert (copy / "weights").read_text() == "3"
    await let_go([copy])
    assert not copy.exists()
    assert await held(checkpoint, tmp_path / "held") is None
