"""What may be added to a model for one request: which registered models are LoRAs or embeddings, and for whom."""

from likeness.storage.v1.model_pb2 import (
    MODEL_FORMAT_EMBEDDING,
    MODEL_FORMAT_LORA,
    ModelComponent,
    ModelManifest,
)

from services.domain.artifacts import newest_adapter
from services.domain.errors import NotFound


def lora_fault(lora: ModelManifest, model: ModelManifest) -> str:
    """Why a registered model cannot be worn as a LoRA by pictures of another; "": it can.

    Args:
        lora: what was named as a LoRA.
        model: what is drawn with. Where the family of one of the two is unknown, the matrices' shapes decide later.
    """
    is_lora = lora.format == MODEL_FORMAT_LORA and newest_adapter([file.path for file in lora.components])
    return _family_fault("a LoRA", lora, model) if is_lora else "is not a LoRA"


def embedding_fault(embedding: ModelManifest, model: ModelManifest) -> str:
    """Why a registered model is no embedding for pictures of another; "": it is one. As :func:`lora_fault`."""
    is_embedding = embedding.format == MODEL_FORMAT_EMBEDDING and len(embedding.components) == 1
    return _family_fault("an embedding", embedding, model) if is_embedding else "is not an embedding"


def _family_fault(kind: str, add_on: ModelManifest, model: ModelManifest) -> str:
    if not add_on.family or not model.family or add_on.family == model.family:
        return ""
    return f"is {kind} for models of the family {add_on.family}, not {model.family}"


def adapter_of(lora: ModelManifest) -> ModelComponent:
    """The file of a LoRA: what its own training changed, without the LoRAs that it may have begun with.

    Raises:
        NotFound: the model has no such file.
    """
    path = newest_adapter([file.path for file in lora.components])
    for file in lora.components:
        if file.path == path:
            return file
    raise NotFound("the model has no LoRA's file")
