"""Small pipelines of the Stable Diffusion architecture with random weights, the same bytes for the same seed.

They stand in wherever the machinery counts and the pictures do not: in every test that needs a fast model. The
tokenizer is a byte-level BPE learned from the few lines below, so nothing is downloaded and every text can be
tokenised.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from services.diffusion import exporting

START = "<|startoftext|>"
END = "<|endoftext|>"
_WORD_END = "</w>"
_CORPUS = """
a photo of a dog a photo of a cat a photo of a person a picture of a robot
a drawing of a house a painting of a tree
a red circle on a blue background a green square on a white background a yellow star on a black background
two small triangles and three big rings on the left and on the right in the snow on the beach
at night on the grass under the sea in the desert
sks zkw toy man woman couple child fish bird boat car backpack vase shoe clock portrait wearing a hat
sitting on the moon with a mountain behind in the style of an old master watercolour high quality
orange purple pink brown grey cyan blurry ugly low quality
"""


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """The shape of a small pipeline; `sample_size` counts latent cells along one side."""

    sample_size: int
    unet_channels: tuple[int, ...]
    unet_cross_attention: tuple[bool, ...]
    unet_layers: int
    unet_norm_groups: int
    unet_heads: int
    vae_channels: tuple[int, ...]
    vae_norm_groups: int
    vae_mid_attention: bool
    latent_channels: int
    scaling_factor: float
    text_layers: int
    text_width: int
    text_heads: int
    text_positions: int
    seed: int = 0

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 1 << (len(self.vae_channels) - 1)

    @property
    def native_size_px(self) -> int:
        """Side of the square picture the model draws unasked."""
        return int(self.sample_size * self.vae_factor)


DEEP = TinyConfig(
    sample_size=16,
    unet_channels=(32, 64),
    unet_cross_attention=(False, True),
    unet_layers=1,
    unet_norm_groups=8,
    unet_heads=4,
    vae_channels=(8, 8, 16, 16, 32, 32),
    vae_norm_groups=4,
    vae_mid_attention=False,
    latent_channels=12,
    scaling_factor=1.0,
    text_layers=2,
    text_width=64,
    text_heads=4,
    text_positions=64,
)
FIXTURE = TinyConfig(
    sample_size=8,
    unet_channels=(32, 64),
    unet_cross_attention=(False, True),
    unet_layers=1,
    unet_norm_groups=8,
    unet_heads=4,
    vae_channels=(32, 64),
    vae_norm_groups=8,
    vae_mid_attention=True,
    latent_channels=4,
    scaling_factor=0.18215,
    text_layers=5,
    text_width=32,
    text_heads=4,
    text_positions=77,
)
SD1_SHAPED = TinyConfig(
    sample_size=8,
    unet_channels=(32, 32, 64, 64),
    unet_cross_attention=(True, True, True, False),
    unet_layers=2,
    unet_norm_groups=8,
    unet_heads=4,
    vae_channels=(8, 8, 16, 16),
    vae_norm_groups=4,
    vae_mid_attention=True,
    latent_channels=4,
    scaling_factor=0.18215,
    text_layers=3,
    text_width=32,
    text_heads=4,
    text_positions=77,
)
PRESETS = {"deep": DEEP, "fixture": FIXTURE, "sd1": SD1_SHAPED}
"""`deep` is quick at large pictures: 512 px native, 32 px a latent cell."""


def build_pipeline_folder(out: Path, config: TinyConfig) -> Path:
    """Write a whole diffusers folder with random weights.

    Args:
        out: the folder, made if missing; files of the same names are replaced.
        config: shape and seed; the same config gives the same bytes.

    Returns:
        `out`, for `StableDiffusionPipeline.from_pretrained(out, local_files_only=True)`.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(config.text_positions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        exporting.save_unet(_unet(config), out)
        exporting.save_vae(_vae(config), out)
        exporting.save_text_encoder(_text_encoder(config, len(tokenizer)), out)
    exporting.save_tokenizer(tokenizer, out)
    exporting.save_scheduler_config(_scheduler_config(), out)
    exporting.save_model_index(out, "DDIMScheduler")
    return out


def build_tokenizer(positions: int, corpus: str = _CORPUS) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's form; any text is representable, no unknown tokens.

    Args:
        positions: longest sequence, start and end token included, 3 or more.
        corpus: words apart by white space; each becomes one token.
    """
    merges = _learn_merges(corpus.split())
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(letter + _WORD_END for letter in alphabet), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=positions)


def _learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016, algorithm 1) until each word is one token."""
    counts = Counter(words)
    pieces = {word: [*word[:-1], word[-1] + _WORD_END] for word in counts}
    merges: list[tuple[str, str]] = []
    while pairs := _pair_counts(pieces, counts):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merged(parts, best) for word, parts in pieces.items()}
    return merges


def _pair_counts(pieces: dict[str, list[str]], counts: Counter[str]) -> Counter[tuple[str, str]]:
    pairs: Counter[tuple[str, str]] = Counter()
    for word, parts in pieces.items():
        for pair in pairwise(parts):
            pairs[pair] += counts[word]
    return pairs


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] = out[-1] + part
        else:
            out.append(part)
    return out


def _byte_alphabet() -> list[str]:
    """One printable character per byte value: printable Latin-1 is itself, the rest starts at U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


def _unet(config: TinyConfig) -> UNet2DConditionModel:
    down = tuple("CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in config.unet_cross_attention)
    up = tuple(
        "CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(config.unet_cross_attention)
    )
    return UNet2DConditionModel(
        sample_size=config.sample_size,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.unet_channels,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=config.unet_layers,
        cross_attention_dim=config.text_width,
        attention_head_dim=config.unet_heads,
        norm_num_groups=config.unet_norm_groups,
    )


def _vae(config: TinyConfig) -> AutoencoderKL:
    levels = len(config.vae_channels)
    return AutoencoderKL(
        sample_size=config.native_size_px,
        block_out_channels=config.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=config.vae_norm_groups,
        mid_block_add_attention=config.vae_mid_attention,
        scaling_factor=config.scaling_factor,
    )


def _text_encoder(config: TinyConfig, vocab_size: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            max_position_embeddings=config.text_positions,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )


def _scheduler_config() -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
