"""The two sides of the training benchmark: processes that do one update for each line they are sent.

python -m tests.bench.training_sides --side=ours --plan='{"model": ...}'
"""

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.bench.torchvision_stand_in import stand_in_for_torchvision

INSTANCE_PROMPT, CLASS_PROMPT = "a photo of sks dog", "a photo of a dog"
LEARNING_RATE = 5e-6


@dataclass(frozen=True, slots=True)
class Plan:
    """What one side is told.

    Attributes:
        model: folder of the base.
        data: folder with the pictures, in `instance` and `class`.
        out: folder that is written into.
        script: diffusers' script; the service's own recipe does the same without it.
        resolution: side in pixels.
        updates: at least so many.
        seed: of everything random.
        train_text_encoder: beside the UNet.
        lora_rank: rank of adapters on the UNet's attention; 0 trains all weights.
    """

    model: str
    data: str
    out: str
    script: str
    resolution: int
    updates: int
    seed: int
    train_text_encoder: bool
    lora_rank: int

    @property
    def class_images(self) -> int:
        """Class pictures in the data."""
        return len(list((Path(self.data) / "class").iterdir()))


@dataclass(slots=True)
class Side:
    """One of the two trainings. A context manager.

    Attributes:
        losses: of the updates so far; the last one's may be missing.
    """

    side: str
    plan: Plan
    losses: list[float] = field(default_factory=list)
    _process: subprocess.Popen[str] = field(init=False)
    _log: Any = field(init=False)

    def __enter__(self) -> Self:
        """Starts the process."""
        command = [sys.executable, "-m", "tests.bench.training_sides", f"--side={self.side}"]
        command.append(f"--plan={json.dumps(asdict(self.plan))}")
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def update(self) -> float:
        """Lets it do one update; returns the seconds that took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            word, _, value = line.partition(" ")
            if word == "loss":
                self.losses.append(float(value))
            if word == "update":
                return float(value)
        self._log.seek(0)
        raise RuntimeError(f"the training ended early: {self._log.read()[-2000:]}")

    def peak_mib(self) -> float:
        """Most memory that the process has held, in MiB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


# -- in the processes ---------------------------------------------------------------------------------------


class Turns:
    """Makes every optimizer step end one update: tell its time, wait for the next turn."""

    def __init__(self) -> None:
        """Keeps the way to the benchmark for itself: what the training prints goes elsewhere."""
        self._answers = sys.stdout
        self._began = 0.0
        sys.stdout = sys.stderr

    def begin(self) -> None:
        """Stands in the optimizer's way, and waits for the first turn."""
        import torch

        step: Callable[..., Any] = torch.optim.AdamW.step

        def timed_step(optimizer: Any, *arguments: Any, **named: Any) -> Any:
            result = step(optimizer, *arguments, **named)
            self._tell("update", time.perf_counter() - self._began)
            self._wait()
            return result

        setattr(torch.optim.AdamW, "step", timed_step)  # noqa: B010 - typed as a method that is never replaced
        self._wait()

    def note(self, loss: float) -> None:
        """Tells an update's loss."""
        self._tell("loss", loss)

    def _tell(self, word: str, value: float) -> None:
        self._answers.write(f"{word} {value}\n")
        self._answers.flush()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit
        self._began = time.perf_counter()


def _train_ours(plan: Plan, turns: Turns) -> None:
    import torch
    from likeness.training.v1 import training_job_pb2 as pb

    from services.domain.training_spec import resolve_training_spec
    from services.trainer.data import Concept, Picture
    from services.trainer.recipes import dreambooth
    from services.trainer.run import Run

    def pictures(kind: str, prompt: str) -> tuple[Picture, ...]:
        paths = sorted((Path(plan.data) / kind).iterdir())
        return tuple(Picture(path.name, path, prompt, 0, plan.seed) for path in paths)

    concept = pb.Concept(instance_prompt=INSTANCE_PROMPT, class_prompt=CLASS_PROMPT)
    concept.instance_data.dataset_key = concept.class_data.dataset_key = "given"
    asked = pb.TrainingSpec(
        concepts=[concept], max_train_steps=plan.updates, learning_rate=LEARNING_RATE, seed=plan.seed
    )
    asked.train_text_encoder = plan.train_text_encoder
    if plan.lora_rank:
        asked.method = pb.TRAINING_METHOD_LORA
        asked.lora.rank, asked.lora.alpha = plan.lora_rank, plan.lora_rank
    spec = resolve_training_spec(asked)
    spec.resolution, spec.pad_tokens = plan.resolution, True  # as the script does
    concepts = (Concept(pictures("instance", INSTANCE_PROMPT), pictures("class", CLASS_PROMPT)),)
    run = Run(spec, Path(plan.model), "bench", concepts, Path(plan.out), torch.device("cpu"))
    dreambooth.train(run, _Observer(turns))


class _Observer:
    """Hears of losses and wants nothing."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def stage(self, stage: Any, detail: str = "") -> None:
        """Ignored."""

    def progress(self, progress: Any) -> None:
        """Tells the loss."""
        self._turns.note(progress.loss)

    def checkpoint_saved(self, folder: Path, step: int) -> None:
        """Ignored."""

    def version_saved(self, folder: Path, step: int) -> None:
        """Ignored."""

    def preview_drawn(self, preview: Any) -> None:
        """Ignored."""

    def request(self) -> Any:
        """Returns that training goes on."""
        from services.trainer.run import Request

        return Request.NOTHING


def _train_peer(plan: Plan, turns: Turns) -> None:
    # The libraries look for torchvision when they are imported, so the stand-in comes after them.
    import accelerate
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    stand_in_for_torchvision()

    def log(_: Any, values: dict[str, Any], **__: Any) -> None:
        turns.note(float(values["loss"]))

    accelerate.Accelerator.log = log
    sys.argv = [plan.script, *script_arguments(plan)]
    runpy.run_path(plan.script, run_name="__main__")


def script_arguments(plan: Plan) -> list[str]:
    """The script's command line."""
    arguments = [
        f"--pretrained_model_name_or_path={plan.model}",
        f"--instance_data_dir={Path(plan.data) / 'instance'}",
        f"--class_data_dir={Path(plan.data) / 'class'}",
        f"--instance_prompt={INSTANCE_PROMPT}",
        f"--class_prompt={CLASS_PROMPT}",
        "--with_prior_preservation",
        f"--num_class_images={plan.class_images}",
        f"--resolution={plan.resolution}",
        "--train_batch_size=1",
        f"--learning_rate={LEARNING_RATE}",
        "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
        f"--max_train_steps={plan.updates}",
        "--checkpointing_steps=100000",
        "--mixed_precision=no",
        "--report_to=all",
        f"--seed={plan.seed}",
        f"--output_dir={plan.out}",
    ]
    arguments += ["--train_text_encoder"] if plan.train_text_encoder else []
    return arguments + ([f"--rank={plan.lora_rank}"] if plan.lora_rank else [])


def main() -> None:
    """One side, as a process that a benchmark started."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=["ours", "peer"], required=True)
    parser.add_argument("--plan", type=json.loads, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    turns = Turns()
    turns.begin()
    train = _train_ours if arguments.side == "ours" else _train_peer
    train(Plan(**arguments.plan), turns)


if __name__ == "__main__":
    main()
