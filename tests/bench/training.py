"""Seconds an update: the DreamBooth recipe against diffusers' own scripts, on the same model and data.

Both train as processes of their own and take turns update by update, so that a busy machine slows both alike. Each
row is of several seeds; its note says besides how the losses and the most memory of both sides compare. Needs a
diffusers checkout, named by `LIKENESS_DIFFUSERS`; without one there is nothing to compare with and no row.
"""

import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from services.adapters.settings import BenchSettings, load_or_exit
from tests.bench.rows import Row
from tests.bench.training_sides import Plan, Side

SMALL_PX = 128
POCKET = Path("models/pocket/weights")
POCKET_PX = 512
INSTANCES, CLASSES = 6, 12
WARM_UP = 13
"""Updates that are not counted: after so many, each picture was seen once by both."""
UPDATES = 12
SEEDS = range(5)
SCRIPT = "examples/dreambooth/train_dreambooth.py"
LORA_SCRIPT = "examples/dreambooth/train_dreambooth_lora.py"
LORA_RANK = 4


@dataclass(frozen=True, slots=True)
class Method:
    """What is trained, always with a prior. Attributes: the script that does it, and what `Plan` says of it."""

    what: str
    script: str
    train_text_encoder: bool = False
    lora_rank: int = 0


@dataclass(frozen=True, slots=True)
class Base:
    """What is trained on. Attributes: its folder, the training's side in pixels, and of the pictures by their name."""

    what: str
    folder: Path
    side_px: int
    pictures: Sequence[tuple[str, tuple[int, int]]]


METHODS = (
    Method("UNet and text encoder", SCRIPT, train_text_encoder=True),
    Method("UNet", SCRIPT),
    Method(f"LoRA of rank {LORA_RANK}", LORA_SCRIPT, lora_rank=LORA_RANK),
)


def rows() -> list[Row]:
    """Each method, on a small random model and on the pocket model, with pictures that are cropped and not."""
    checkout = load_or_exit(BenchSettings).diffusers
    if checkout is None:
        sys.stderr.write(
            "training: no peer to compare with, set LIKENESS_DIFFUSERS to a diffusers checkout\n"
        )
        return []
    with tempfile.TemporaryDirectory() as name:
        small = Base("8.8 M, 128 px", Path(name) / "model", SMALL_PX, _shapes(SMALL_PX))
        pocket = Base("pocket, 512 px", POCKET.resolve(), POCKET_PX, _shapes(POCKET_PX))
        _build_model(small.folder)
        return [
            _compared(base, method, pictures, checkout, Path(name))
            for base, method in product((small, pocket), METHODS)
            for pictures in base.pictures
        ]


def _shapes(side_px: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    """Square pictures, whose latents can be kept, and wider ones, whose random crops are encoded anew."""
    square, wide = side_px * 5 // 4, side_px * 13 // 8
    return ("square pictures", (square, square)), ("random crops", (wide, square))


def _build_model(folder: Path) -> None:
    from services.diffusion.loading import quiet_libraries
    from services.diffusion.tiny import TinyConfig, build_pipeline_folder

    quiet_libraries()
    # 8.8 M parameters in the UNet, 2 M in the VAE, 1.4 M in the text encoder: small, in SD 1's proportions of cost.
    config = TinyConfig(
        sample_size=SMALL_PX // 8,
        unet_channels=(64, 128, 192),
        unet_cross_attention=(True, True, False),
        unet_layers=1,
        unet_norm_groups=32,
        unet_heads=8,
        vae_channels=(48, 48, 96, 96),
        vae_norm_groups=16,
        vae_mid_attention=True,
        latent_channels=4,
        scaling_factor=0.18215,
        text_layers=4,
        text_width=160,
        text_heads=4,
        text_positions=77,
    )
    build_pipeline_folder(folder, config)


def _compared(
    base: Base, method: Method, pictures: tuple[str, tuple[int, int]], checkout: Path, folder: Path
) -> Row:
    shape, size = pictures
    data = folder / f"data-{size[0]}x{size[1]}"
    if not data.exists():
        _save_pictures(data / "instance", INSTANCES, size)
        _save_pictures(data / "class", CLASSES, size)
    script = str(checkout / method.script)
    rounds = [_round(base, method, data, script, folder / "out", seed) for seed in SEEDS]
    pairs = [pair for each in rounds for pair in each.pairs]
    mine, theirs = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    return Row(
        f"{base.what}: {method.what}, {shape}",
        f"diffusers {Path(script).name}",
        mine,
        theirs,
        statistics.median(ratios),
        _note(rounds, ratios),
    )


@dataclass(frozen=True, slots=True)
class _Round:
    """Both sides with one seed: seconds of the updates in turns, ours first; mean losses; peak memory in MiB."""

    pairs: Sequence[tuple[float, float]]
    losses: tuple[float, float]
    memory: tuple[float, float]


def _round(base: Base, method: Method, data: Path, script: str, out: Path, seed: int) -> _Round:
    with ExitStack() as stack:
        ours, peer = (
            stack.enter_context(Side(side, _plan(base, method, data, script, out / side / str(seed), seed)))
            for side in ("ours", "peer")
        )
        pairs = [(ours.update(), peer.update()) for _ in range(WARM_UP + UPDATES)][WARM_UP:]
        losses = statistics.fmean(ours.losses[WARM_UP:]), statistics.fmean(peer.losses[WARM_UP:])
        return _Round(pairs, losses, (ours.peak_mib(), peer.peak_mib()))


def _plan(base: Base, method: Method, data: Path, script: str, out: Path, seed: int) -> Plan:
    return Plan(
        model=str(base.folder),
        data=str(data),
        out=str(out),
        script=script,
        resolution=base.side_px,
        updates=WARM_UP + UPDATES + 1,
        seed=seed,
        train_text_encoder=method.train_text_encoder,
        lora_rank=method.lora_rank,
    )


def _note(rounds: Sequence[_Round], ratios: Sequence[float]) -> str:
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    differences = [ours - theirs for ours, theirs in (each.losses for each in rounds)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    loss = statistics.fmean(each.losses[1] for each in rounds)
    memory = statistics.fmean(ours / theirs for ours, theirs in (each.memory for each in rounds))
    return (
        f"{len(ratios)} updates in turns, ratios {low:.2f} to {high:.2f} (middle 80 %); loss {loss:.3f}, ours "
        f"{statistics.fmean(differences):+.3f} (error {error:.3f}); peak memory {memory:.2f} of the peer's"
    )


def _save_pictures(folder: Path, count: int, size: tuple[int, int]) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(count):
        pixels = random.Random(number).randbytes(size[0] * size[1] * 3)
        Image.frombytes("RGB", size, pixels).save(folder / f"{number:02}.png")
