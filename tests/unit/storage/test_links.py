import base64
import re

import pytest

from services.adapters.memory_artifacts import InMemoryArtifactStore
from services.domain.artifacts import blob_key
from services.domain.errors import InvalidSpec, NotFound
from services.storage.documents import Documents
from services.storage.links import MAX_TTL_S, FileLinks, signing_key

KEY = blob_key("dev", "ab" * 32)
START_MS = 1_700_000_000_000


class Present:
    def __init__(self) -> None:
        self.ms = START_MS

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def now() -> Present:
    return Present()


@pytest.fixture
def links(now: Present) -> FileLinks:
    return FileLinks(b"k" * 32, now)


def token_of(path: str) -> str:
    return path.split("/")[2]


def test_a_link_leads_to_its_artifact(links: FileLinks) -> None:
    link = links.create(KEY, "0-0.png")
    assert re.fullmatch(r"/files/[A-Za-z0-9_-]+/0-0\.png", link.path)
    assert links.check(token_of(link.path), "0-0.png") == KEY


def test_a_link_to_a_shared_artifact_works(links: FileLinks) -> None:
    key = blob_key("", "cd" * 32)
    assert links.check(token_of(links.create(key, "m.zip").path), "m.zip") == key


def test_a_link_lives_seven_days_unless_told_otherwise(links: FileLinks, now: Present) -> None:
    link = links.create(KEY, "a.png")
    assert link.expire_time.ToMilliseconds() == START_MS + 7 * 24 * 3600 * 1000
    now.ms = link.expire_time.ToMilliseconds() - 1
    assert links.check(token_of(link.path), "a.png") == KEY
    now.ms += 1
    with pytest.raises(NotFound):
        links.check(token_of(link.path), "a.png")


def test_a_short_link_expires_sooner(links: FileLinks, now: Present) -> None:
    token = token_of(links.create(KEY, "a.png", 1.5).path)
    now.ms += 1499
    assert links.check(token, "a.png") == KEY
    now.ms += 1
    with pytest.raises(NotFound):
        links.check(token, "a.png")


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, MAX_TTL_S + 1])
def test_a_life_out_of_range_is_refused(links: FileLinks, ttl_s: float) -> None:
    with pytest.raises(InvalidSpec, match="ttl"):
        links.create(KEY, "a.png", ttl_s)


@pytest.mark.parametrize("name", ["", "a/b.png", "../a", ".a", "a b", "a?b=c", "ä.png", "x" * 129])
def test_a_file_name_that_would_not_stay_one_is_refused(links: FileLinks, name: str) -> None:
    with pytest.raises(InvalidSpec, match="file_name"):
        links.create(KEY, name)


def test_the_file_name_belongs_to_the_link(links: FileLinks) -> None:
    token = token_of(links.create(KEY, "a.png").path)
    with pytest.raises(NotFound):
        links.check(token, "a.html")


def test_no_bit_of_a_token_can_be_changed(links: FileLinks) -> None:
    token = token_of(links.create(KEY, "a.png").path)
    raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    for bit in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        altered = base64.urlsafe_b64encode(bytes(changed)).rstrip(b"=").decode()
        with pytest.raises(NotFound):
            links.check(altered, "a.png")


@pytest.mark.parametrize("token", ["", "a", "ä", "....", "A" * 400, "A" * 100_000, "a b", "a\n"])
def test_nonsense_is_not_found(links: FileLinks, token: str) -> None:
    with pytest.raises(NotFound):
        links.check(token, "a.png")


def test_a_token_has_one_spelling(links: FileLinks) -> None:
    token = token_of(links.create(KEY, "a.png").path)
    for altered in (token + "=", token + "\n", token[:-1] + chr(ord(token[-1]) ^ 1)):
        with pytest.raises(NotFound):
            links.check(altered, "a.png")


def test_another_key_signs_other_tokens(links: FileLinks, now: Present) -> None:
    token = token_of(FileLinks(b"o" * 32, now).create(KEY, "a.png").path)
    with pytest.raises(NotFound):
        links.check(token, "a.png")


async def test_the_signing_key_is_made_once() -> None:
    documents = Documents(InMemoryArtifactStore())
    first = await signing_key(documents)
    assert len(first) == 32
    assert await signing_key(documents) == first
    assert await signing_key(Documents(InMemoryArtifactStore())) != first
