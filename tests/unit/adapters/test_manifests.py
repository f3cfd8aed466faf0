import pytest
from likeness.storage.v1.model_pb2 import MODEL_FORMAT_LORA, Lineage, ModelComponent, ModelManifest

from services.adapters.manifests import digest_of, from_json, to_json
from services.domain.errors import BadInput


def manifest() -> ModelManifest:
    return ModelManifest(
        format=MODEL_FORMAT_LORA,
        components=[ModelComponent(path="a", size_bytes=2**53 + 1)],
        lineage=Lineage(seed=2**64 - 1, library_versions={"b": "1", "a": "2"}),
        note="größer",
    )


def test_a_message_is_read_back_exactly() -> None:
    assert from_json(to_json(manifest()), ModelManifest) == manifest()


def test_equal_messages_have_equal_bytes() -> None:
    other = manifest()
    other.lineage.library_versions.clear()
    for name, version in (("a", "2"), ("b", "1")):
        other.lineage.library_versions[name] = version
    assert to_json(other) == to_json(manifest())


def test_the_spelling_is_fixed() -> None:
    data = to_json(ModelManifest(format=MODEL_FORMAT_LORA, family="sd1", native_size_px=512))
    assert data == b'{"family":"sd1","format":"MODEL_FORMAT_LORA","native_size_px":512}'


def test_fields_of_a_newer_version_are_ignored() -> None:
    assert from_json(b'{"family":"sd1","invented_later":1}', ModelManifest) == ModelManifest(family="sd1")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"family":1}', b"\xff"])
def test_other_documents_are_refused(data: bytes) -> None:
    with pytest.raises(BadInput, match="ModelManifest"):
        from_json(data, ModelManifest)


def test_a_digest_is_sha_256_in_hexadecimal() -> None:
    assert digest_of(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
