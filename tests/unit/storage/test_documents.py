import pytest
from likeness.storage.v1.artifact_pb2 import Ref

from services.adapters.memory_artifacts import InMemoryArtifactStore
from services.domain.errors import AlreadyExists, InvalidSpec, NotFound, PermissionDenied
from services.storage.documents import OWN_KINDS, Documents, References


@pytest.fixture
def store() -> InMemoryArtifactStore:
    return InMemoryArtifactStore(now_ms=lambda: 1_700_000_000_123)


def ref(document: str = '{"a":1}', kind: str = "class_images", name: str = "abc") -> Ref:
    return Ref(project_id="dev", kind=kind, name=name, document_json=document)


async def test_a_reference_is_read_back_with_its_time(store: InMemoryArtifactStore) -> None:
    references = References(store)
    put = await references.put(ref(), replace=False)
    assert await references.get("dev", "class_images", "abc") == put
    assert put.document_json == '{"a":1}'
    assert put.update_time.ToMilliseconds() == 1_700_000_000_123


async def test_another_document_under_a_name_is_refused(store: InMemoryArtifactStore) -> None:
    references = References(store)
    await references.put(ref(), replace=False)
    await references.put(ref(), replace=False)
    with pytest.raises(AlreadyExists):
        await references.put(ref("[]"), replace=False)
    assert (await references.put(ref("[]"), replace=True)).document_json == "[]"


async def test_projects_do_not_share_names(store: InMemoryArtifactStore) -> None:
    references = References(store)
    await references.put(ref(), replace=False)
    with pytest.raises(NotFound):
        await references.get("other", "class_images", "abc")
    with pytest.raises(NotFound):
        await references.get("", "class_images", "abc")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kind": "Class"}, "ref.kind"),
        ({"name": "../x"}, "ref.name"),
        ({"document": "{"}, "ref.document_json"),
        ({"document": '"' + "x" * 70_000 + '"'}, "ref.document_json"),
    ],
    ids=["kind", "name", "no-json", "too-large"],
)
async def test_a_malformed_reference_is_refused(
    store: InMemoryArtifactStore, changes: dict[str, str], field: str
) -> None:
    with pytest.raises(InvalidSpec) as refusal:
        await References(store).put(ref(**changes), replace=False)
    assert refusal.value.violations[0].field == field


@pytest.mark.parametrize("kind", sorted(OWN_KINDS))
async def test_storages_own_books_are_closed(store: InMemoryArtifactStore, kind: str) -> None:
    references = References(store)
    with pytest.raises(PermissionDenied):
        await references.put(ref(kind=kind), replace=True)
    await Documents(store).put("dev", kind, "abc", {"secret": 1})
    with pytest.raises(PermissionDenied):
        await references.get("dev", kind, "abc")


async def test_a_document_put_if_absent_stays(store: InMemoryArtifactStore) -> None:
    documents = Documents(store)
    assert await documents.put_if_absent("", "kind", "a", {"n": 1}) == {"n": 1}
    assert await documents.put_if_absent("", "kind", "a", {"n": 2}) == {"n": 1}
    assert [name async for name in documents.names("", "kind")] == ["a"]
    await documents.delete("", "kind", "a")
    assert await documents.get("", "kind", "a") is None
