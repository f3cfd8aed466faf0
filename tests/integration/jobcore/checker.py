"""What must hold of a job log, whatever happened while it was written. Knows nothing of the code that wrote it."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.domain.job import FINAL_STATES, JobRecord, JobRef, JobState, Phase
from services.domain.ports import JobLog, Revision

LEGAL = {
    JobState.QUEUED: {JobState.RUNNING, JobState.FAILED, JobState.CANCELLED, JobState.TIMED_OUT},
    JobState.RUNNING: {JobState.RUNNING, JobState.QUEUED, *FINAL_STATES},
    JobState.SUCCEEDED: {JobState.DELETED},
    JobState.CANCELLED: {JobState.DELETED},
    JobState.FAILED: {JobState.QUEUED, JobState.DELETED},
    JobState.TIMED_OUT: {JobState.QUEUED, JobState.DELETED},
    JobState.DELETED: set(),
}
PHASE_ORDER = [Phase.PREPARE, Phase.TRAIN, Phase.FINISH]


@dataclass
class Outcomes:
    """What the writers were told, by a mark that each put into its revision's `why`."""

    stored: dict[str, int] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)


async def whole_chain(job_log: JobLog, ref: JobRef) -> list[Revision]:
    """Every revision of a job, oldest first."""
    chain: list[Revision] = []
    while (found := await job_log.next_revision(ref, chain[-1].sequence if chain else 0)) is not None:
        chain.append(found)
    return chain


def violations(chains: Mapping[JobRef, Sequence[Revision]], outcomes: Outcomes) -> list[str]:
    """Everything that is wrong with a log: jobs, and what the writers were told about them."""
    faults = [f"{ref.id}: {fault}" for ref, chain in chains.items() for fault in _job_faults(chain)]
    everything = [revision for chain in chains.values() for revision in chain]
    ids = Counter(revision.record.write for revision in everything)
    faults += [f"write {write} is in the log {number} times" for write, number in ids.items() if number > 1]
    return faults + _untrue_outcomes(everything, outcomes)


def _untrue_outcomes(revisions: Sequence[Revision], outcomes: Outcomes) -> list[str]:
    found: dict[str, int] = {mark_of(revision.record): revision.sequence for revision in revisions}
    lost = [
        f"write {mark} was acknowledged at {at}, and {found.get(mark)} holds it"
        for mark, at in outcomes.stored.items()
        if found.get(mark) != at
    ]
    ghosts = [f"write {mark} was refused, and is in the log" for mark in outcomes.refused if mark in found]
    known = outcomes.stored.keys() | outcomes.unknown
    strangers = [f"nobody knows of write {mark}" for mark in found if mark not in known]
    return lost + ghosts + strangers


def mark_of(record: JobRecord) -> str:
    """The mark of the writer of a revision."""
    return record.why.rpartition("#")[2]


def _job_faults(chain: Sequence[Revision]) -> list[str]:
    if not chain:
        return ["was admitted and is not in the log"]
    faults = [] if chain[0].record.state is JobState.QUEUED else ["does not begin QUEUED"]
    for before, after in itertools.pairwise(chain):
        faults += [f"{fault} (revision {after.sequence})" for fault in _move_faults(before, after)]
    if chain[-1].record.state not in FINAL_STATES:
        faults.append(f"never ended: {chain[-1].record.state} {chain[-1].record.phase}")
    ended = Counter(revision.record.round for revision in chain if revision.record.is_final)
    faults += [f"run {run} ended {number} times" for run, number in ended.items() if number > 1]
    return faults + _stale_results(chain)


def _move_faults(before: Revision, after: Revision) -> list[str]:
    old, new = before.record, after.record
    faults: list[str] = []
    if new.state not in LEGAL[old.state]:
        faults.append(f"{old.state} became {new.state}")
    if new.epoch != old.epoch and not (old.ready and new.epoch == before.sequence and new.worker):
        faults.append(f"epoch {old.epoch} became {new.epoch} without a taking")
    if old.is_final != (new.round == old.round + 1):
        faults.append(f"run {old.round} of a job in {old.state} was followed by run {new.round}")
    if new.spec != old.spec:
        faults.append("the specification changed")
    if old.worker and (new.epoch, new.worker) == (old.epoch, old.worker):
        faults += _owner_faults(old, new)
    same_training = new.round == old.round and old.phase in PHASE_ORDER
    if same_training and PHASE_ORDER.index(new.phase) < PHASE_ORDER.index(old.phase):
        faults.append(f"phase {old.phase} became {new.phase}")
    return faults


def _owner_faults(old: JobRecord, new: JobRecord) -> list[str]:
    faults = []
    if new.reported not in (old.reported, old.reported + 1):
        faults.append(f"reports went from {old.reported} to {new.reported}")
    if new.checkpoint != old.checkpoint and new.reported == old.reported:
        faults.append("the checkpoint changed without a report")
    if old.checkpoint is not None and new.checkpoint is None:
        faults.append("the checkpoint was dropped")
    return faults


def _stale_results(chain: Sequence[Revision]) -> list[str]:
    """A result must come from the newest taking before it."""
    faults, newest = [], 0
    for before, after in itertools.pairwise(chain):
        if before.record.ready and after.record.worker:
            newest = before.sequence
        if after.record.state is JobState.SUCCEEDED and after.record.epoch != newest:
            faults.append(f"succeeded under epoch {after.record.epoch}, and {newest} owned it")
    return faults
