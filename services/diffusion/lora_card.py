"""What the header of a LoRA file says about it, in the two vocabularies that other programs show.

`ss_*` are the keys of Kohya's scripts, which front ends list and by which they tell the base model's family;
`modelspec.*` is the SAI Model Spec, version 1.0.0. The header never holds an address with credentials: whoever writes
a title may have pasted one.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from services.diffusion.lora import Factors, LoraWeights

TRAINING_KEYS = frozenset(
    {
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler",
        "lr_warmup_steps",
        "max_grad_norm",
        "max_train_steps",
        "min_snr_gamma",
        "mixed_precision",
        "network_dropout",
        "noise_offset",
        "num_epochs",
        "num_reg_images",
        "num_train_images",
        "optimizer",
        "prior_loss_weight",
        "seed",
        "steps",
        "text_encoder_lr",
        "unet_lr",
    }
)
"""What `LoraCard.training` may hold, each as the Kohya key without `ss_`."""

_ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1",
    ("sd2", "epsilon"): "stable-diffusion-v2-512",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v",
}
_BASE_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2"}
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")


@dataclass(frozen=True, slots=True)
class LoraCard:
    """What is known about a LoRA beside its weights; what is empty is left out of the header.

    Attributes:
        title: its name for people.
        base_model: name of the model it was trained on.
        family: whose add-ons fit: `sd1`, `sd2`, or what the registry says of other architectures.
        prediction_type: `epsilon` or `v_prediction`.
        base_digest: SHA-256 of the base's weights, hexadecimal.
        preset: name of the set of modules that were trained, as `LoraShape.preset` gives it.
        resolution_px: side of the pictures it was trained at.
        clip_skip: layer of the text encoder counted from the end, 1 the last.
        trigger_phrase: what a prompt must say to call on it.
        description: for people, Markdown.
        license: terms of use.
        finished_at: when the training ended, with a time zone.
        tag_frequency: uses of each caption or tag, by data set.
        training: settings worth showing, by the names in `TRAINING_KEYS`.
    """

    title: str
    base_model: str
    family: str
    prediction_type: str = "epsilon"
    base_digest: str = ""
    preset: str = ""
    resolution_px: int = 0
    clip_skip: int = 1
    trigger_phrase: str = ""
    description: str = ""
    license: str = ""
    finished_at: datetime | None = None
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    training: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.training) - TRAINING_KEYS):
            raise ValueError(f"no such training key: {', '.join(unknown)}")

    def header(self, weights: LoraWeights) -> dict[str, str]:
        """The header's entries for these weights, all but the digests of the content."""
        entries = self._kohya(weights) | self._model_spec()
        return {key: without_credentials(text) for key, text in sorted(entries.items()) if text}

    def _kohya(self, weights: LoraWeights) -> dict[str, str]:
        wide = [factors for factors in weights.modules.values() if _is_wide(factors)]
        narrow = [factors for factors in weights.modules.values() if not _is_wide(factors)]
        arguments = {"preset": self.preset} if self.preset else {}
        if wide:
            arguments |= {"conv_dim": _rank(wide), "conv_alpha": _alpha(wide)}
        suffix = "_v" if self.prediction_type == "v_prediction" else ""
        version = _BASE_VERSIONS.get(self.family)
        finished = self.finished_at.timestamp() if self.finished_at else None
        return {
            "ss_output_name": self.title,
            "ss_sd_model_name": self.base_model,
            "ss_new_sd_model_hash": self.base_digest,
            "ss_base_model_version": f"{version}{suffix}" if version else self.family,
            "ss_v2": str(self.family == "sd2"),
            "ss_network_module": "networks.lora",
            "ss_network_dim": _rank(narrow or wide),
            "ss_network_alpha": _alpha(narrow or wide),
            "ss_network_args": json.dumps(arguments) if arguments else "",
            "ss_resolution": f"({self.resolution_px}, {self.resolution_px})" if self.resolution_px else "",
            "ss_clip_skip": str(self.clip_skip),
            "ss_training_finished_at": str(finished) if finished is not None else "",
            "ss_tag_frequency": json.dumps(self.tag_frequency) if self.tag_frequency else "",
        } | {f"ss_{name}": str(value) for name, value in self.training.items()}

    def _model_spec(self) -> dict[str, str]:
        family = _ARCHITECTURES.get((self.family, self.prediction_type), self.family)
        entries = {
            "sai_model_spec": "1.0.0",
            "architecture": f"{family}/lora",
            "implementation": "diffusers",
            "title": self.title,
            "description": self.description,
            "date": self.finished_at.isoformat(timespec="seconds") if self.finished_at else "",
            "license": self.license,
            "usage_hint": f"Trigger phrase: {self.trigger_phrase}" if self.trigger_phrase else "",
            "trigger_phrase": self.trigger_phrase,
            "resolution": f"{self.resolution_px}x{self.resolution_px}" if self.resolution_px else "",
            "prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}.get(self.prediction_type, ""),
            "encoder_layer": str(self.clip_skip),
        }
        return {f"modelspec.{key}": text for key, text in entries.items()}


def without_credentials(text: str) -> str:
    """The text with every address cut before its query, and those with a user's name or password taken out."""

    def cut(found: re.Match[str]) -> str:
        plain = re.split(r"[?#]", found[0], maxsplit=1)[0]
        return "[address removed]" if "@" in found[0] else plain

    return _ADDRESS.sub(cut, text)


def _is_wide(factors: Factors) -> bool:
    return factors.a.ndim == 4 and factors.a.shape[2:] != (1, 1)


def _rank(modules: Iterable[Factors]) -> str:
    return _one({str(factors.rank) for factors in modules})


def _alpha(modules: Iterable[Factors]) -> str:
    return _one({f"{factors.alpha:g}" for factors in modules})


def _one(values: set[str]) -> str:
    # Kohya's own word where modules differ.
    return values.pop() if len(values) == 1 else "Dynamic"
