"""How LoRA files name what they hold: from a tensor's key to the module and matrix it is, and back. Text only.

One matrix of one module, in the layouts that are read:

    diffusers since PEFT   unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight
    Kohya                  lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight
    diffusers before       unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight
                           unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight
                           text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight

Written are the first two. Kohya's text encoder is `lora_te_` for Stable Diffusion 1 and 2; `lora_te1_`, the name of the
first of SDXL's two, is read too, since one converter in wide use writes it for all models. A module's canonical name is
that of `lora`.
"""

import re
from enum import StrEnum

from services.diffusion.lora import Part, module_name
from services.domain.errors import BadInput


class Slot(StrEnum):
    """What a tensor is to its module."""

    A = "A"
    B = "B"
    ALPHA = "alpha"


_SUFFIXES = {
    ".lora_A.weight": Slot.A,
    ".lora_B.weight": Slot.B,
    ".lora_down.weight": Slot.A,
    ".lora_up.weight": Slot.B,
    ".lora.down.weight": Slot.A,
    ".lora.up.weight": Slot.B,
    "_lora.down.weight": Slot.A,
    "_lora.up.weight": Slot.B,
    ".lora_linear_layer.down.weight": Slot.A,
    ".lora_linear_layer.up.weight": Slot.B,
    ".alpha": Slot.ALPHA,
}
_PEFT_SUFFIX = {Slot.A: ".lora_A.weight", Slot.B: ".lora_B.weight"}
_KOHYA_SUFFIX = {Slot.A: ".lora_down.weight", Slot.B: ".lora_up.weight", Slot.ALPHA: ".alpha"}
_KOHYA_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_"}

# Kohya writes `_` for every dot of a path. These words of the networks' vocabulary have a `_` of their own.
_WORD = re.compile(
    r"(?<![a-z0-9])(?:(?:down|up|transformer)_blocks|mid_block|time_emb_proj|time_embedding|linear_[12]|"
    r"conv_(?:in|out|shortcut)|proj_(?:in|out)|to_(?:q|k|v|out)|text_model|self_attn|(?:q|k|v|out)_proj)(?![a-z0-9])"
)
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_KNOWN: dict[Part, tuple[str, ...]] = {
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "time_embedding.", "conv_in", "conv_out"),
    "text_encoder": ("text_model.encoder.layers.", "encoder.layers."),
}
_PATH = re.compile(r"[a-z0-9_]+(?:\.[a-z0-9_]+){0,15}")


def parse_key(key: str) -> tuple[str, Slot]:
    """Tell what a tensor of a LoRA file is.

    Args:
        key: its name in the file, of any layout above.

    Returns:
        The module's canonical name, and which of its tensors this is.

    Raises:
        BadInput: it is nothing of a LoRA for a UNet and one CLIP text encoder.
    """
    for suffix, slot in _SUFFIXES.items():
        if key.endswith(suffix):
            return _module(key, key.removesuffix(suffix)), slot
    raise BadInput(
        f"the tensor {shown(key)} is no matrix of a plain LoRA; DoRA, LoHa, LoKr and the like cannot be used"
    )


def peft_key(module: str, slot: Slot) -> str:
    """The name that diffusers writes; `slot` is A or B."""
    return module + _PEFT_SUFFIX[slot]


def kohya_key(module: str, slot: Slot) -> str:
    """The name that Kohya's scripts write.

    Raises:
        ValueError: with its dots as underscores the name could not be told from another module's.
    """
    part, _, path = module.partition(".")
    key = _KOHYA_PREFIX[part] + path.replace(".", "_") + _KOHYA_SUFFIX[slot]
    if parse_key(key) != (module, slot):
        raise ValueError(f"{module} has no name of its own in the Kohya layout")
    return key


def shown(key: str) -> str:
    """A name out of a file as an error may show it: quoted, printable, of bounded length."""
    return ascii(key if len(key) <= 120 else f"{key[:120]}...")


def _module(key: str, stem: str) -> str:
    for prefix in ("lora_te2_", "text_encoder_2."):
        if stem.startswith(prefix):
            raise BadInput(f"the tensor {shown(key)} is of a second text encoder: the LoRA is made for SDXL")
    for prefix in ("lora_te_", "lora_te1_"):
        if stem.startswith(prefix):
            return _named(key, "text_encoder", _dotted(stem.removeprefix(prefix)))
    if stem.startswith("lora_unet_"):
        return _named(key, "unet", _dotted(stem.removeprefix("lora_unet_")))
    if stem.startswith("text_encoder."):
        parent, _, last = stem.removeprefix("text_encoder.").rpartition(".")
        return _named(key, "text_encoder", f"{parent}.{_OLD_TEXT.get(last, last)}")
    # The oldest files hold the UNet alone and do not name it.
    path = stem.removeprefix("unet.").replace(".processor.", ".")
    return _named(key, "unet", f"{path}.0" if path.endswith(".to_out") else path)


def _dotted(name: str) -> str:
    joined = _WORD.sub(lambda word: word[0].replace("_", "-"), name)
    return joined.replace("_", ".").replace("-", "_")


def _named(key: str, part: Part, path: str) -> str:
    if not path.startswith(_KNOWN[part]) or not _PATH.fullmatch(path):
        raise BadInput(
            f"the tensor {shown(key)} belongs to no module of a UNet or text encoder of Stable Diffusion 1 or 2"
        )
    return module_name(part, path)
