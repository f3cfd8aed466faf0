"""From text to the vectors the UNet attends to: tokens, learned words, padding, truncation, CLIP layers left out.

Shapes: b prompts, n token positions, w text width.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from services.diffusion.embeddings import Embedding, split_at_words
from services.domain.errors import InvalidSpec


class Padding(StrEnum):
    """How prompts of one batch are brought to one length."""

    MAX_LENGTH = "max_length"
    LONGEST = "longest"


@dataclass(frozen=True, slots=True)
class Tokens:
    """One batch of tokenised prompts.

    Attributes:
        input_ids: int64 [b, n], start and end token included; -1 - k stands for the vector k of `learned`.
        attention_mask: int64 [b, n], 1 for the prompt's own tokens, 0 for padding.
        dropped: per prompt the text that did not fit, empty when all of it did.
        learned: float32 [k, w], vectors of embeddings; None: no prompt uses one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    dropped: tuple[str, ...]
    learned: Tensor | None = None


def tokenize(
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    max_length: int,
    padding: Padding = Padding.MAX_LENGTH,
    embeddings: Sequence[Embedding] = (),
) -> Tokens:
    """Turn prompts into token ids.

    Args:
        tokenizer: the model's own.
        prompts: one or more texts, empty ones allowed.
        max_length: positions the text encoder has, start and end token included.
        padding: to `max_length`, or to the longest prompt of this batch.
        embeddings: words that stand for vectors of the text encoder's width, one position a vector.

    Returns:
        Ids on the CPU; what is longer than `max_length` is cut before the end token and named in `dropped`.
    """
    rows, dropped = [], []
    firsts = _first_places(embeddings)
    for prompt in prompts:
        ids = _ids_of(tokenizer, prompt, firsts)
        kept = ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]
        rows.append(kept)
        cut = [number for number in ids[max_length - 1 : -1] if number >= 0]
        dropped.append(tokenizer.decode(cut) if len(ids) > max_length else "")
    length = max_length if padding is Padding.MAX_LENGTH else max(len(row) for row in rows)
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    learned = torch.cat([one.vectors for one in embeddings]) if bool((input_ids < 0).any()) else None
    return Tokens(input_ids, mask, tuple(dropped), learned)


def _first_places(embeddings: Sequence[Embedding]) -> dict[Embedding, int]:
    """Where the vectors of each begin among all of them."""
    lengths = [len(one.vectors) for one in embeddings]
    return {one: sum(lengths[:number]) for number, one in enumerate(embeddings)}


def _ids_of(tokenizer: CLIPTokenizer, prompt: str, firsts: Mapping[Embedding, int]) -> list[int]:
    """Start token, the prompt's tokens, end token."""
    if not firsts:
        known: list[int] = tokenizer(prompt, truncation=False, verbose=False).input_ids
        return known
    ids = [tokenizer.bos_token_id]
    for piece in split_at_words(prompt, list(firsts)):
        if isinstance(piece, Embedding):
            ids += [-1 - firsts[piece] - number for number in range(len(piece.vectors))]
        else:
            ids += tokenizer(piece, truncation=False, verbose=False, add_special_tokens=False).input_ids
    return [*ids, tokenizer.eos_token_id]


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
    with _learned_in_place(text_encoder, tokens):
        return _encoded(text_encoder, tokens, clip_skip)


def _encoded(text_encoder: CLIPTextModel, tokens: Tokens, clip_skip: int) -> Tensor:
    device = next(text_encoder.parameters()).device
    mask = (
        tokens.attention_mask.to(device) if getattr(text_encoder.config, "use_attention_mask", None) else None
    )
    inputs = {"input_ids": tokens.input_ids.clamp(min=0).to(device), "attention_mask": mask}
    if clip_skip == 1:
        return text_encoder(**inputs).last_hidden_state
    hidden = text_encoder(**inputs, output_hidden_states=True).hidden_states
    return _final_layer_norm(text_encoder)(hidden[-clip_skip])


@contextlib.contextmanager
def _learned_in_place(text_encoder: CLIPTextModel, tokens: Tokens) -> Iterator[None]:
    """Within the context the encoder sees learned vectors where the tokens say so; its own table stays as it is."""
    learned = tokens.learned
    if learned is None:
        yield
        return
    table = text_encoder.get_input_embeddings()
    places = tokens.input_ids < 0
    vectors = learned[-1 - tokens.input_ids[places]].to(table.weight)
    places = places.to(table.weight.device)
    handle = table.register_forward_hook(
        lambda _module, _inputs, output: output.index_put((places,), vectors)
    )
    try:
        yield
    finally:
        handle.remove()


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
