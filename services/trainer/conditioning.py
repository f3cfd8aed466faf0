"""What the UNet is conditioned on and what it denoises: prompts to vectors, pictures to posterior moments.

Both are computed once where that cannot change a result (frozen text encoder; see `data.LatentSource` for latents).
Shapes: b prompts, n token positions, w text width.
"""

import logging
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from services.diffusion.prompts import Padding, Tokens, check_clip_skip, encode, tokenize
from services.trainer.data import Encoder

logger = logging.getLogger(__name__)

TEXT_CACHE_BYTES = 512 * 2**20


class TextConditioner:
    """Prompts to text vectors, by a text encoder that trains or by one that is frozen.

    A frozen encoder sees each prompt alone at full length; its vectors are kept by prompt and cut to the batch's
    length, which a causal text model allows. An encoder that trains runs on every batch.

    Args:
        tokenizer: the model's own.
        text_encoder: with its adapter, if it has one.
        max_length: token positions of the encoder.
        pad_tokens: pad every prompt to `max_length` instead of to the longest of the batch.
        trained: the encoder's weights change; until :meth:`freeze`.
        clip_skip: layer the vectors are taken from, counted from the end; 0 and 1 the last.
        cache_bytes: vectors of a frozen encoder that are kept.

    Raises:
        InvalidSpec: the encoder has no such layer.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        *,
        max_length: int,
        pad_tokens: bool,
        trained: bool,
        clip_skip: int = 0,
        cache_bytes: int = TEXT_CACHE_BYTES,
    ) -> None:
        self._clip_skip = max(1, clip_skip)
        check_clip_skip(text_encoder, self._clip_skip)
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._max_length = max_length
        self._padding = Padding.MAX_LENGTH if pad_tokens else Padding.LONGEST
        self._trained = trained
        self._cache_bytes = cache_bytes
        self._vectors: dict[str, torch.Tensor] = {}
        self._tokens: dict[tuple[str, ...], Tokens] = {}

    def freeze(self) -> None:
        """Tells that the encoder's weights change no more."""
        self._trained = False

    def truncated(self, prompts: Sequence[str]) -> dict[str, str]:
        """Returns what each prompt loses because it does not fit; prompts that fit are left out."""
        tokens = tokenize(self._tokenizer, prompts, self._max_length)
        return {prompt: lost for prompt, lost in zip(prompts, tokens.dropped, strict=True) if lost}

    def vectors(self, prompts: Sequence[str]) -> torch.Tensor:
        """Returns the text vectors of one batch, [b, n, w]; n is the batch's longest prompt, or the model's limit."""
        tokens = self._batch_tokens(tuple(prompts))
        if self._trained:
            return encode(self._text_encoder, tokens, self._clip_skip)
        length = tokens.input_ids.shape[1]
        return torch.cat([self._frozen(prompt)[:, :length] for prompt in prompts])

    def _batch_tokens(self, prompts: tuple[str, ...]) -> Tokens:
        held = self._tokens.get(prompts)
        if held is None:
            held = tokenize(self._tokenizer, prompts, self._max_length, self._padding)
            if len(self._tokens) < 1024:
                self._tokens[prompts] = held
        return held

    @torch.no_grad()
    def _frozen(self, prompt: str) -> torch.Tensor:
        held = self._vectors.get(prompt)
        if held is None:
            tokens = tokenize(self._tokenizer, [prompt], self._max_length)
            held = encode(self._text_encoder, tokens, self._clip_skip)
            self._cache_bytes -= held.nbytes
            if self._cache_bytes >= 0:
                self._vectors[prompt] = held
        return held


def posterior_encoder(vae: AutoencoderKL, device: torch.device, dtype: torch.dtype) -> Encoder:
    """Returns a function from one picture to mean and standard deviation of the VAE's posterior.

    Args:
        vae: in float32, on `device`.
        device: where it runs.
        dtype: precision of its computation. What is not finite below float32 is computed again in float32.
    """

    @torch.no_grad()
    def moments(values: torch.Tensor, precision: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(device.type, dtype=precision, enabled=precision is not torch.float32):
            posterior = vae.encode(values[None].to(device)).latent_dist
        return posterior.mean[0].float().cpu(), posterior.std[0].float().cpu()

    def encode_picture(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, deviation = moments(values, dtype)
        if dtype is torch.float32 or (torch.isfinite(mean).all() and torch.isfinite(deviation).all()):
            return mean, deviation
        logger.warning("latents not finite, computed again in float32", extra={"dtype": str(dtype)})
        return moments(values, torch.float32)

    return encode_picture
