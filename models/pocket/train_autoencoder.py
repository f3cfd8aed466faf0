"""Trains the autoencoder on crops of drawn scenes and textures.

    torchrun --nproc-per-node 2 -m models.pocket.train_autoencoder --out runs/vae --steps 3000
    torchrun --nproc-per-node 2 -m models.pocket.train_autoencoder --out runs/vae --steps 3000 --decoder-steps 3000

The first `--steps` train everything, on crops that grow (`--phases`); then the latents are scaled, the encoder is
frozen (`encoder.pt` appears: the base model's training can start) and `--decoder-steps` more sharpen the decoder. A
run that was stopped goes on from its last checkpoint when started again.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from models.pocket import autoencoder
from models.pocket.drawing import draw, texture
from models.pocket.scenes import Scene, random_scene
from models.pocket.training import (
    Average,
    Log,
    Processes,
    average_gradients,
    join_processes,
    learning_rate,
    load_state,
    save_state,
)

Phase = tuple[float, int, int]
"""Share of the steps at which a phase ends, its crops' side in pixels, crops a step and process."""
_PHASES = "0.25:64:48,0.65:128:16,1:256:6"
_DECODER_PHASES = "1:256:6"
_TEXTURES = 0.12
"""Share of the pictures that are textures."""


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [b, h, w, 3] -> float32 [b, 3, h, w] in -1..1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def crops(rng: random.Random, side: int, count: int) -> np.ndarray:
    """uint8 [count, side, side, 3]: crops of scenes drawn at 256 to 768 px, half of them around a thing."""
    out = np.empty((count, side, side, 3), np.uint8)
    per_scene = 6 if side == 64 else 2
    for start in range(0, count, per_scene):
        size = max(side, rng.choice((256, 384, 512, 512, 512, 640, 768)))
        if rng.random() < _TEXTURES:
            scene, pixels = None, np.asarray(texture(rng, size))
        else:
            scene = random_scene(rng)
            pixels = np.asarray(draw(scene, size))
        for index in range(start, min(count, start + per_scene)):
            left, top = _corner(rng, scene, size, side)
            out[index] = pixels[top : top + side, left : left + side]
    return out


def _corner(rng: random.Random, scene: Scene | None, size: int, side: int) -> tuple[int, int]:
    limit = size - side
    if scene is None or rng.random() < 0.5:
        return rng.randint(0, limit), rng.randint(0, limit)
    thing = rng.choice(scene.things)
    reach = thing.height * size * 0.4
    x = thing.x * size + rng.uniform(-reach, reach) - side / 2
    y = thing.y * size + rng.uniform(-reach, reach) - side / 2
    return min(limit, max(0, round(x))), min(limit, max(0, round(y)))


def whole_scenes(seed: int, count: int, side: int = 512) -> Tensor:
    """[count, 3, side, side] in -1..1: scenes from a stream of their own, that no training draws from."""
    rng = random.Random(f"evaluation {seed}")
    return to_tensor(np.stack([np.asarray(draw(random_scene(rng), side)) for _ in range(count)]))


