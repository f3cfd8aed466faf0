"""From a caller's input to a TrainingSpec: what all endpoints that train share.

Tables of parameters say which key sets which field of which message. Beside each field is noted how the caller spells
it, so that faults which others find later (the domain's rules, the service that admits the job) reach the caller in
his own words.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from likeness.training.v1 import training_job_pb2 as pb

from services.domain.errors import InvalidSpec, Violation
from services.domain.training_spec import resolve_training_spec
from services.gateway.dialects.base import Submission
from services.gateway.dialects.runpod.parameters import Parameter, Reading, read_object

MAX_DETAILS = 100
"""Faults that one answer lists; a body full of mistakes must not come back larger than it was."""
DRAW = -1
"""The seed that asks for a random one."""
EIGHT_BIT_ADAM: Mapping[bool, int] = {
    True: pb.OPTIMIZER_PRECISION_EIGHT_BIT,
    False: pb.OPTIMIZER_PRECISION_THIRTY_TWO_BIT,
}
"""What a switch for 8-bit moments means."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object's values go.

    Attributes:
        message: the message that they are fields of.
        target: its path in the specification, put before its fields: ``samples[0].``.
        path: its path in the caller's input: ``inference[0].``.
    """

    message: Any
    target: str = ""
    path: str = ""


@dataclass(slots=True)
class Translation:
    """A specification in the making.

    Attributes:
        spec: what has been understood so far.
        draw_seed: gives a random seed.
        faults: broken rules, with the caller's paths.
        ignored: paths of keys that are not known and not minded.
        spelled: the caller's path of each field, by its path in the specification.
    """

    spec: pb.TrainingSpec
    draw_seed: Callable[[], int]
    faults: list[Violation] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    spelled: dict[str, str] = field(default_factory=dict)

    def read(
        self,
        given: Any,
        rows: Sequence[Parameter],
        place: Place,
        known: Iterable[str] = (),
        strict: bool = False,
    ) -> Reading:
        """Reads an object by a table and sets the fields it names.

        Args:
            given: the object as parsed from JSON; anything else is a fault.
            rows: its parameters.
            place: where they go.
            known: further keys, which the endpoint reads itself.
            strict: unknown keys are faults instead of being ignored.

        Returns:
            What was read; its faults and unknown keys are noted already.
        """
        name = place.path.rstrip(".")
        if place.target:
            self.spelled[place.target.rstrip(".")] = name
        if not isinstance(given, dict):
            self.faults.append(Violation(name, "must be an object"))
            return Reading()
        reading = read_object(given, rows, place.path, known)
        self.faults += reading.faults
        if strict:
            self.faults += [Violation(key, "is not a parameter of this endpoint") for key in reading.unknown]
        else:
            self.ignored += reading.unknown
        for row in rows:
            if row.target:
                self._place(row, reading, place)
        return reading

    def read_list(
        self,
        given: Any,
        rows: Sequence[Parameter],
        key: str,
        target: str,
        limits: tuple[int, int],
        strict: bool = False,
    ) -> None:
        """Reads a list of objects into a repeated field.

        Args:
            given: the list as parsed from JSON; None for an absent one.
            rows: parameters of an element.
            key: what the caller calls the list.
            target: the repeated field.
            limits: fewest and most elements.
            strict: as of :meth:`read`.
        """
        self.spelled[target] = key
        least, most = limits
        if given is None:
            self.faults += [Violation(key, "is required")] if least else []
        elif not isinstance(given, list):
            self.faults.append(Violation(key, "must be a list of objects"))
        elif not least <= len(given) <= most:
            self.faults.append(Violation(key, f"must have {least} to {most} elements"))
        for index, element in enumerate(given[:most] if isinstance(given, list) else []):
            message = getattr(self.spec, target).add()
            place = Place(message, f"{target}[{index}].", f"{key}[{index}].")
            self.read(element, rows, place, strict=strict)

    def _place(self, row: Parameter, reading: Reading, place: Place) -> None:
        path = self.spelled[place.target + row.target] = place.path + reading.spelled[row.name]
        if row.name not in reading.values:
            return
        value = reading.values[row.name]
        if row.kind == "seed" and value == DRAW:
            value = self.draw_seed()
        value = row.choices[value] if row.choices else value
        holder = getattr(place.message, row.target)
        if isinstance(holder, pb.ImageSource):
            holder.archive_url, holder.field = value, path
        elif isinstance(value, list):
            holder.extend(value)
        else:
            setattr(place.message, row.target, value)

    def submission(self) -> Submission:
        """What was understood, complete.

        Raises:
            InvalidSpec: with every fault, in the caller's spelling.
        """
        resolved, later = self._resolve()
        if self.faults + later:
            raise InvalidSpec((self.faults + later)[:MAX_DETAILS])
        return Submission(resolved, tuple(self.ignored), self.spelled)

    def _resolve(self) -> tuple[pb.TrainingSpec, list[Violation]]:
        """Applies the domain's rules; what is faulty already, or lies in such a part, is not mentioned twice."""
        named = [fault.field for fault in self.faults]
        try:
            return resolve_training_spec(self.spec), []
        except InvalidSpec as error:
            told = Submission(self.spec, spelled=self.spelled).respelled(error).violations
        return self.spec, [fault for fault in told if not any(_covers(name, fault.field) for name in named)]


def _covers(named: str, path: str) -> bool:
    return path == named or path.startswith((named + ".", named + "["))
