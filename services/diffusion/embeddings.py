"""Textual inversion (Gal et al. 2022): learned vectors that stand for a word, read from the files people exchange.

    diffusers        one tensor, named as its word: [w] or [v, w]
    the Web UI       the tensor `emb_params` [v, w] (safetensors), or a pickle with `name` and `string_to_param`

Pickles are opened by the loader that builds tensors and plain containers, and nothing else. Shapes: v vectors, w width
of the text encoder.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from services.domain.errors import BadInput

MAX_FILE_BYTES: Final = 64 << 20
MAX_VECTORS: Final = 75
"""More than the positions of one prompt in the common text encoders."""
MAX_TOKEN_CHARS: Final = 128

_NAMELESS: Final = "emb_params"
_FAULTS: Final = (OSError, ValueError, RuntimeError, EOFError, KeyError, UnpicklingError, SafetensorError)


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """A word that prompts can use, and what it means.

    Attributes:
        token: the word as prompts write it; upper and lower case are the same.
        vectors: float32 [v, w], in the place of token embeddings.
        negative: it belongs into the negative prompt.
    """

    token: str
    vectors: Tensor
    negative: bool = False


def read_embedding(path: Path, token: str = "", *, otherwise: str = "", negative: bool = False) -> Embedding:
    """Read a file of any layout above.

    Args:
        path: `.safetensors` or a pickle, from anywhere.
        token: the word; empty: the file's own.
        otherwise: the word where the file names none either.
        negative: it belongs into the negative prompt.

    Raises:
        BadInput: what is wrong with it, in one sentence.
    """
    named, vectors = _entry(_contents(path))
    word = token or named or otherwise
    if not word.strip() or len(word) > MAX_TOKEN_CHARS:
        raise _unusable(f"its word must have 1 to {MAX_TOKEN_CHARS} characters")
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point() or vectors.ndim not in (1, 2):
        raise _unusable("it holds no vectors")
    vectors = vectors.detach().float().reshape(-1, vectors.shape[-1]).clone()
    if not 1 <= vectors.shape[0] <= MAX_VECTORS:
        raise _unusable(f"it has {vectors.shape[0]} vectors; 1 to {MAX_VECTORS} are used")
    if not bool(torch.isfinite(vectors).all()):
        raise _unusable("it holds values that are not finite")
    return Embedding(word.strip(), vectors, negative)


def named_in(prompt: str, embedding: Embedding) -> bool:
    """The prompt uses the embedding's word."""
    return _pattern([embedding]).search(prompt) is not None


def with_words(prompt: str, negative_prompt: str, embeddings: Sequence[Embedding]) -> tuple[str, str]:
    """Both prompts, with the words after them that neither uses: each in the one that its embedding belongs into."""
    absent = [one for one in embeddings if not named_in(prompt, one) and not named_in(negative_prompt, one)]
    wanted = [one.token for one in absent if not one.negative]
    unwanted = [one.token for one in absent if one.negative]
    return ", ".join(filter(None, [prompt, *wanted])), ", ".join(filter(None, [negative_prompt, *unwanted]))


def split_at_words(prompt: str, embeddings: Sequence[Embedding]) -> list[str | Embedding]:
    """The prompt's text and embeddings in their order; inside a longer word an embedding's word is plain text."""
    if not embeddings:
        return [prompt]
    known = {one.token.lower(): one for one in embeddings}
    pieces: list[str | Embedding] = []
    start = 0
    for found in _pattern(embeddings).finditer(prompt):
        pieces += [prompt[start : found.start()], known[found[0].lower()]]
        start = found.end()
    return [*pieces, prompt[start:]]


def _pattern(embeddings: Sequence[Embedding]) -> re.Pattern[str]:
    # The longest first, so that no word is taken for the beginning of another.
    words = sorted((one.token for one in embeddings), key=len, reverse=True)
    return re.compile("|".join(map(_bounded, words)), re.IGNORECASE)


def _bounded(word: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", word) else ""
    return f"{before}{re.escape(word)}{after}"


def _contents(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _unusable(f"it is larger than the {MAX_FILE_BYTES} bytes allowed")
        with path.open("rb") as file:
            is_safe = file.read(9)[8:] == b"{"
        found = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except _FAULTS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise _unusable(f"it cannot be read: {reason}") from error
    if not isinstance(found, Mapping):
        raise _unusable("it is no table of tensors")
    return found


def _entry(found: Mapping[str, Any]) -> tuple[str, Any]:
    """The word, "" where there is none, and what stands for it."""
    parameters = found.get("string_to_param")
    if isinstance(parameters, Mapping) and parameters:
        return str(found.get("name") or ""), next(iter(parameters.values()))
    if _NAMELESS in found:
        return "", found[_NAMELESS]
    if len(found) != 1:
        raise _unusable(f"it holds {len(found)} entries instead of one word's vectors")
    word, vectors = next(iter(found.items()))
    return str(word), vectors


def _unusable(reason: str) -> BadInput:
    return BadInput(f"the embedding cannot be used: {reason}")
