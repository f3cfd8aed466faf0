"""What only the bucket has to prove: whole objects over a wire that loses, cuts and alters; nobody's parts removed."""

import asyncio
import hashlib
import json
import logging
import random
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.adapters.s3_artifacts import S3ArtifactStore, S3Options
from services.adapters.s3_multipart import PartedUploads
from services.adapters.s3_requests import S3Requests
from services.domain.artifacts import blob_key, ref_key
from services.domain.errors import AlreadyExists, AlteredBytes, InvalidSpec, LikenessError, Unavailable
from tests.integration.s3_proxy import Fault, S3Proxy
from tests.integration.s3_server import BUCKET, READER_KEY, SECRET_KEY, S3Server

PART_BYTES = 5 << 20
SMALL = random.Random(1).randbytes(300_000)
LARGE = b"a text that would be found on the disk " * 160_000  # 6.2 MB: two parts
DOCUMENT = ref_key("dev", "kind", "name")
END_OF_TIME_MS = 1 << 53


def key_of(data: bytes) -> str:
    return blob_key("dev", hashlib.sha256(data).hexdigest())


@pytest.fixture
async def proxy(bucket_server: S3Server) -> AsyncIterator[S3Proxy]:
    async with S3Proxy(bucket_server.port) as made:
        yield made


@pytest.fixture
def requests(bucket_server: S3Server, proxy: S3Proxy) -> S3Requests:
    return S3Requests(bucket_server.bucket(BUCKET, proxy.endpoint), first_pause_s=0.001)


@pytest.fixture
async def store(requests: S3Requests, proxy: S3Proxy, tmp_path: Path) -> AsyncIterator[S3ArtifactStore]:
    """A store that reaches its server through the wire."""
    made = S3ArtifactStore(requests, tmp_path / "staging", S3Options(part_bytes=PART_BYTES, orphan_s=0.0))
    yield made
    await made.close()


async def stored(store: S3ArtifactStore, data: bytes, folder: Path) -> str:
    path = folder / "source"
    await asyncio.to_thread(path.write_bytes, data)
    await store.put_file(key_of(data), path)
    return key_of(data)


async def contents(store: S3ArtifactStore, key: str, offset: int = 0) -> bytes:
    return b"".join([piece async for piece in store.read(key, offset)])


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        pytest.param(data, fault, id=f"{parts} {fault}")
        for parts, data, faults in (
            ("of the only part", SMALL, (Fault.BUSY, Fault.LOSE_ANSWER, Fault.FLIP_REQUEST)),
            ("of two parts", LARGE, (Fault.LOSE_REQUEST, Fault.LOSE_ANSWER, Fault.FLIP_REQUEST)),
        )
        for fault in faults
    ],
)
async def test_an_upload_survives_when_a_request(
    store: S3ArtifactStore, proxy: S3Proxy, tmp_path: Path, data: bytes, fault: Fault
) -> None:
    proxy.faults.extend([fault, Fault.NONE, fault])
    key = await stored(store, data, tmp_path)
    assert len(proxy.faults) <= 1
    assert await contents(store, key) == data


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.LOSE_ANSWER])
async def test_an_upload_is_completed_once_when_the_last_request(
    store: S3ArtifactStore, proxy: S3Proxy, tmp_path: Path, fault: Fault
) -> None:
    proxy.method = "POST"
    proxy.faults.extend([Fault.NONE, fault])  # the first begins the upload
    key = await stored(store, LARGE, tmp_path)
    assert not proxy.faults
    assert await contents(store, key, len(LARGE) - 10) == LARGE[-10:]


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.LOSE_REQUEST, Fault.CUT_ANSWER])
async def test_a_download_goes_on_when_a_request(
    store: S3ArtifactStore, proxy: S3Proxy, tmp_path: Path, fault: Fault
) -> None:
    data = LARGE[: PART_BYTES // 2]
    key = await stored(store, data, tmp_path)
    proxy.method = "GET"
    proxy.faults.extend([fault, fault])
    assert await contents(store, key) == data
    assert not proxy.faults


async def test_an_altered_blob_is_noticed(store: S3ArtifactStore, proxy: S3Proxy, tmp_path: Path) -> None:
    key = await stored(store, SMALL, tmp_path)
    proxy.method, proxy.always = "GET", Fault.FLIP_ANSWER
    with pytest.raises(AlteredBytes):
        await contents(store, key)


async def test_an_altered_document_is_read_again(store: S3ArtifactStore, proxy: S3Proxy) -> None:
    await store.put_document(DOCUMENT, b"one", create_only=True)
    proxy.method = "GET"
    proxy.faults.append(Fault.FLIP_ANSWER)
    assert await store.get_document(DOCUMENT) == b"one"
    proxy.always = Fault.FLIP_ANSWER
    with pytest.raises(AlteredBytes):
        await store.get_document(DOCUMENT)


@pytest.mark.parametrize("fault", [Fault.LOSE_ANSWER, Fault.LOSE_REQUEST, Fault.BUSY])
async def test_the_creator_of_a_document_knows_its_own_when_a_request(
    store: S3ArtifactStore, proxy: S3Proxy, fault: Fault
) -> None:
    proxy.faults.append(fault)
    await store.put_document(DOCUMENT, b"one", create_only=True)
    proxy.faults.append(fault)
    with pytest.raises(AlreadyExists):
        await store.put_document(DOCUMENT, b"two", create_only=True)
    assert await store.get_document(DOCUMENT) == b"one"


async def test_a_store_that_stays_busy_is_unavailable(
    store: S3ArtifactStore, requests: S3Requests, proxy: S3Proxy, tmp_path: Path
) -> None:
    uploads = PartedUploads(requests, PART_BYTES, {})
    await uploads.sweep(END_OF_TIME_MS)  # what other tests left
    proxy.always = Fault.BUSY
    with pytest.raises(Unavailable, match="503 SlowDown"):
        await stored(store, LARGE, tmp_path)
    assert await store.stat(key_of(LARGE)) is None
    assert await uploads.sweep(END_OF_TIME_MS) == 0, "the parts went with the failure"


async def test_unfinished_uploads_are_invisible_and_swept(
    store: S3ArtifactStore, requests: S3Requests, proxy: S3Proxy
) -> None:
    await PartedUploads(requests, PART_BYTES, {}).sweep(END_OF_TIME_MS)  # what other tests left
    begun = await store.begin_upload(key_of(LARGE), len(LARGE))
    await asyncio.to_thread(put, begun.part_urls[0], LARGE[:PART_BYTES])
    assert await store.stat(key_of(LARGE)) is None
    assert [info async for info in store.list("")] == []
    with pytest.raises(Unavailable, match="missing"):
        await store.finish_upload(key_of(LARGE), begun.upload_id, len(LARGE))
    assert await PartedUploads(requests, PART_BYTES, {}).sweep(before_ms=0) == 0  # none is that old
    await asyncio.sleep(1.1)  # the server tells the time in seconds
    assert await store.sweep() == 1
    assert await store.sweep() == 0
    with pytest.raises(Unavailable, match="anew"):
        await store.finish_upload(key_of(LARGE), begun.upload_id, len(LARGE))


async def test_parts_that_others_sent_become_an_object_once(store: S3ArtifactStore) -> None:
    key = key_of(LARGE)
    begun = await store.begin_upload(key, len(LARGE))
    for number, url in enumerate(begun.part_urls):
        part = LARGE[number * begun.part_bytes : (number + 1) * begun.part_bytes]
        await asyncio.to_thread(put, url, part)
    for _ in range(2):
        await store.finish_upload(key, begun.upload_id, len(LARGE))
    assert await asyncio.to_thread(get, store.download_url(key)) == LARGE
    with pytest.raises(urllib.error.HTTPError, match="403"):
        await asyncio.to_thread(get, store.download_url(key).replace(key[-9:], "123456789"))


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["one part", "two parts"])
async def test_objects_are_kept_encrypted_when_told(
    bucket_server: S3Server, tmp_path: Path, data: bytes
) -> None:
    options = S3Options(part_bytes=PART_BYTES, encryption="AES256")
    store = S3ArtifactStore(S3Requests(bucket_server.bucket(BUCKET)), tmp_path / "staging", options)
    data = b"nobody may read this " + data  # other tests have left the rest on the disk
    key = await stored(store, data, tmp_path)
    said = bucket_server.client().stat_object(bucket_name=BUCKET, object_name=key)
    assert said.metadata is not None
    assert said.metadata["x-amz-server-side-encryption"] == "AES256"
    assert await contents(store, key) == data
    assert not any(data[:32] in path.read_bytes() for path in (bucket_server.folder / "data").rglob("*.dat"))
    await store.close()


