"""The noise schedulers by the names of this dialect, and by those of a well-known front end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from likeness.inference.v1 import generation_job_pb2 as pb

from services.domain.errors import InvalidSpec

DEFAULT = "UniPCMultistepScheduler"
LCM_STEPS = 50
"""Most steps of LCM's original schedule."""


@dataclass(frozen=True, slots=True)
class Row:
    """One scheduler.

    Attributes:
        value: canonical value that runs.
        karras: it can space its noise levels as Karras et al. (2022) do.
        runs_as: name of the scheduler that runs in its place; "": itself.
    """

    value: pb.Scheduler
    karras: bool = False
    runs_as: str = ""


SCHEDULERS: Mapping[str, Row] = {
    "DDPMScheduler": Row(pb.SCHEDULER_DDPM),
    "DDIMScheduler": Row(pb.SCHEDULER_DDIM),
    "PNDMScheduler": Row(pb.SCHEDULER_PNDM),
    "LMSDiscreteScheduler": Row(pb.SCHEDULER_LMS_DISCRETE, karras=True),
    "EulerDiscreteScheduler": Row(pb.SCHEDULER_EULER_DISCRETE, karras=True),
    "EulerAncestralDiscreteScheduler": Row(pb.SCHEDULER_EULER_ANCESTRAL_DISCRETE),
    "DPMSolverMultistepScheduler": Row(pb.SCHEDULER_DPM_SOLVER_MULTISTEP, karras=True),
    "HeunDiscreteScheduler": Row(pb.SCHEDULER_HEUN_DISCRETE, karras=True),
    "KDPM2DiscreteScheduler": Row(pb.SCHEDULER_KDPM2_DISCRETE, karras=True),
    "DPMSolverSinglestepScheduler": Row(pb.SCHEDULER_DPM_SOLVER_SINGLESTEP, karras=True),
    "KDPM2AncestralDiscreteScheduler": Row(pb.SCHEDULER_KDPM2_ANCESTRAL_DISCRETE, karras=True),
    DEFAULT: Row(pb.SCHEDULER_UNIPC_MULTISTEP, karras=True),
    "DDIMInverseScheduler": Row(pb.SCHEDULER_DDIM, runs_as="DDIMScheduler"),
    "DEISMultistepScheduler": Row(pb.SCHEDULER_DEIS_MULTISTEP, karras=True),
    "LCMScheduler": Row(pb.SCHEDULER_LCM),
    "IPNDMScheduler": Row(pb.SCHEDULER_IPNDM),
    "KarrasVeScheduler": Row(pb.SCHEDULER_KARRAS_VE),
    "ScoreSdeVeScheduler": Row(pb.SCHEDULER_SCORE_SDE_VE),
}
"""What is served. DDIMInverse walks from a picture to noise, so DDIM runs in its place and the answer says so."""

_SDE = "dpmsolver+++"
_KARRAS = " karras"
_OTHER_NAMES: Mapping[str, tuple[str, str]] = {
    "dpm++ 2m": ("DPMSolverMultistepScheduler", ""),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", _SDE),
    "dpm++ sde": ("DPMSolverSinglestepScheduler", ""),
    "dpm2": ("KDPM2DiscreteScheduler", ""),
    "dpm2 a": ("KDPM2AncestralDiscreteScheduler", ""),
    "euler": ("EulerDiscreteScheduler", ""),
    "euler a": ("EulerAncestralDiscreteScheduler", ""),
    "heun": ("HeunDiscreteScheduler", ""),
    "lms": ("LMSDiscreteScheduler", ""),
}
_ALGORITHMS: Mapping[str, pb.SolverAlgorithm] = {
    "none": pb.SOLVER_ALGORITHM_UNSPECIFIED,
    "dpmsolver++": pb.SOLVER_ALGORITHM_DPMSOLVER_PLUS_PLUS,
    "sde-dpmsolver++": pb.SOLVER_ALGORITHM_SDE_DPMSOLVER_PLUS_PLUS,
    _SDE: pb.SOLVER_ALGORITHM_SDE_DPMSOLVER_PLUS_PLUS,
}
"""Three plus signs are the documentation's spelling of the stochastic variant."""
_BY_LOWER = {name.lower(): name for name in SCHEDULERS}


@dataclass(frozen=True, slots=True)
class Choice:
    """A scheduler as it was asked for.

    Attributes:
        name: its name in this dialect.
        karras: Karras' noise levels are part of the name that was used; None: nothing was said.
        algorithm: variant that is part of that name; "": none.
    """

    name: str
    karras: bool | None = None
    algorithm: str = ""

    @property
    def row(self) -> Row:
        """What it means."""
        return SCHEDULERS[self.name]


def choice_of(given: str) -> Choice:
    """A scheduler by either kind of name, in any case.

    Raises:
        InvalidSpec: there is none of this name here.
    """
    word = " ".join(given.lower().split())
    if word in _BY_LOWER:
        return Choice(_BY_LOWER[word])
    plain = word.removesuffix(_KARRAS)
    if plain in _OTHER_NAMES:
        name, algorithm = _OTHER_NAMES[plain]
        return Choice(name, plain != word, algorithm)
    raise InvalidSpec("must be one of " + ", ".join(SCHEDULERS), "scheduler")


def algorithm_of(given: str) -> pb.SolverAlgorithm:
    """A variant of the DPM-Solver family.

    Raises:
        InvalidSpec: there is none of this name.
    """
    found = _ALGORITHMS.get(given.strip().lower())
    if found is None:
        raise InvalidSpec("must be one of " + ", ".join(_ALGORITHMS), "algorithm_type")
    return found


def list_body() -> dict[str, Any]:
    """The names that are served."""
    return {"status": "success", "schedulers": list(SCHEDULERS)}
