"""Trains the UNet and the text encoder together on encoded scenes.

    torchrun --nproc-per-node 2 -m models.pocket.train_base --latents runs/latents --out runs/base --steps 30000

The learning rate warms up, stays, and falls to zero over the last `--decay-steps`. Every `--checkpoint-every` steps
`state.pt` is replaced; a stopped run goes on from it. `--start-from` begins anew from published weights.

With `--average-every N` above 1 each process makes N updates of its own before the weights are averaged (local SGD,
Stich 2019), which halves the cost of a small step. The checkpoint holds the first process's optimizer only, so that a
run of several processes which resumes is then near the undisturbed one, not equal to it.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from transformers import CLIPTextModel

from models.pocket import base
from models.pocket.latents import Latents, read
from models.pocket.scenes import caption
from models.pocket.training import (
    Average,
    Log,
    Processes,
    average_gradients,
    average_parameters,
    join_processes,
    load_state,
    save_state,
)

BATCHES = {256: 40, 384: 24, 512: 16, 640: 10, 768: 7}
"""Side in pixels -> scenes a step and process: about the same work each. Updates count more than samples here: batches
three times as large, at the same learning rate, had the same loss after as many updates."""
COMPILED = (256, 512)
EMPTY_CAPTIONS = 0.1
"""Share of captions left empty, for classifier-free guidance (Ho and Salimans 2022)."""


def double_by_copying(unet: UNet2DConditionModel) -> None:
    """Makes the upsamplers copy each cell four times by plain tensor operations; sides must be even at each level.

    Compiled for a CPU under bfloat16 autocast, torch 2.13 gives `interpolate` inside the UNet a wrong gradient, and so
    everything below it.
    """

    def copied(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        batch, channels, rows, columns = inputs[0].shape
        cells = inputs[0][:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        doubled = cells.reshape(batch, channels, 2 * rows, 2 * columns)
        return (doubled.contiguous(memory_format=torch.channels_last), *inputs[1:])

    for module in unet.modules():
        if isinstance(module, Upsample2D):
            module.interpolate = False
            module.register_forward_pre_hook(copied)


def check_gradients(
    expected: Sequence[Tensor], found: Sequence[Tensor], names: Sequence[str], tolerance: float = 0.25
) -> None:
    """Compares the gradients of compiled networks with those of the plain ones.

    Args:
        expected: of the plain networks.
        found: of the compiled ones, in the same order.
        names: of the parameters.
        tolerance: norm of the difference over the gradient's own; bfloat16 alone makes some hundredths. Gradients
            below a thousandth of the largest are rounding errors and pass.

    Raises:
        RuntimeError: the compiler's code computes something else.
    """
    norms = [float(gradient.norm()) for gradient in expected]
    differences = [float((one - two).norm()) for one, two in zip(expected, found, strict=True)]
    wrong = [
        name
        for name, norm, difference in zip(names, norms, differences, strict=True)
        if norm > 1e-3 * max(norms) and difference > tolerance * norm
    ]
    if wrong:
        raise RuntimeError(
            f"the compiled networks have wrong gradients: {len(wrong)} of {len(norms)} parameters differ, "
            f"{wrong[0]} among them; train with --no-compile"
        )


class Scenes:
    """The encoded scenes at hand, by size; grows while files appear."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """`folder`: where `latents.py` writes."""
        self._folder, self._device = folder, device
        self._files: dict[int, list[Latents]] = {}
        self._seen: set[Path] = set()

    def look(self) -> int:
        """Reads files that are new; returns how many scenes there are."""
        for path in sorted(self._folder.glob("*.pt")):
            if path not in self._seen:
                self._seen.add(path)
                self._files.setdefault(int(path.name.split("-")[0]), []).append(read(path))
        return sum(len(file.scenes) for files in self._files.values() for file in files)

    def sizes(self) -> list[int]:
        """Sides in pixels of which there are scenes."""
        return sorted(self._files)

    def batch(self, rng: random.Random, size: int, count: int) -> tuple[Tensor, list[str]]:
        """Latents [count, c, h, w] in float32 and their captions, freshly worded."""
        values, captions = [], []
        for _ in range(count):
            file = rng.choice(self._files[size])
            index = rng.randrange(len(file.scenes))
            values.append(file.values[index])
            empty = rng.random() < EMPTY_CAPTIONS
            captions.append("" if empty else caption(file.scenes[index], rng))
        latents = torch.stack(values).to(self._device).float()
        return latents.contiguous(memory_format=torch.channels_last), captions


def velocity_loss(
    predict: nn.Module, latents: Tensor, embeddings: Tensor, bars: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity (Salimans and Ho 2022, section 4), steps spread evenly over the batch.

    Args:
        predict: the UNet.
        latents: [b, c, h, w].
        embeddings: [b, tokens, width].
        bars: [TRAIN_STEPS], see `base.alpha_bars`.
        generator: draws steps and noise.
    """
    count = latents.shape[0]
    device = latents.device
    spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    steps = (spread * base.TRAIN_STEPS).long().clamp(max=base.TRAIN_STEPS - 1).to(device)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    signal = bars[steps].sqrt()[:, None, None, None]
    rest = (1 - bars[steps]).sqrt()[:, None, None, None]
    noisy = (signal * latents + rest * noise).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16):
        predicted = predict(noisy, steps, embeddings, return_dict=False)[0]
    return (predicted.float() - (signal * noise - rest * latents)).square().mean()


