"""From text to the vectors the UNet attends to: tokens, padding, truncation, CLIP layers left out.

Shapes: b prompts, n token positions, w text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from services.domain.errors import InvalidSpec


class Padding(StrEnum):
    """How prompts of one batch are brought to one length."""

    MAX_LENGTH = "max_length"
    LONGEST = "longest"


@dataclass(frozen=True, slots=True)
class Tokens:
    """One batch of tokenised prompts.

    Attributes:
        input_ids: int64 [b, n], start and end token included.
        attention_mask: int64 [b, n], 1 for the prompt's own tokens, 0 for padding.
        dropped: per prompt the text that did not fit, empty when all of it did.
    """

    input_ids: Tensor
    attention_mask: Tensor
    dropped: tuple[str, ...]


def tokenize(
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    max_length: int,
    padding: Padding = Padding.MAX_LENGTH,
) -> Tokens:
    """Turn prompts into token ids.

    Args:
        tokenizer: the model's own.
        prompts: one or more texts, empty ones allowed.
        max_length: positions the text encoder has, start and end token included.
        padding: to `max_length`, or to the longest prompt of this batch.

    Returns:
        Ids on the CPU; what is longer than `max_length` is cut before the end token and named in `dropped`.
    """
    rows, dropped = [], []
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        kept = ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]
        rows.append(kept)
        dropped.append(tokenizer.decode(ids[max_length - 1 : -1]) if len(ids) > max_length else "")
    length = max_length if padding is Padding.MAX_LENGTH else max(len(row) for row in rows)
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return Tokens(input_ids, mask, tuple(dropped))


def encode(text_encoder: CLIPTextModel, tokens: Tokens, clip_skip: int = 1) -> Tensor:
    """Run the text encoder; gradients flow if they are enabled.

    Args:
        text_encoder: CLIP text model, on any device.
        tokens: from :func:`tokenize`.
        clip_skip: layer the vectors are taken from, counted from the end: 1 is the last, 2 the one before it.

    Returns:
        Hidden states after the final layer norm, [b, n, w], on the encoder's device in its precision.

    Raises:
        InvalidSpec: `clip_skip` is not between 1 and the number of layers.
    """
    check_clip_skip(text_encoder, clip_skip)
    device = next(text_encoder.parameters()).device
    mask = (
        tokens.attention_mask.to(device) if getattr(text_encoder.config, "use_attention_mask", None) else None
    )
    inputs = {"input_ids": tokens.input_ids.to(device), "attention_mask": mask}
    if clip_skip == 1:
        return text_encoder(**inputs).last_hidden_state
    hidden = text_encoder(**inputs, output_hidden_states=True).hidden_states
    return _final_layer_norm(text_encoder)(hidden[-clip_skip])


def check_clip_skip(text_encoder: CLIPTextModel, clip_skip: int) -> None:
    """Refuse a layer that the encoder does not have.

    Raises:
        InvalidSpec: naming the limit.
    """
    layers = text_encoder.config.num_hidden_layers
    if not 1 <= clip_skip <= layers:
        raise InvalidSpec(
            f"must be between 1 and {layers}, the layers of this model's text encoder", "clip_skip"
        )


def _final_layer_norm(text_encoder: CLIPTextModel) -> nn.Module:
    # Versions differ in where the module hangs, and adapters wrap it once more; its own name is stable.
    for name, module in text_encoder.named_modules():
        if name.rpartition(".")[2] == "final_layer_norm":
            return module
    raise InvalidSpec("the text encoder has no final_layer_norm", "clip_skip")
