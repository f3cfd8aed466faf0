"""Where an attempt can be killed: numbered moments of its four phases, and the kill itself.

A moment is a call of one of the model's modules or of the optimizer (`step`), or an operation on a file while a
checkpoint is written (`checkpoint`), files are stored (`upload`), or the trained model is written and read back
(`export`). The same training passes the same moments in the same order, so that a kill can be repeated.
"""

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

PHASES = ("step", "checkpoint", "upload", "export")
_PHASE: ContextVar[str] = ContextVar("phase", default="")
_FILE_EVENTS = frozenset(
    {
        "open",
        "os.link",
        "os.listdir",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.scandir",
        "os.symlink",
        "shutil.copyfile",
        "shutil.rmtree",
    }
)


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill: the number of the moment within its phase, from 1."""

    phase: str
    moment: int


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Moments inside the block, and in threads that asyncio starts from it, are of this phase."""
    token = _PHASE.set(name)
    try:
        yield
    finally:
        _PHASE.reset(token)


def enter(name: str) -> None:
    """From here on this thread is in a phase; empty: in none."""
    _PHASE.set(name)


class Points:
    """Counts the moments of this process, and ends it at the one that is planned.

    Args:
        plan: when; None: only count.
    """

    def __init__(self, plan: Kill | None) -> None:
        self.passed: Counter[str] = Counter()
        self._plan = plan

    def watch(self) -> None:
        """Begins to count, for the rest of the process's life."""
        register_module_forward_pre_hook(lambda *called: self._pass("step"))
        register_optimizer_step_pre_hook(lambda *called: self._pass("step"))
        register_optimizer_step_post_hook(lambda *called: self._pass("step"))
        sys.addaudithook(self._note_file)

    def _note_file(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS and _PHASE.get() != "step":
            self._pass(_PHASE.get())

    def _pass(self, name: str) -> None:
        if not name or name != _PHASE.get():
            return
        self.passed[name] += 1
        if self._plan is not None and (name, self.passed[name]) == (self._plan.phase, self._plan.moment):
            os.kill(os.getpid(), signal.SIGKILL)
