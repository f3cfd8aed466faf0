"""One training, killed again and again at random moments, held to the bits of the same training left alone.

Every attempt after the first goes on either on the same machine, from the checkpoints in its work folder and beside
whatever the dead one left there, or on another, from the newest checkpoint that was reported.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.adapters.manifests import digest_of
from services.domain.artifacts import digest_of_key
from tests.chaos.nursery import Nursery
from tests.chaos.points import PHASES, Kill
from tests.chaos.scenarios import STEPS

STATE_FILES = ("weights.safetensors", "optimizer.safetensors", "average.safetensors")


@dataclass(frozen=True, slots=True)
class Reference:
    """What the undisturbed training came to.

    Attributes:
        moments: passed in each phase.
        trace: loss, learning rate and gradient norm by update, as exact text.
        files: digests of the published files.
        state: digests of the last checkpoint's weights, moments and averages, and its counters.
    """

    moments: Mapping[str, int]
    trace: Mapping[int, Any]
    files: Mapping[str, str]
    state: Mapping[str, Any]


@dataclass(slots=True)
class Death:
    """One kill that took place.

    Attributes:
        stays: the attempt that died went on on the machine of the one before it.
        reached: the last update that any attempt had told when it died.
    """

    kill: Kill
    stays: bool
    reached: int


@dataclass(slots=True)
class Campaign:
    """What became of it.

    Attributes:
        differences: in what the disturbed training differs from the undisturbed one; there must be none.
    """

    deaths: list[Death] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Place:
    """Where campaigns are made.

    Attributes:
        nursery: makes the attempts.
        scenario: name of the training.
        model_folder: base model.
        folder: for data and all campaigns.
    """

    nursery: Nursery
    scenario: str
    model_folder: Path
    folder: Path

    def order(self, campaign: Path, workdir: str, *, stays: bool = False, kill: Kill | None = None) -> Any:
        (campaign / workdir).mkdir(parents=True, exist_ok=True)
        planned = {"phase": kill.phase, "moment": kill.moment} if kill else None
        return {
            "scenario": self.scenario,
            "model_folder": str(self.model_folder),
            "data_folder": str(self.folder / "data"),
            "folder": str(campaign),
            "workdir": str(campaign / workdir),
            "stays": stays,
            "kill": planned,
        }


def undisturbed(place: Place) -> Reference:
    """Trains once without a kill."""
    folder = place.folder / "undisturbed"
    status = place.nursery.attempt(place.order(folder, "machine-0"))
    assert status == 0, f"the undisturbed training ended with {status}"
    result = json.loads((folder / "result.json").read_text())
    trace = dict(_trace(folder))
    assert list(trace) == list(range(1, STEPS + 1))
    return Reference(result["moments"], trace, result["files"], _last_state(folder))


def disturbed(place: Place, reference: Reference, seed: int, kills: int) -> Campaign:
    """Trains with so many kills, at moments that the seed decides, and compares.

    Args:
        place: where, and what.
        reference: the undisturbed training.
        seed: decides moments and machines.
        kills: from 4 on each phase has one.
    """
    choice, folder = random.Random(seed), place.folder / f"seed-{seed}"
    phases = _phases(choice, kills)
    campaign, machine = Campaign(), 0
    for _ in range(3 * kills):
        stays = machine > 0 and choice.random() < 0.5
        machine += not stays
        kill = _plan(choice, phases, reference, _steps_left(folder, machine, stays))
        order = place.order(folder, f"machine-{machine}", stays=stays, kill=kill)
        status = place.nursery.attempt(order)
        if status not in (0, -9):
            campaign.differences.append(f"an attempt ended with {status} instead of at {kill}")
            return campaign
        # Zero: the training came to its end before that moment. The next attempt begins nearer to the end.
        if status == -9:
            phases.pop(0)
            campaign.deaths.append(Death(kill, stays, max((step for step, _ in _trace(folder)), default=0)))
        if not phases:
            break
    status = place.nursery.attempt(place.order(folder, f"machine-{machine + 1}"))
    campaign.differences += [f"the last attempt ended with {status}"] if status else []
    campaign.differences += [] if status else _differences(folder, reference)
    return campaign


def _phases(choice: random.Random, kills: int) -> list[str]:
    """The phases to die in: the export comes last, since nearly nothing is left to do after it."""
    within: list[str] = []
    while len(within) < kills - 1:
        within += choice.sample(PHASES[:-1], len(PHASES) - 1)
    return [*within[: kills - 1], PHASES[-1]]


def _plan(choice: random.Random, phases: Sequence[str], reference: Reference, steps_left: int) -> Kill:
    """A moment that this attempt will probably pass, and early enough to leave some updates for later kills."""
    phase, later = phases[0], len(phases) - 1
    if phase == "checkpoint" and steps_left == 1:
        phase = "step"
    share = 1.0 if phase == "export" else max(1, steps_left - 1) / STEPS / max(1, later)
    return Kill(phase, choice.randint(1, max(1, int(reference.moments[phase] * share))))


def _steps_left(folder: Path, machine: int, stays: bool) -> int:
    if stays:
        whole = sorted((folder / f"machine-{machine}" / "checkpoints").glob("step-*/manifest.json"))
        return STEPS - (json.loads(whole[-1].read_text())["step"] if whole else 0)
    record = folder / "record.json"
    return STEPS - (json.loads(record.read_text())["step"] if record.exists() else 0)


def _trace(folder: Path) -> Iterator[tuple[int, Any]]:
    path = folder / "trace.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        numbers = json.loads(line)
        yield numbers.pop("step"), numbers


def _last_state(folder: Path) -> dict[str, Any]:
    """What the newest stored checkpoint holds, times left out."""
    key = json.loads((folder / "record.json").read_text())["key"]
    document = json.loads((folder / "store" / key).read_bytes())
    keys = {file["name"]: file["key"] for file in document["files"]}
    state = json.loads((folder / "store" / keys["state.json"]).read_bytes())
    counters = {name: value for name, value in state["counters"].items() if name != "elapsed_s"}
    untimed = {name: state[name] for name in ("schedule", "scaler", "average_updates", "optimizer_scalars")}
    digests = {name: digest_of_key(keys[name]) for name in STATE_FILES}
    return {"step": document["step"], "counters": counters, **digests, **untimed}


def _differences(folder: Path, reference: Reference) -> Iterator[str]:
    result = json.loads((folder / "result.json").read_text())
    steps = set()
    for step, numbers in _trace(folder):
        steps.add(step)
        if numbers != reference.trace[step]:
            yield f"update {step} is {numbers} instead of {reference.trace[step]}"
    if steps != set(reference.trace):
        yield f"updates {sorted(set(reference.trace) - steps)} were never told"
    if result["files"] != reference.files:
        yield "the published files differ"
    state = _last_state(folder)
    yield from (
        f"{name} of the last checkpoint differs" for name in state if state[name] != reference.state[name]
    )
    for path in (folder / "store").rglob("sha256/*"):
        if digest_of(path.read_bytes()) != path.name:
            yield f"the store holds other bytes than promised under {path.name}"
