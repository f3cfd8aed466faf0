"""Models from local files into memory: a diffusers folder, or one `.safetensors` in the original layout.

Only safetensors are read, never pickles, and never the network: fetching is the business of whoever made the
folder. LoRA files in the folder of a part are merged into it: a model that was trained as a LoRA is its base's folder
and such a file. Every number about a model (picture size, VAE factor, token limit, latent channels) is read from its
configs here, so that no other code assumes those of Stable Diffusion 1.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from services.diffusion.lora import Part, merge
from services.diffusion.lora_files import read_lora
from services.domain.artifacts import ADAPTER_PATTERN, SINGLE_FILE_CONFIG, SINGLE_FILE_NAME
from services.domain.errors import BadInput

_SINGLE_FILE_TEXT = "cond_stage_model.transformer."
_SINGLE_FILE_PREFIX = "cond_stage_model.transformer.text_model."
_SINGLE_FILE_PARTS = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
_LOAD_FAULTS = (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError)


@dataclass(frozen=True, slots=True)
class Components:
    """The parts of one text-to-image model, in memory and in evaluation mode.

    Attributes:
        scheduler_config: the model's own noise schedule, as in `scheduler_config.json`.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: Mapping[str, Any]

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 1 << (len(self.vae.config.block_out_channels) - 1)

    @property
    def native_size_px(self) -> int:
        """Side of the square picture that the UNet was made for."""
        size = self.unet.config.sample_size
        cells = size if isinstance(size, int) else max(size)
        return int(cells) * self.vae_factor

    @property
    def model_max_length(self) -> int:
        """Token positions of one prompt, start and end token included."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents."""
        return int(self.vae.config.latent_channels)

    @property
    def scaling_factor(self) -> float:
        """What VAE latents are multiplied by before the UNet sees them."""
        return float(self.vae.config.scaling_factor)

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: `epsilon`, `v_prediction` or `sample`."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def device(self) -> torch.device:
        """Where the UNet's weights are."""
        # The library's own properties walk through all weights, which costs a tenth of a small model's call.
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the UNet's weights."""
        return self.unet.conv_in.weight.dtype

    def with_modules(self, **parts: Any) -> "Components":
        """The same model with some parts replaced, for instance `unet=`."""
        return replace(self, **parts)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A diffusers folder on disk, each part loaded on its own so that models can share parts.

    Attributes:
        merges_adapters: LoRA files in the folder of a part are merged into its weights.
    """

    root: Path
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    merges_adapters: bool = True

    @property
    def has_part_files(self) -> bool:
        """Each part's weights are files of their own, which another model can share."""
        return True

    def load(self) -> Components:
        """All parts.

        Raises:
            BadInput: a part is missing, damaged, of another architecture, or lacks weights.
        """
        return Components(
            self.load_unet(),
            self.load_vae(),
            self.load_text_encoder(),
            self.load_tokenizer(),
            self.scheduler_config(),
        )

    def load_unet(self) -> UNet2DConditionModel:
        """The UNet; raises as :meth:`load`."""
        return self._adapted(self._load_weights(UNet2DConditionModel, "unet"), "unet")

    def load_vae(self) -> AutoencoderKL:
        """The autoencoder; raises as :meth:`load`."""
        return self._load_weights(AutoencoderKL, "vae")

    def load_text_encoder(self) -> CLIPTextModel:
        """The text encoder, from keys with or without `text_model.`; raises as :meth:`load`."""
        return self._adapted(self._load_weights(CLIPTextModel, "text_encoder"), "text_encoder")

    def load_tokenizer(self) -> CLIPTokenizer:
        """The tokenizer, from either form of its files; raises as :meth:`load`."""
        try:
            return CLIPTokenizer.from_pretrained(str(self.root / "tokenizer"), local_files_only=True)
        except _LOAD_FAULTS as error:
            raise _unusable("tokenizer", error) from error

    def scheduler_config(self) -> dict[str, Any]:
        """The noise schedule's configuration; raises as :meth:`load`."""
        path = self.root / "scheduler" / "scheduler_config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _unusable("scheduler", error) from error
        if not isinstance(config, dict):
            raise BadInput("the model's scheduler cannot be used: its configuration is not an object")
        return config

    def _load_weights(self, cls: Any, part: str) -> Any:
        try:
            module, info = cls.from_pretrained(
                str(self.root / part),
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=self.dtype,
                output_loading_info=True,
            )
        except _LOAD_FAULTS as error:
            raise _unusable(part, error) from error
        # A missing key leaves random weights behind and only a log line: that must not draw pictures.
        if missing := sorted(str(key) for key in info["missing_keys"]):
            raise BadInput(f"the model's {part} lacks {len(missing)} of its weights, first {missing[0]}")
        return module.to(self.device).eval()

    def _adapted(self, module: Any, part: Part) -> Any:
        paths = (self.root / part).glob(ADAPTER_PATTERN) if self.merges_adapters else ()
        for path in sorted(paths):
            merge(module, read_lora(path), part=part)
        return module


