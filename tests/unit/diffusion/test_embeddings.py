"""Textual inversion against the library's own loader, and what is read from the files people exchange."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from services.diffusion.drawing import Drawing, encode_context
from services.diffusion.embeddings import Embedding, named_in, read_embedding, split_at_words, with_words
from services.diffusion.loading import Components
from services.diffusion.prompts import tokenize
from services.domain.errors import BadInput

WIDTH = 32
VECTORS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
LAYOUTS: dict[str, Callable[[Path], None]] = {
    "diffusers.safetensors": lambda path: save_file({"<rex>": VECTORS}, path),
    "diffusers.bin": lambda path: torch.save({"<rex>": VECTORS}, path),
    "webui.pt": lambda path: torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "<rex>", "step": 9}, path
    ),
    "webui.safetensors": lambda path: save_file({"emb_params": VECTORS}, path),
}
PROMPT = "a photo of <rex> on the beach, <rex>!"


def embedding(token: str, vectors: int = 1, *, negative: bool = False) -> Embedding:
    return Embedding(token, torch.ones(vectors, WIDTH), negative)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_read_with_their_words(name: str, tmp_path: Path) -> None:
    LAYOUTS[name](tmp_path / name)
    found = read_embedding(tmp_path / name, otherwise="its-id")
    assert torch.equal(found.vectors, VECTORS)
    assert found.token == ("its-id" if name == "webui.safetensors" else "<rex>")
    assert read_embedding(tmp_path / name, "other").token == "other"


def test_vectors_in_a_prompt_agree_with_the_librarys_loader(
    components: Components, pipeline: Any, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("diffusers.safetensors", "one.bin")]
    LAYOUTS[files[0].name](files[0])
    torch.save({"style": VECTORS[0] * 2}, files[1])
    for file in files:
        pipeline.load_textual_inversion(str(tmp_path), weight_name=file.name)
    embeddings = [read_embedding(file) for file in files]
    before = components.text_encoder.get_input_embeddings().weight.clone()
    for prompt in (PROMPT, "style of a dog", "robot " * 73 + "<rex> style"):
        with torch.no_grad():
            theirs, negative = pipeline.encode_prompt(prompt, "cpu", 1, True, "blurry style")
            ours = encode_context(components, Drawing(prompt, "blurry style"), embeddings)
        assert float((ours - torch.cat([negative, theirs])).abs().max()) < 1e-5
    assert torch.equal(components.text_encoder.get_input_embeddings().weight, before)
    assert not components.text_encoder.get_input_embeddings()._forward_hooks


def test_prompt_without_the_word_is_encoded_as_ever(components: Components) -> None:
    with torch.no_grad():
        plain, offered = (
            encode_context(components, Drawing("a dog"), words) for words in ([], [embedding("<rex>")])
        )
    assert torch.equal(plain, offered)


def test_word_that_does_not_fit_is_cut_and_reported_as_text_around_it(components: Components) -> None:
    tokens = tokenize(
        components.tokenizer, ["robot " * 74 + "<rex> zebra cat"], 77, embeddings=[embedding("<rex>", 3)]
    )
    assert tokens.input_ids[0, -2:].tolist() == [-1, components.tokenizer.eos_token_id]
    assert tokens.dropped == ("zebra cat",)


def test_words_are_found_whole_in_any_case_and_the_longest_first() -> None:
    short, long = embedding("cat"), embedding("cat-toy")
    pieces = split_at_words("Cat, cat-toy, cats", [short, long])
    assert pieces == ["", short, ", ", long, ", cats"]


def test_words_that_neither_prompt_uses_are_put_after_the_prompt_they_belong_into() -> None:
    words = [embedding("<rex>"), embedding("<ugly>", negative=True), embedding("<dog>"), embedding("<bad>")]
    assert with_words("a <DOG>", "<bad>", words) == ("a <DOG>, <rex>", "<bad>, <ugly>")
    assert with_words("", "", words[:2]) == ("<rex>", "<ugly>")
    assert named_in("my <Rex>", words[0])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": torch.ones(WIDTH), "b": torch.ones(WIDTH)}, "2 entries"),
        ({"a": torch.ones(2, 2, 2)}, "no vectors"),
        ({"a": "text"}, "no vectors"),
        ({"a": torch.ones(80, WIDTH)}, "80 vectors"),
        ({"a": torch.full((WIDTH,), float("nan"))}, "not finite"),
        ({" ": torch.ones(WIDTH)}, "1 to 128 characters"),
        (Path("a program may hide here"), "cannot be read"),
    ],
    ids=["two-words", "cube", "text", "many", "nan", "nameless", "program"],
)
def test_file_that_is_no_embedding_is_refused_with_the_reason(
    content: Any, reason: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "odd.bin")
    with pytest.raises(BadInput, match=f"the embedding cannot be used: .*{reason}"):
        read_embedding(tmp_path / "odd.bin")
