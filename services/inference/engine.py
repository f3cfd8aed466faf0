"""The denoise loop: which slots run this tick, one batched UNet call, each slot's own step.

Slots join and leave between ticks, and each keeps its own schedule, guidance and random numbers. A tick serves the
slot that has waited longest and fills its call with others that fit, so that no picture waits for another to end.
With a cap above 1 a picture depends on its neighbours in the last bits only, which is how matrix kernels differ
between batch sizes; with a cap of 1 not at all.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.diffusion.devices import as_device_memory_error
from services.diffusion.drawing import guide, predict
from services.diffusion.lora_rows import LoraRows
from services.inference.slot import Slot

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tick:
    """What one tick did.

    Attributes:
        stepped: slots that made one UNet call, finished ones included.
        finished: slots whose latents are complete; they have left the engine.
        failed: slots that cannot go on, with the reason; they have left the engine.
    """

    stepped: list[Slot] = field(default_factory=list)
    finished: list[Slot] = field(default_factory=list)
    failed: list[tuple[Slot, Exception]] = field(default_factory=list)


class Engine:
    """The slots in progress on one device. Not safe for several threads.

    Args:
        batch_cap: pictures in one UNet call, 1 or more.
    """

    def __init__(self, batch_cap: int = 1) -> None:
        self._slots: list[Slot] = []
        self._batch_cap = batch_cap
        self._ticks = 0
        self._loras = LoraRows(())

    @property
    def is_idle(self) -> bool:
        """There is nothing to do."""
        return not self._slots

    @property
    def slots(self) -> Sequence[Slot]:
        """Slots in progress, in order of arrival."""
        return tuple(self._slots)

    def add(self, slots: Sequence[Slot]) -> None:
        """Let slots join from the next tick on."""
        self._slots.extend(slots)

    def remove(self, is_unwanted: Callable[[Slot], bool]) -> list[Slot]:
        """Take slots out before the next tick; returns them."""
        gone = [slot for slot in self._slots if is_unwanted(slot)]
        self._slots = [slot for slot in self._slots if slot not in gone]
        return gone

    @torch.inference_mode()
    def tick(self) -> Tick:
        """Make one UNet call for the slots whose turn it is; a call too big for the device is made in halves."""
        if not self._slots:
            return Tick()
        self._ticks += 1
        batch = self._next_batch()
        for slot in batch:
            slot.last_tick = self._ticks
        result = Tick()
        self._run(batch, result)
        leaving = {id(slot) for slot in result.finished} | {id(slot) for slot, _ in result.failed}
        self._slots = [slot for slot in self._slots if id(slot) not in leaving]
        if not self._slots:
            self._loras = LoraRows(())
        return result

    def _next_batch(self) -> list[Slot]:
        # Sorting is stable: slots that have waited equally long keep their order of arrival.
        waiting = sorted(self._slots, key=lambda slot: slot.last_tick)
        return [slot for slot in waiting if slot.key == waiting[0].key][: self._batch_cap]

    def _run(self, batch: list[Slot], result: Tick) -> None:
        started = time.perf_counter()
        try:
            with self._loras_of(batch).worn():
                prediction = predict(
                    batch[0].components, [slot.row for slot in batch], _batched_context(batch)
                )
        except torch.AcceleratorError:
            raise  # The device's context is broken: only a new process helps.
        except Exception as error:
            self._handle(error, batch, result)
            return
        for number, slot in enumerate(batch):
            self._move_on(slot, prediction[number :: len(batch)], result)
        share_s = (time.perf_counter() - started) / len(batch)
        for slot in batch:
            slot.device_s += share_s

    def _loras_of(self, batch: list[Slot]) -> LoraRows:
        """What the rows of the batch wear; stacked anew only when that differs from the tick before."""
        rows = tuple(slot.loras for slot in batch) * batch[0].key.branches
        if rows != self._loras.rows:
            self._loras = LoraRows(())  # gives its memory back before the new ones take theirs
            self._loras = LoraRows(rows)
        return self._loras

    def _handle(self, error: Exception, batch: list[Slot], result: Tick) -> None:
        memory_error = as_device_memory_error(error)
        if memory_error is not None and len(batch) > 1:
            _log.warning("a batch of %d does not fit the device, made in halves", len(batch))
            self._batch_cap = len(batch) // 2
            middle = len(batch) // 2
            self._run(batch[:middle], result)
            self._run(batch[middle:], result)
            return
        _log.error("a denoising step failed", exc_info=error)
        result.failed.extend((slot, memory_error or error) for slot in batch)

    def _move_on(self, slot: Slot, prediction: Tensor, result: Tick) -> None:
        """Makes one slot's own step; a fault in it is that slot's alone, as the others' steps are not made twice."""
        try:
            guided = guide(prediction, slot.drawing.guidance_scale, slot.drawing.guidance_rescale)
            slot.latents = slot.sampler.step(guided, slot.done, slot.latents)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._handle(error, [slot], result)
            return
        slot.done += 1
        result.stepped.append(slot)
        if slot.is_finished:
            result.finished.append(slot)


def _batched_context(batch: list[Slot]) -> Tensor:
    """[branches * b, n, d]: all unconditional rows first."""
    if len(batch) == 1:
        return batch[0].context
    branches = batch[0].key.branches
    return torch.cat([slot.context[branch : branch + 1] for branch in range(branches) for slot in batch])