async def test_a_good_bucket_is_left_as_it_was(store: S3ArtifactStore) -> None:
    await store.check()
    assert [info async for info in store.list("")] == []


async def test_a_store_without_conditional_writes_is_refused(store: S3ArtifactStore, proxy: S3Proxy) -> None:
    proxy.faults.extend([Fault.NONE, Fault.PRETEND])
    with pytest.raises(InvalidSpec, match="ignores conditional writes"):
        await store.check()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "nowhere"}, "there is no bucket nowhere at http"),
        ({"access_key": "somebody"}, "does not know the access key; mend LIKENESS_S3_ACCESS_KEY"),
        ({"secret_key": "wrong"}, "the secret key is not the access key's; mend LIKENESS_S3_SECRET_KEY"),
        ({"access_key": READER_KEY}, "may not read, write, list and delete in likeness"),
        ({"endpoint": "http://127.0.0.1:1"}, "http://127.0.0.1:1: the artifact store does not answer"),
    ],
)
async def test_what_cannot_be_used_is_said_clearly(
    bucket_server: S3Server, tmp_path: Path, changes: dict[str, str], sentence: str
) -> None:
    requests = S3Requests(replace(bucket_server.bucket(BUCKET), **changes), first_pause_s=0.001)
    store = S3ArtifactStore(requests, tmp_path / "staging")
    with pytest.raises(LikenessError, match="LIKENESS_ARTIFACTS") as refusal:
        await store.check()
    await store.close()
    assert sentence in str(refusal.value)
    assert SECRET_KEY not in str(refusal.value)


async def test_a_server_that_is_no_store_is_told_from_one(store: S3ArtifactStore, proxy: S3Proxy) -> None:
    proxy.always = Fault.FOREIGN
    with pytest.raises(InvalidSpec, match="is not an S3 store"):
        await store.check()


async def test_no_log_has_a_key(
    store: S3ArtifactStore, proxy: S3Proxy, requests: S3Requests, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    proxy.faults.extend([Fault.BUSY, Fault.LOSE_ANSWER])
    await store.put_document(DOCUMENT, b"one", create_only=False)
    assert "artifact store asked again" in caplog.text
    said = json.dumps([{**vars(record), "args": str(record.args)} for record in caplog.records], default=str)
    assert SECRET_KEY not in said + repr(requests.bucket)
    assert "Signature" not in said


def put(url: str, data: bytes) -> None:
    request = urllib.request.Request(url, data, method="PUT", headers={"Content-Type": ""})
    with _opener().open(request, timeout=30) as answer:
        assert answer.status == 200


def get(url: str) -> bytes:
    with _opener().open(url, timeout=30) as answer:
        return bytes(answer.read())


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))
