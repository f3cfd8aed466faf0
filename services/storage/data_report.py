"""What became of a source's files: the report that is stored with a data set, and the same for people.

Counts are whole; names are bounded, because an archive of twenty thousand damaged files is reported upon too.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from likeness.storage.v1 import artifact_pb2 as pb
from likeness.storage.v1.artifact_pb2 import CaptionSource, FindingKind

from services.domain.findings import findings_of
from services.storage.captions import Source
from services.storage.decoding import Decoded, DecodedImage

MAX_LISTED_FILES: Final = 1000
MAX_NAMED_FILES: Final = 20
"""So many files are named one by one in the warnings; the report names more."""

CAPTION_SOURCES: Final = {
    None: CaptionSource.CAPTION_SOURCE_UNSPECIFIED,
    Source.YAML: CaptionSource.CAPTION_SOURCE_YAML,
    Source.TEXT: CaptionSource.CAPTION_SOURCE_TEXT,
    Source.FOLDER: CaptionSource.CAPTION_SOURCE_FOLDER,
    Source.FILE_NAME: CaptionSource.CAPTION_SOURCE_FILE_NAME,
}


def report_of(decoded: Decoded) -> pb.DatasetReport:
    """Reports what an import found in its source.

    Args:
        decoded: all of it, in the order of ids.
    """
    twice = duplicates((image.id, image.digest) for image in decoded.images)
    changes = [(image.id, change) for image in decoded.images for change in image.changes]
    faults = [(image.id, fault) for image in decoded.images for fault in image.faults]
    return pb.DatasetReport(
        read=len(decoded.images),
        ignored=decoded.ignored,
        skipped=[pb.SkippedFile(id=file.id, why=file.why) for file in decoded.skipped[:MAX_LISTED_FILES]],
        skipped_count=len(decoded.skipped),
        duplicates=twice[:MAX_LISTED_FILES],
        duplicate_count=len(twice),
        captions=_caption_counts(decoded.images),
        findings=[
            *findings_of(FindingKind.FINDING_KIND_PICTURE_CHANGED, changes),
            *findings_of(FindingKind.FINDING_KIND_DESCRIPTION_FAULT, [*decoded.remarks, *faults]),
        ],
    )


def warnings_of(decoded: Decoded, report: pb.DatasetReport) -> list[str]:
    """What people should know, named file by file as far as that is readable."""
    skipped = [f"{file.id} was skipped: {file.why}" for file in report.skipped]
    twice = [f"{name} has the same pixels as an earlier picture" for name in report.duplicates]
    said = [f"{name}: {why}" for name, why in decoded.remarks]
    changed = [f"{image.id}: {why}" for image in decoded.images for why in (*image.changes, *image.faults)]
    return [
        *_some(skipped, report.skipped_count),
        *_some(twice, report.duplicate_count),
        *_some(said, len(said)),
        *_some(changed, len(changed)),
    ]


def duplicates(digests: Iterable[tuple[str, str]]) -> list[str]:
    """Ids of pictures whose pixels came before.

    Args:
        digests: id and digest of each picture, in order; equal pixels have equal digests.
    """
    seen: set[str] = set()
    found = []
    for name, digest in digests:
        if digest in seen:
            found.append(name)
        seen.add(digest)
    return found


def _caption_counts(images: Sequence[DecodedImage]) -> list[pb.CaptionCount]:
    counts = Counter(CAPTION_SOURCES[image.description.source] for image in images if image.description)
    return [pb.CaptionCount(source=source, images=count) for source, count in sorted(counts.items())]


def _some(sentences: Sequence[str], count: int) -> list[str]:
    """The first sentences, and of how many more there is nothing said."""
    kept = list(sentences[:MAX_NAMED_FILES])
    return kept if count <= MAX_NAMED_FILES else [*kept, f"and {count - MAX_NAMED_FILES} more like this"]
