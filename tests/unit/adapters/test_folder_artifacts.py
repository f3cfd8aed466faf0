"""What only the folder has to prove: whole files whatever happens to their writer."""

import asyncio
import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from services.adapters.folder_artifacts import STAGING, FolderArtifactStore
from services.domain.artifacts import blob_key, digest_of_key
from services.domain.errors import AlreadyExists, Unavailable

DATA = bytes(range(256)) * 4200
KEY = blob_key("dev", hashlib.sha256(DATA).hexdigest())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


async def contents(store: FolderArtifactStore, key: str) -> bytes:
    return b"".join([piece async for piece in store.read(key)])


async def keys(store: FolderArtifactStore, prefix: str) -> list[str]:
    return [info.key async for info in store.list(prefix)]


async def test_a_staged_file_is_taken_without_a_copy(tmp_path: Path) -> None:
    store = FolderArtifactStore(tmp_path)
    staged = store.staging / "upload"
    staged.write_bytes(DATA)
    await store.put_file(KEY, staged)
    assert (tmp_path / KEY).stat().st_ino == staged.stat().st_ino
    staged.unlink()
    assert await contents(store, KEY) == DATA
    store.close()


async def test_nothing_staged_stays_after_a_write(tmp_path: Path, source: Path) -> None:
    store = FolderArtifactStore(tmp_path / "store")
    await store.put_file(KEY, source)
    await store.put_document("a/b", b"x", create_only=False)
    with pytest.raises(AlreadyExists):
        await store.put_document("a/b", b"x", create_only=True)
    assert [path.name for path in store.staging.iterdir()] == ["lock"]
    store.close()
    assert list((tmp_path / "store" / STAGING).iterdir()) == []


async def test_a_disk_that_fails_is_unavailable(tmp_path: Path) -> None:
    store = FolderArtifactStore(tmp_path / "store")
    (tmp_path / "store" / "a").write_text("a file where a folder should be")
    with pytest.raises(Unavailable):
        await store.put_document("a/b", b"x", create_only=False)
    store.close()


async def test_sweeping_leaves_the_staging_of_the_living(tmp_path: Path) -> None:
    one = FolderArtifactStore(tmp_path)
    two = FolderArtifactStore(tmp_path)
    assert two.sweep() == 0
    assert one.staging.is_dir()
    one.close()
    two.close()


WRITER = textwrap.dedent(
    """
    import asyncio, hashlib, itertools, os, sys
    from pathlib import Path
    from services.adapters.folder_artifacts import FolderArtifactStore
    from services.domain.artifacts import blob_key

    async def main() -> None:
        store = FolderArtifactStore(Path(sys.argv[1]))
        print("writing", flush=True)
        for number in itertools.count():
            data = os.urandom(300_000)
            staged = store.staging / f"upload-{number}"
            staged.write_bytes(data)
            await store.put_file(blob_key("dev", hashlib.sha256(data).hexdigest()), staged)
            text = hashlib.sha256(b"%d" % number).hexdigest() * 100
            await store.put_document("shared/refs/kind/name", text.encode(), create_only=False)

    asyncio.run(main())
    """
)


def write_until_killed(root: Path, seconds: float) -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root)], stdout=subprocess.PIPE, env=environ
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(seconds)
        writer.send_signal(signal.SIGKILL)


async def test_a_writer_killed_at_any_moment_leaves_no_half_object(tmp_path: Path) -> None:
    moments, blobs = random.Random(7), list[str]()
    store = FolderArtifactStore(tmp_path)
    kills = 0
    while kills < 6 or len(blobs) <= 6:  # on a busy machine a writer writes little in its time
        await asyncio.to_thread(write_until_killed, tmp_path, moments.uniform(0.02, 0.15))
        kills, blobs = kills + 1, await keys(store, "projects/")
    store.sweep()
    for key in blobs:
        assert hashlib.sha256(await contents(store, key)).hexdigest() == digest_of_key(key)
    document = await store.get_document("shared/refs/kind/name")
    assert document is not None
    assert document == document[:64] * 100
    assert list((tmp_path / STAGING).iterdir()) == [store.staging]
    store.close()
