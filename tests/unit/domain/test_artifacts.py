import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.domain import artifacts
from services.domain.errors import InvalidSpec

DIGEST = "0123456789abcdef" * 4
projects = st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True)
digests = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)


@given(projects | st.just(""), digests)
def test_a_blobs_key_tells_its_project_and_its_digest(project: str, digest: str) -> None:
    key = artifacts.blob_key(project, digest)

    assert artifacts.is_blob_key(key)
    assert artifacts.project_of_key(key) == project
    assert artifacts.digest_of_key(key) == digest


@given(st.text(max_size=60))
def test_no_other_text_is_a_project(text: str) -> None:
    if not text or (len(text) <= 40 and all(c in "abcdefghijklmnopqrstuvwxyz0123456789-" for c in text)):
        assert artifacts.scope(text) == (f"projects/{text}" if text else "shared")
        return
    with pytest.raises(InvalidSpec):
        artifacts.scope(text)


@pytest.mark.parametrize(
    "digest", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, f"{'a' * 64}\n", "../" + "a" * 61]
)
def test_a_digest_that_is_none_makes_no_key(digest: str) -> None:
    with pytest.raises(InvalidSpec):
        artifacts.blob_key("project", digest)


@pytest.mark.parametrize(
    "key",
    [
        "",
        f"projects/other/../mine/blobs/sha256/{DIGEST}",
        f"projects/p/blobs/sha256/{DIGEST}/x",
        f"projects/p/blobs/sha256/{DIGEST}\n",
        f"/projects/p/blobs/sha256/{DIGEST}",
        f"projects//blobs/sha256/{DIGEST}",
        f"shared/blobs/md5/{DIGEST}",
    ],
)
def test_what_only_resembles_a_blobs_key_is_none(key: str) -> None:
    assert not artifacts.is_blob_key(key)
    with pytest.raises(InvalidSpec):
        artifacts.project_of_key(key)
    with pytest.raises(InvalidSpec):
        artifacts.digest_of_key(key)


def test_a_references_key_lies_under_its_kinds_prefix() -> None:
    key = artifacts.ref_key("p", "model", "cat-1.0")

    assert key == "projects/p/refs/model/cat-1.0"
    assert key.startswith(artifacts.ref_prefix("p", "model"))
    assert artifacts.ref_key("", "model", "base").startswith("shared/refs/")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Model", "x"),
        ("", "x"),
        ("a/b", "x"),
        ("model", ""),
        ("model", ".."),
        ("model", ".x"),
        ("model", "a/b"),
    ],
)
def test_a_reference_that_would_leave_its_folder_is_refused(kind: str, name: str) -> None:
    with pytest.raises(InvalidSpec):
        artifacts.ref_key("p", kind, name)


def test_media_types_go_by_the_ending_in_any_case() -> None:
    assert artifacts.media_type_of("a.PNG") == "image/png"
    assert artifacts.media_type_of("unet/model.safetensors") == "application/octet-stream"
    assert artifacts.media_type_of("no-ending") == "application/octet-stream"
