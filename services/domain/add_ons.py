"""What may be added to a model for one request: which registered models are LoRAs, and which models they suit."""

from likeness.storage.v1.model_pb2 import MODEL_FORMAT_LORA, ModelComponent, ModelManifest

from services.domain.artifacts import newest_adapter
from services.domain.errors import NotFound


def lora_fault(lora: ModelManifest, model: ModelManifest) -> str:
    """Why a registered model cannot be worn as a LoRA by pictures of another; "": it can.

    Args:
        lora: what was named as a LoRA.
        model: what is drawn with. Where the family of one of the two is unknown, the matrices' shapes decide later.
    """
    if lora.format != MODEL_FORMAT_LORA or not newest_adapter([file.path for file in lora.components]):
        return "is not a LoRA"
    if lora.family and model.family and lora.family != model.family:
        return f"is a LoRA for models of the family {lora.family}, not {model.family}"
    return ""


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
