"""The loop that all recipes share: from batches to weights, one update after the other.

Owns optimizer, learning rates, checkpoints, what is counted, and what happens when numbers stop being finite. What a
batch is made of, and what comes before and after the updates, is the recipe's. An update depends on nothing but its
index, the weights and the optimizer's state, so a run that was interrupted goes on as if it had not been.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from services.domain.errors import BadInput
from services.trainer import checkpoint as checkpoints
from services.trainer.batches import Batch
from services.trainer.conditioning import TextConditioner
from services.trainer.counters import Counters, Pace
from services.trainer.execution import Execution, autocast
from services.trainer.guards import WATCHED_EVERY, remarks
from services.trainer.history import History, Point, StageTimes, finite_or_none, peak_memory_bytes
from services.trainer.losses import (
    NoiseSchedule,
    add_noise,
    per_sample_mse,
    shared_loss,
    training_target,
    update_shares,
)
from services.trainer.moving_average import MovingAverage
from services.trainer.optim import (
    LearningRateSchedule,
    build_adamw,
    clip_jointly,
    clip_separately,
    set_learning_rates,
)
from services.trainer.previews import Previews
from services.trainer.randomness import Purpose, library_seed
from services.trainer.report import prompt_remarks, versions_of
from services.trainer.run import Ending, Observer, Progress, Request, Run
from services.trainer.schedules import learning_rates, own_steps
from services.trainer.trained_model import TrainedModel

logger = logging.getLogger(__name__)

PUBLISHED_STATE = "checkpoint"
"""Name of the format in a model's manifest under which the whole state of its training is published."""

MAY_DIFFER_ON_RESUME = frozenset(
    {
        "exportFormats",
        "maxTrainSteps",
        "numTrainEpochs",
        "previewPrompts",
        "previewSteps",
        "publishEveryMinutes",
        "saveFullPrecision",
        "saveOptimizer",
    }
)

