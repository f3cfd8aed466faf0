"""The base model's parts in their published shapes: tokenizer, text encoder, UNet and noise schedule."""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.pocket.autoencoder import LATENT_CHANNELS
from models.pocket.scenes import WORDS
from services.diffusion import exporting, tiny

POSITIONS = 32
WIDTH = 128
UNET_CHANNELS = (96, 160)
TRAIN_STEPS = 1000
LAST_ALPHA_BAR = 1e-4
"""Signal variance left at the last training step: as good as none, yet no scheduler divides by zero."""


def build_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE in CLIP's form; each word of the grammar is one token, any other text some pieces."""
    return tiny.build_tokenizer(POSITIONS, " ".join(WORDS))


def build_text_encoder(vocab_size: int) -> CLIPTextModel:
    """Two causal layers of width 128 with random weights.

    With a third, the colours of backgrounds bound to their words in twice as many updates.
    """
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Two levels, 16 x 16 and 8 x 8 cells at 512 px; attention at the lower one. Random weights."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=UNET_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def betas() -> list[float]:
    """Stable Diffusion's scaled-linear schedule, stretched to end at `LAST_ALPHA_BAR` (Lin et al. 2024, algorithm 1).

    The paper ends at 0; a schedule given as numbers is honoured by every scheduler, a flag to rescale is not.
    """
    linear = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    roots = (1 - linear).cumprod(0).sqrt()
    last = math.sqrt(LAST_ALPHA_BAR)
    roots = last + (roots - roots[-1]) * (roots[0] - last) / (roots[0] - roots[-1])
    bars = roots.square()
    alphas = torch.cat([bars[:1], bars[1:] / bars[:-1]])
    return [float(f"{value:.9g}") for value in (1 - alphas).tolist()]


def alpha_bars() -> Tensor:
    """float32 [TRAIN_STEPS]: the share of signal variance at each training step (DDPM, eq. 4)."""
    return (1 - torch.tensor(betas(), dtype=torch.float64)).cumprod(0).float()


def scheduler_config() -> dict[str, Any]:
    """The noise scheduler as published: DDIM on v-prediction, steps spaced back from the last one."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": TRAIN_STEPS,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
        "trained_betas": betas(),
    }


def publish(vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, out: Path) -> Path:
    """Writes the diffusers folder: half precision, but for the text encoder, which transformers 5 would otherwise
    open in half precision beside a UNet in single.
    """
    out.mkdir(parents=True, exist_ok=True)
    exporting.save_unet(unet, out, torch.float16)
    exporting.save_vae(vae, out, torch.float16)
    exporting.save_text_encoder(text_encoder, out, torch.float32)
    exporting.save_tokenizer(build_tokenizer(), out)
    exporting.save_scheduler_config(scheduler_config(), out)
    exporting.save_model_index(out, "DDIMScheduler")
    return out
