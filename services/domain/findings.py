"""What is found in the files of a data set, as its report holds it: whole counts, bounded names.

Storage finds what is wrong with files, a trainer what becomes of them in training; both write one report.
"""

from collections.abc import Sequence

from likeness.storage.v1 import artifact_pb2 as pb

MAX_FINDING_FILES = 100

Finding = tuple[str, str]
"""A file's id, and what was found in it, as a sentence part; empty where the kind says all."""


def findings_of(kind: pb.FindingKind, found: Sequence[Finding]) -> list[pb.DatasetFinding]:
    """Returns one kind of finding as the report holds it; nothing where nothing was found.

    Args:
        kind: what it is.
        found: in the order of ids; a file may occur more than once and counts once.
    """
    if not found:
        return []
    files = [pb.FindingFile(id=name, detail=detail) for name, detail in found[:MAX_FINDING_FILES]]
    return [pb.DatasetFinding(kind=kind, count=len({name for name, _ in found}), files=files)]