_UNUSABLE_START = (
    checkpoints.CheckpointDamaged,
    checkpoints.CheckpointMismatch,
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a checkpoint from outside can raise whose files are whole and say something else than ours do."""

BatchesOf = Callable[[int], list[Batch]]
"""The forward passes of one update, counted from 0."""


class UpdateLoop:
    """Optimizer, schedules and counters of one training.

    Args:
        run: what is asked for.
        model: what trains.
        execution: how this device computes.
        schedule: the forward process, on the device.
        conditioner: prompts to text vectors.
        configuration: all that decides the weights, as JSON values; a checkpoint of another one is refused.
        batches_of: the data.
        total: updates in all.
        times: takes the seconds of what is done here.

    Attributes:
        counters: what moves from update to update.
        history: its numbers, for the report.
        average: of the weights; published instead of them where it is enabled.
        checkpoint: folder that a yielded run goes on from.
    """

    def __init__(
        self,
        run: Run,
        model: TrainedModel,
        execution: Execution,
        schedule: NoiseSchedule,
        conditioner: TextConditioner,
        *,
        configuration: Mapping[str, Any],
        batches_of: BatchesOf,
        total: int,
        times: StageTimes,
    ) -> None:
        spec = run.spec
        self.total = total
        self.counters = Counters(planned=total)
        self.history = History()
        self._times = times
        self._run = run
        self._model = model
        self._execution = execution
        self._schedule = schedule
        self._conditioner = conditioner
        self._configuration = dict(configuration)
        self._batches_of = batches_of
        self._parameters = model.parameters
        self._optimizer = build_adamw(
            [list(group.values()) for group in model.groups.values()],
            betas=(spec.adam_beta1, spec.adam_beta2),
            epsilon=spec.adam_epsilon,
            weight_decay=spec.adam_weight_decay,
            eight_bit=execution.eight_bit,
        )
        self._scaler = torch.amp.GradScaler(run.device.type, enabled=execution.compute_dtype is torch.float16)
        self.average = MovingAverage(self._parameters, spec.ema_decay)
        self._previews = Previews(run, model, self.average, total)
        self._watch = model.watch()
        self._start_remarks: list[str] = []
        self._version_step = 0
        self._version_is_missing = False
        self.checkpoint: Path | None = None

    # -- where an earlier attempt stopped --------------------------------------------------------------------

    def resume(self) -> None:
        """Goes on from the checkpoint that the run names, else from the newest in its folder, if there is one.

        Where there is none of the run's own, from the one that it is to start from.

        Raises:
            CheckpointMismatch, CheckpointDamaged: the named one is not a checkpoint of this run.
            BadInput: the one to start from is damaged, or has weights of other parts or of another model.
        """
        run = self._run
        found = (
            checkpoints.read(run.resume_from)
            if run.resume_from
            else checkpoints.read_newest(run.checkpoint_folder)
        )
        if found is None:
            if run.start_from is not None:
                self._start_from(run.start_from)
            return
        checkpoints.check_configuration(found, self._configuration, may_differ=MAY_DIFFER_ON_RESUME)
        self._go_on(found)
        self._version_is_missing = run.version_is_missing

    def _start_from(self, folder: Path) -> None:
        """Goes on with another training where all that decides the weights is the same; else takes its weights."""
        try:
            found = checkpoints.read(folder)
            try:
                checkpoints.check_configuration(found, self._configuration, may_differ=MAY_DIFFER_ON_RESUME)
            except checkpoints.CheckpointMismatch as difference:
                self._begin_with(found)
                self._start_remarks.append(f"only the weights of the given checkpoint are used: {difference}")
            else:
                self._go_on(found)
        except _UNUSABLE_START as error:
            raise BadInput(
                f"the given checkpoint cannot be used: {error}", "resume_checkpoint_url"
            ) from error

    def _begin_with(self, found: checkpoints.Checkpoint) -> None:
        """Begins a training of its own with the weights of another."""
        checkpoints.restore_weights(found, self._parameters)
        self.average = MovingAverage(self._parameters, self._run.spec.ema_decay)
        self._watch = self._model.watch()

    def _go_on(self, found: checkpoints.Checkpoint) -> None:
        self._restore(found)
        self.counters = Counters(**found.state["counters"])
        self.history = History.restored(found.state["history"])
        self._scaler.load_state_dict(found.state["scaler"])
        logger.info("training goes on from a checkpoint", extra={"step": found.step})

    def _restore(self, found: checkpoints.Checkpoint) -> None:
        checkpoints.restore(found, self._parameters, self._optimizer)
        self.average.restore(found.average, found.state["average_updates"])

    def _capture(self) -> checkpoints.Checkpoint:
        state = {
            "average_updates": self.average.updates,
            "configuration": self._configuration,
            "counters": self.counters.as_json(),
            "history": self.history.state(),
            "scaler": self._scaler.state_dict(),
            "schedule": [asdict(rate) for rate in self._rates()],
            "versions": versions_of(self._run.device),
        }
        return checkpoints.capture(
            self._parameters,
            self._optimizer,
            step=self.counters.update,
            state=state,
            average=self.average.weights(),
        )

    def _rates(self) -> list[LearningRateSchedule]:
        return [learning_rates(self._run.spec, part, self.counters.planned) for part in self._model.groups]

    # -- the updates -----------------------------------------------------------------------------------------

    def run(self, observer: Observer) -> Ending:
        """Does what is left of the training; after YIELDED its last checkpoint has been told to the observer.

        Raises:
            BadInput: no picture can be used.
        """
        writer = checkpoints.BackgroundWriter(self._run.checkpoint_folder)
        try:
            ending = self._until_over(observer, writer)
            if ending is Ending.STOPPED:
                return ending
            if (folder := writer.wait()) is not None:
                self._tell_saved(folder, observer)
            if not self._is_finite():
                return Ending.DIVERGED
            if ending is Ending.YIELDED:
                self.checkpoint = checkpoints.write(self._run.checkpoint_folder, self._capture())
                observer.checkpoint_saved(self.checkpoint, self.counters.update)
            return ending
        finally:
            writer.close()

    def _until_over(self, observer: Observer, writer: checkpoints.BackgroundWriter) -> Ending:
        """Updates until there are enough, something is wanted, or the numbers have stopped being finite."""
        pace = Pace(self._run.checkpoint_interval_s)
        rates, frozen = self._rates(), set[str]()
        saved_step = self.counters.update
        while self.counters.update < self.total or self._previews.due(self.counters.update):
            wanted = observer.request()
            if wanted is Request.STOP:
                return Ending.STOPPED
            if wanted is Request.YIELD:
                return Ending.YIELDED
            if (folder := writer.collect()) is not None:
                self._tell_saved(folder, observer)
            checkpoint_is_due = wanted is Request.CHECKPOINT or pace.checkpoint_is_due
            checkpoint_is_due = checkpoint_is_due and saved_step < self.counters.update
            if (checkpoint_is_due or self._version_is_due()) and not writer.busy:
                if not self._is_finite():
                    return Ending.DIVERGED
                if self._version_is_due():
                    self._begin_version()
                with pace.checkpoint(), self._times.of("checkpoints"):
                    writer.start(self._capture())
                saved_step = self.counters.update

            if self._previews.due(self.counters.update):
                with self._times.of("previews"):
                    self._previews.draw_next(self.counters.update, observer)
                continue

            self._freeze_what_is_over(frozen)
            update = self.counters.update
            with pace.update():
                with self._times.of("pictures"):
                    batches = self._batches_of(update)
                instances = sum(batch.num_instance for batch in batches)
                samples = instances + sum(batch.num_class for batch in batches)
                if not instances:
                    self.counters.pass_over()
                    continue
                set_learning_rates(self._optimizer, [rate.learning_rate(update) for rate in rates])
                with self._times.of("updates"):
                    loss, norm = self._gradients(batches)
                    finite = self._apply(loss, norm)
                if finite is None:
                    continue
                self.counters.note(loss, finite=finite, samples=samples)
            self.counters.elapsed_s += pace.last_update_s
            if not finite:
                _log_left_out(update, loss, norm, batches)
            if self.counters.diverged or self._has_no_scale_left():
                return Ending.DIVERGED
            progress = Progress(
                step=self.counters.update,
                total_steps=self.total,
                loss=loss,
                learning_rate=self._shown_rate(rates, frozen, update),
                gradient_norm=norm,
                seconds_left=pace.seconds_per_update * (self.total - self.counters.update)
                + self._previews.seconds_left(self.counters.update),
                images_per_second=samples / pace.seconds_per_update,
            )
            self._note(progress)
            observer.progress(progress)
        return Ending.TRAINED

    def _version_is_due(self) -> bool:
        """Whether the present weights are to be published beside the training; after the last update it does that."""
        every_minutes = self._run.spec.publish_every_minutes
        if not every_minutes or self.counters.update >= self.total:
            return False
        return self._version_is_missing or self.counters.version_is_due(every_minutes)

    def _begin_version(self) -> None:
        self._version_step, self._version_is_missing = self.counters.update, False
        self.counters.note_version()

    def _tell_saved(self, folder: Path, observer: Observer) -> None:
        step = checkpoints.step_of(folder)
        if step == self._version_step:
            observer.version_saved(folder, step)
        observer.checkpoint_saved(folder, step)

    def _gradients(self, batches: list[Batch]) -> tuple[float, float]:
        """Computes loss and gradients of one update and clips them; returns the loss and their joint norm before."""
        spec, device = self._run.spec, self._run.device
        instance_total = sum(batch.num_instance for batch in batches)
        class_total = sum(batch.num_class for batch in batches)
        self._optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(library_seed(spec.seed, Purpose.DROPOUT, self.counters.update))
        loss = torch.zeros((), device=device)
        for batch in batches:
            if not batch.prompts:
                continue
            zt = add_noise(self._schedule, batch.z0, batch.e, batch.t)
            with autocast(device, self._execution.compute_dtype):
                conditioning = self._conditioner.vectors(batch.prompts)  # [b, n, d]
                prediction = self._model.components.unet(
                    zt, batch.t, encoder_hidden_states=conditioning
                ).sample  # [b, c, h, w]
            target = training_target(self._schedule, batch.z0, batch.e, batch.t)
            shares = update_shares(
                batch.weights,
                num_instance=batch.num_instance,
                instance_total=instance_total,
                class_total=class_total,
                prior_loss_weight=spec.prior_loss_weight,
            )
            part = shared_loss(per_sample_mse(prediction, target), shares)
            self._scaler.scale(part).backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        self._scaler.unscale_(self._optimizer)
        groups = [list(group.values()) for group in self._model.groups.values()]
        if spec.clip_models_separately:
            norm = clip_separately(groups, spec.max_grad_norm)
        else:
            norm = clip_jointly(list(self._parameters.values()), spec.max_grad_norm)
        return float(loss), float(norm)

    def _apply(self, loss: float, norm: float) -> bool | None:
        """Lets finite gradients reach the weights; returns whether they were, or None to repeat the update.

        It is repeated, with a smaller scale, when float16 has overflowed.
        """
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            watched = self.counters.update % WATCHED_EVERY == 0
            if watched:
                self._watch.mark()
            self._scaler.step(self._optimizer)
            self.average.follow()
            if watched:
                change = self._watch.change()
                self.counters.largest_change = max(self.counters.largest_change, change)
        if self._scaler.is_enabled():
            self._scaler.update(None if finite else self._scaler.get_scale() / 2)
            if not finite and self._scaler.get_scale() >= 1:
                return None
        return finite

    def _has_no_scale_left(self) -> bool:
        return self._scaler.is_enabled() and self._scaler.get_scale() < 1

    def _freeze_what_is_over(self, frozen: set[str]) -> None:
        """Freezes the parts whose own number of updates has come."""
        for part in self._model.groups:
            steps = own_steps(self._run.spec, part)
            if part not in frozen and steps and self.counters.update >= steps:
                self._model.freeze(part)
                frozen.add(part)
                if part == "text_encoder":
                    self._conditioner.freeze()
                logger.info("a part of the model is frozen from here on", extra={"part": part, "step": steps})

    def _shown_rate(self, rates: list[LearningRateSchedule], frozen: set[str], update: int) -> float:
        """The rate of the first part that still trains."""
        training = [rate for part, rate in zip(self._model.groups, rates, strict=True) if part not in frozen]
        return training[0].learning_rate(update)

    def _note(self, progress: Progress) -> None:
        self.history.note(
            Point(
                step=progress.step,
                loss=finite_or_none(progress.loss),
                learning_rate=progress.learning_rate,
                gradient_norm=finite_or_none(progress.gradient_norm),
                images_per_second=progress.images_per_second,
                memory_bytes=peak_memory_bytes(self._run.device),
            )
        )

    def _is_finite(self) -> bool:
        return all_finite([*self._parameters.values(), *self.average.weights().values()])

    # -- what is left of it ----------------------------------------------------------------------------------

    def remarks(self) -> list[str]:
        """Returns what was remarkable about losses and weights."""
        numbers = remarks(self.counters.spikes, self.counters.largest_change, self._watch.drift())
        prompts = prompt_remarks(self._conditioner, self._run.spec.preview_prompts)
        return self._start_remarks + numbers + prompts + self._previews.remarks

    def report(self) -> dict[str, Any]:
        """Returns what the loop has counted and measured, as JSON values for the report of the run."""
        return {
            "deterministic": self._execution.deterministic,
            "execution": self._execution.summary,
            "history": self.history.as_json(),
            "samples_seen": self.counters.samples,
            "skipped_updates": self.counters.skipped,
            "stages_s": dict(self._times.seconds),
            "threads": torch.get_num_threads(),
            "versions": versions_of(self._run.device),
        }

    def back_to_last_good(self) -> int | None:
        """Puts the weights of the last good checkpoint back after a divergence.

        Returns:
            The updates of the weights that the model has now; None: they are not finite, and there are no others.
        """
        given = self._run.resume_from
        good = checkpoints.read_newest(self._run.checkpoint_folder) or (
            checkpoints.read(given) if given else None
        )
        if good is not None:
            self._restore(good)
            return good.step
        return self.counters.update if self._is_finite() else None

    def publish_state(self) -> dict[str, Path]:
        """Writes the whole state into the export folder where the specification asks for it.

        Returns:
            The archive's path relative to that folder, by the format's name; empty where none is asked for.
        """
        if not self._run.spec.save_optimizer:
            return {}
        folder = checkpoints.write(self._run.workdir / "published", self._capture())
        return packed_state(folder, self._run.export_folder)

    def let_go(self) -> None:
        """Frees gradients and the optimizer's state, which nothing needs any more."""
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.state.clear()


def packed_state(checkpoint: Path, export_folder: Path) -> dict[str, Path]:
    """Packs a checkpoint for others; returns the archive's path below the export folder by the format's name."""
    archive = Path(PUBLISHED_STATE) / "checkpoint.zip"
    checkpoints.pack(checkpoint, export_folder / archive)
    return {PUBLISHED_STATE: archive}


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no tensor holds an infinite value or NaN."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _log_left_out(update: int, loss: float, norm: float, batches: list[Batch]) -> None:
    numbers = {"update": update, "loss": loss, "gradient_norm": norm}
    drawn = [(batch.sample_ids, batch.t.tolist(), batch.prompts) for batch in batches]
    logger.warning("update left out: it is not finite", extra={**numbers, "samples": drawn})