def rate(step: int, steps: int, decay_steps: int, peak: float, warmup: int = 300) -> float:
    """Warm-up, plateau, linear fall to zero over the last `decay_steps`."""
    return peak * min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / max(1, decay_steps)))


class Trainer:
    """One training of the base model and all of its state."""

    def __init__(self, arguments: argparse.Namespace, processes: Processes) -> None:
        """Builds or loads the parts."""
        self._arguments, self._processes = arguments, processes
        torch.manual_seed(arguments.seed)
        device = processes.device
        self._tokenizer = base.build_tokenizer()
        self.unet = base.build_unet()
        self.text_encoder = base.build_text_encoder(len(self._tokenizer))
        if arguments.start_from:
            self.unet = UNet2DConditionModel.from_pretrained(arguments.start_from / "unet")
            folder = arguments.start_from / "text_encoder"
            self.text_encoder = CLIPTextModel.from_pretrained(folder, dtype=torch.float32)
        self.unet.to(device, memory_format=torch.channels_last).train()
        self.text_encoder.to(device).train()
        double_by_copying(self.unet)
        self._compiled: dict[int, tuple[Any, Any]] = {}
        if device.type == "cpu":
            # Backwards, the fused attention kernel costs a third of a step on a CPU; written out, a tenth.
            self.unet.set_attn_processor(AttnProcessor())
            self.text_encoder.set_attn_implementation("eager")
        named = [*self.unet.named_parameters(), *self.text_encoder.named_parameters()]
        self._names, self._parameters = zip(*named, strict=True)
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self._average = Average([self.unet, self.text_encoder], 0.999**arguments.average_every)
        self._bars = base.alpha_bars().to(device)
        self._scenes = Scenes(arguments.latents, device)
        self._step, self._samples = 0, 0
        self._path = arguments.out / "state.pt"
        self._log = Log(arguments.out / "log.jsonl", processes)
        self._load()

    def run(self) -> None:
        """Trains to `--steps`.

        Raises:
            FileNotFoundError: there are no encoded scenes of any size in `--shares`.
        """
        self._log.write(event="start", step=self._step, scenes=self._scenes.look())
        if not any(self._arguments.shares.get(size) for size in self._scenes.sizes()):
            raise FileNotFoundError(
                f"{self._arguments.latents} holds no scenes of the sizes in --shares: "
                "write some with models.pocket.latents"
            )
        losses: dict[int, list[Tensor]] = {}
        while self._step < self._arguments.steps:
            size, loss = self._update()
            losses.setdefault(size, []).append(loss)
            self._step += 1
            if self._step % 100 == 0:
                means = {
                    f"loss_{s}": round(float(torch.stack(v).mean()), 4) for s, v in sorted(losses.items())
                }
                self._log.write(step=self._step, samples=self._samples, **means)
                losses = {}
            if self._step % self._arguments.checkpoint_every == 0 or self._step == self._arguments.steps:
                self._save()
                self._scenes.look()

    def _update(self) -> tuple[int, Tensor]:
        arguments, processes = self._arguments, self._processes
        common = random.Random(f"{arguments.seed} {self._step}")
        sizes = self._scenes.sizes()
        size = common.choices(sizes, [arguments.shares.get(s, 0.0) for s in sizes])[0]
        rng = random.Random(f"{arguments.seed} {self._step} {processes.rank}")
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        count = BATCHES[size] * arguments.batch_factor
        latents, captions = self._scenes.batch(rng, size, count)
        tokens = self._tokenizer(
            captions, padding="max_length", truncation=True, max_length=base.POSITIONS, return_tensors="pt"
        ).input_ids.to(latents.device)
        for group in self._optimizer.param_groups:
            group["lr"] = rate(self._step, arguments.steps, arguments.decay_steps, arguments.learning_rate)
        loss = self._gradients(self._networks(size, latents, tokens), latents, tokens, generator)
        if arguments.average_every == 1:
            average_gradients(self._parameters, processes)
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        if (self._step + 1) % arguments.average_every == 0:
            if arguments.average_every > 1:
                average_parameters(self._parameters, processes)
            self._average.update()
        self._samples += count * processes.count
        return size, loss

    def _gradients(
        self, networks: tuple[Any, Any], latents: Tensor, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        text_encoder, unet = networks
        with torch.autocast(latents.device.type, torch.bfloat16):
            embeddings = text_encoder(tokens)[0]
        loss = velocity_loss(unet, latents, embeddings, self._bars, generator)
        self._optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    def _trial(self, networks: tuple[Any, Any], latents: Tensor, tokens: Tensor) -> list[Tensor]:
        self._gradients(networks, latents, tokens, torch.Generator().manual_seed(0))
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._parameters]

    def _networks(self, size: int, latents: Tensor, tokens: Tensor) -> tuple[Any, Any]:
        """Text encoder and UNet, compiled for the batch of the sizes that are trained most."""
        plain = (self.text_encoder, self.unet)
        if not self._arguments.compile or size not in COMPILED:
            return plain
        if size not in self._compiled:
            compiled = (
                torch.compile(self.text_encoder, dynamic=False),
                torch.compile(self.unet, dynamic=False),
            )
            expected, found = (self._trial(networks, latents, tokens) for networks in (plain, compiled))
            check_gradients(expected, found, self._names)
            self._compiled[size] = compiled
        return self._compiled[size]

    def _load(self) -> None:
        state = load_state(self._path, self._processes.device)
        if state is None:
            return
        self.unet.load_state_dict(state["unet"])
        self.text_encoder.load_state_dict(state["text_encoder"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._average.load(state["average"])
        self._step, self._samples = state["step"], state["samples"]

    def _save(self) -> None:
        if not self._processes.leads:
            return
        state = {"unet": self.unet.state_dict(), "text_encoder": self.text_encoder.state_dict()}
        state |= {"optimizer": self._optimizer.state_dict(), "average": self._average.state()}
        save_state(self._path, {**state, "step": self._step, "samples": self._samples})


def averaged(state_path: Path) -> tuple[UNet2DConditionModel, CLIPTextModel, dict[str, int]]:
    """The averaged networks of a checkpoint, in evaluation mode, and its counters `step` and `samples`."""
    state = torch.load(state_path, map_location="cpu", weights_only=True)
    unet, text_encoder = base.build_unet(), base.build_text_encoder(len(base.build_tokenizer()))
    average = Average([unet, text_encoder], 0.0)
    average.load(state["average"])
    average.swap()
    return unet.eval(), text_encoder.eval(), {"step": state["step"], "samples": state["samples"]}


def _shares(text: str) -> dict[int, float]:
    return {int(size): float(share) for size, share in (part.split(":") for part in text.split(","))}


def main() -> None:
    """Command line: see the module's text."""
    Trainer(arguments_of(), join_processes()).run()


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run; `words` are those of the command line unless given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--decay-steps", type=int, default=4000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--shares", type=_shares, default=_shares("256:0.3,384:0.05,512:0.6,768:0.05"))
    parser.add_argument("--average-every", type=int, default=1, help="steps that processes go alone")
    parser.add_argument("--batch-factor", type=int, default=1, help="times the batches for one CPU core")
    parser.add_argument("--start-from", type=Path, default=None, help="a published folder")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--checkpoint-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    if arguments.steps % arguments.average_every or arguments.checkpoint_every % arguments.average_every:
        parser.error("--steps and --checkpoint-every must be multiples of --average-every")
    return arguments


if __name__ == "__main__":
    main()