@torch.no_grad()
def reconstruction(model: AutoencoderKL, pictures: Tensor) -> tuple[float, float]:
    """Mean absolute error (range -1..1) and mean PSNR in dB of the posterior mean's round trip."""
    device = next(model.parameters()).device
    errors, ratios = [], []
    for picture in torch.split(pictures.to(device), 4):
        back = model.decode(model.encode(picture).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((back - picture).abs().mean(dim=(1, 2, 3)))
        ratios.append(10 * torch.log10(4.0 / (back - picture).square().mean(dim=(1, 2, 3))))
    return float(torch.cat(errors).mean()), float(torch.cat(ratios).mean())


def main() -> None:
    """Command line: see the module's text."""
    train(arguments_of(), join_processes())


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run; `words` are those of the command line unless given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--decoder-steps", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--phases", type=_phases, default=_PHASES, help="END:SIDE:CROPS, apart by commas")
    parser.add_argument("--decoder-phases", type=_phases, default=_DECODER_PHASES, help="as --phases")
    parser.add_argument("--held-out", type=int, default=16, help="scenes on which the error is measured")
    parser.add_argument("--scale-on", type=int, default=96, help="scenes that set the latents' scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=200)
    return parser.parse_args(words)


def _phases(text: str) -> list[Phase]:
    parts = (part.split(":") for part in text.split(","))
    return [(float(end), int(side), int(count)) for end, side, count in parts]


def train(arguments: argparse.Namespace, processes: Processes) -> AutoencoderKL:
    """Runs or continues a training; returns the averaged model, without norms."""
    torch.manual_seed(arguments.seed)
    model = autoencoder.build(with_norms=False).to(processes.device, memory_format=torch.channels_last)
    log = Log(arguments.out / "log.jsonl", processes)
    state_path, encoder_path = arguments.out / "state.pt", arguments.out / "encoder.pt"
    whole = _Run(model, list(model.parameters()), arguments, processes, log, state_path)
    if not encoder_path.exists():
        whole.run(arguments.steps, arguments.phases)
        whole.average.swap()
        if processes.leads:
            _scale(model, log, arguments.scale_on)
            save_state(encoder_path, {"model": model.state_dict()})
    if processes.count > 1:
        torch.distributed.barrier()
    finish_path = arguments.out / "decoder.pt"
    start = load_state(encoder_path, processes.device)
    assert start is not None
    model.load_state_dict(start["model"])
    if arguments.decoder_steps:
        trained = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
        finish = _Run(model, trained, arguments, processes, log, finish_path)
        finish.run(arguments.decoder_steps, arguments.decoder_phases)
        finish.average.swap()
    if processes.leads:
        save_state(arguments.out / "model.pt", {"model": model.state_dict()})
    return model


def _scale(model: AutoencoderKL, log: Log, count: int) -> None:
    pictures = whole_scenes(1, count)
    with torch.no_grad():
        device = next(model.parameters()).device
        latents = torch.cat(
            [model.encode(part.to(device)).latent_dist.mean for part in torch.split(pictures, 4)]
        )
    deviation = latents.std(dim=(0, 2, 3))
    log.write(event="scaled", smallest=float(deviation.min()), largest=float(deviation.max()))
    autoencoder.scale_latents(model, latents.mean(dim=(0, 2, 3)), deviation)


class _Run:
    """One stretch of training over some of the parameters, resumable."""

    def __init__(
        self,
        model: AutoencoderKL,
        trained: list[nn.Parameter],
        arguments: argparse.Namespace,
        processes: Processes,
        log: Log,
        path: Path,
    ) -> None:
        self._model, self._trained = model, trained
        self._arguments, self._processes, self._log, self._path = arguments, processes, log, path
        self._optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
        self.average = Average([model], 0.998)
        self._step = 0

    def _load(self) -> None:
        state = load_state(self._path, self._processes.device)
        if state is not None:
            self._model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.average.load(state["average"])
            self._step = state["step"]

    def _save(self) -> None:
        if self._processes.leads:
            state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
            save_state(self._path, {**state, "average": self.average.state(), "step": self._step})

    def run(self, steps: int, phases: list[Phase]) -> None:
        """Trains from the checkpoint, if there is one, to `steps`."""
        self._load()
        held_out = whole_scenes(0, self._arguments.held_out)
        losses: list[float] = []
        while self._step < steps:
            side, count = next((side, count) for end, side, count in phases if self._step / steps < end)
            losses.append(self._update(steps, side, count))
            self._step += 1
            if self._step % 50 == 0:
                self._log.write(step=self._step, side=side, loss=round(sum(losses) / len(losses), 4))
                losses = []
            if self._step % self._arguments.checkpoint_every == 0 or self._step == steps:
                self._save()
            if self._processes.leads and (self._step % 500 == 0 or self._step == steps):
                self.average.swap()
                error, ratio = reconstruction(self._model, held_out)
                self.average.swap()
                self._log.write(step=self._step, error=round(error, 4), psnr_db=round(ratio, 2))

    def _update(self, steps: int, side: int, count: int) -> float:
        seed = f"{self._arguments.seed} {self._path.name} {self._step} {self._processes.rank}"
        picture = to_tensor(crops(random.Random(seed), side, count))
        picture = picture.to(self._processes.device, memory_format=torch.channels_last)
        torch.manual_seed(random.Random(seed).getrandbits(48))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._step, steps, self._arguments.learning_rate, 100)
        with torch.autocast(picture.device.type, torch.bfloat16):
            posterior = self._model.encode(picture).latent_dist
            back = self._model.decode(posterior.sample()).sample.float()
        error = back - picture
        loss = (
            error.abs().mean() + error.square().mean() + 1e-4 * posterior.kl().float().mean() / side**2 * 256
        )
        self._optimizer.zero_grad()
        loss.backward()
        average_gradients(self._trained, self._processes)
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self.average.update()
        return float(loss.detach())


if __name__ == "__main__":
    main()