@dataclass(frozen=True, slots=True)
class SingleFile(ModelFolder):
    """One `.safetensors` in the original (CompVis) layout; `root` holds configs, tokenizer and scheduler.

    Each part reads no more than its own tensors.

    Attributes:
        checkpoint: the file.
    """

    checkpoint: Path = field(kw_only=True)

    @property
    def has_part_files(self) -> bool:
        """Each part's weights are files of their own: not here."""
        return False

    def load_unet(self) -> UNet2DConditionModel:
        """The UNet; raises as :meth:`load`."""
        return self._adapted(self._load_single(UNet2DConditionModel, "unet"), "unet")

    def load_vae(self) -> AutoencoderKL:
        """The autoencoder; raises as :meth:`load`."""
        return self._load_single(AutoencoderKL, "vae")

    def load_text_encoder(self) -> CLIPTextModel:
        """The text encoder, from keys with or without `text_model.`; raises as :meth:`load`."""
        try:
            module = create_diffusers_clip_model_from_ldm(
                CLIPTextModel,
                with_text_prefix(self._state("text_encoder")),
                subfolder="text_encoder",
                config=str(self.root),
                torch_dtype=self.dtype,
                local_files_only=True,
            )
        except _LOAD_FAULTS as error:
            raise _unusable("text_encoder", error) from error
        return self._adapted(self._placed(module, "text_encoder"), "text_encoder")

    def _load_single(self, cls: Any, part: str) -> Any:
        options = {"config": str(self.root), "subfolder": part, "torch_dtype": self.dtype}
        try:
            module = cls.from_single_file(self._state(part), local_files_only=True, **options)
        except _LOAD_FAULTS as error:
            raise _unusable(part, error) from error
        return self._placed(module, part)

    def _state(self, part: str) -> dict[str, torch.Tensor]:
        with safe_open(self.checkpoint, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(_SINGLE_FILE_PARTS[part])]  # noqa: SIM118
            state = {key: file.get_tensor(key) for key in keys}
        if not state:
            raise BadInput(f"the checkpoint holds no {part}")
        return state

    def _placed(self, module: Any, part: str) -> Any:
        missing = sorted(name for name, tensor in module.named_parameters() if tensor.is_meta)
        if missing:
            raise BadInput(f"the checkpoint lacks {len(missing)} weights of its {part}, first {missing[0]}")
        return module.to(self.device).eval()


def open_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    merges_adapters: bool = True,
) -> ModelFolder:
    """Look at a model's folder and say how its parts are loaded; the only place that tells the forms apart.

    Args:
        folder: a diffusers folder, or one that holds `model.safetensors` and the folder `config`.
        dtype: precision of all weights.
        device: where they go.
        merges_adapters: False loads the base alone of a model that was trained as a LoRA.
    """
    checkpoint = folder / SINGLE_FILE_NAME
    if checkpoint.is_file():
        config = folder / SINGLE_FILE_CONFIG
        return SingleFile(config, dtype, device, merges_adapters, checkpoint=checkpoint)
    return ModelFolder(folder, dtype, device, merges_adapters)


def load_components(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Components:
    """Load all parts of a model; arguments as for :func:`open_model`.

    Raises:
        BadInput: a part is missing, damaged, of another architecture, or lacks weights.
    """
    return open_model(folder, dtype, device).load()


def load_single_file(
    path: Path, config_folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Components:
    """Load one `.safetensors` in the original (CompVis) layout.

    Args:
        path: the checkpoint. Text encoder keys without `text_model.` are accepted too.
        config_folder: a diffusers folder of the same architecture, for configs, tokenizer and scheduler.
        dtype: precision of all weights.
        device: where they go.

    Raises:
        BadInput: not such a file, or not of the architecture that `config_folder` describes.
    """
    return SingleFile(config_folder, dtype, device, checkpoint=path).load()


def with_text_prefix(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A single-file state with `text_model.` put back where a newer library's export dropped it."""
    return {
        _SINGLE_FILE_PREFIX + key.removeprefix(_SINGLE_FILE_TEXT)
        if key.startswith(_SINGLE_FILE_TEXT) and not key.startswith(_SINGLE_FILE_PREFIX)
        else key: tensor
        for key, tensor in state.items()
    }


def quiet_libraries() -> None:
    """Keep the model libraries' progress bars and notices out of a process's log; errors stay."""
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _unusable(part: str, error: Exception) -> BadInput:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return BadInput(f"the model's {part} cannot be used: {first_line}")
