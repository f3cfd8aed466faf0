from typing import Any

import pytest
import torch

from services.diffusion.loading import Components
from services.diffusion.prompts import Padding, encode, tokenize
from services.domain.errors import InvalidSpec

PROMPTS = ["a photo of a dog", "two small triangles on the left"]


@torch.no_grad()
def encoded(components: Components, prompts: list[str], clip_skip: int = 1) -> torch.Tensor:
    tokens = tokenize(components.tokenizer, prompts, components.model_max_length)
    return encode(components.text_encoder, tokens, clip_skip)


def test_vectors_equal_those_of_the_plain_pipeline(components: Components, pipeline: Any) -> None:
    expected = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    assert torch.equal(encoded(components, PROMPTS), expected)


@pytest.mark.parametrize("clip_skip", [2, 3, 5])
def test_clip_skip_counts_layers_from_the_end(components: Components, clip_skip: int) -> None:
    tokens = tokenize(components.tokenizer, PROMPTS, components.model_max_length)
    encoder = components.text_encoder
    with torch.no_grad():
        outputs = []
        hooks = [
            layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
            for layer in encoder.encoder.layers
        ]
        encoder(tokens.input_ids)
        expected = encoder.final_layer_norm(outputs[-clip_skip])
    for hook in hooks:
        hook.remove()
    assert torch.equal(encoded(components, PROMPTS, clip_skip), expected)


@pytest.mark.parametrize("clip_skip", [0, 6, -1])
def test_clip_skip_beyond_the_layers_is_refused_with_the_limit(
    components: Components, clip_skip: int
) -> None:
    with pytest.raises(InvalidSpec, match="clip_skip: must be between 1 and 5"):
        encoded(components, PROMPTS, clip_skip)


def test_prompt_that_is_too_long_is_cut_and_reported(components: Components) -> None:
    tokens = tokenize(components.tokenizer, ["robot " * 75 + "zebra cat", "dog"], 77)
    assert tokens.input_ids.shape == (2, 77)
    assert tokens.input_ids[0, -1] == components.tokenizer.eos_token_id
    assert tokens.dropped == ("zebra cat", "")


def test_prompt_that_just_fits_is_not_reported(components: Components) -> None:
    assert tokenize(components.tokenizer, ["robot " * 75], 77).dropped == ("",)


def test_padding_to_the_longest_stops_there(components: Components) -> None:
    tokens = tokenize(components.tokenizer, ["dog", "a red dog"], 77, Padding.LONGEST)
    assert tokens.input_ids.shape == (2, 5)
    assert tokens.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_gradients_reach_the_text_encoder(components: Components) -> None:
    tokens = tokenize(components.tokenizer, ["dog"], 77)
    weight = components.text_encoder.embeddings.token_embedding.weight
    (gradient,) = torch.autograd.grad(encode(components.text_encoder, tokens, 2).sum(), [weight])
    assert bool(gradient.abs().sum() > 0)
