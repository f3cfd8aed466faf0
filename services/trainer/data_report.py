"""What became of a data set's files in a training: storage's report, completed with what only a trainer sees.

The report is whole in its counts and bounded in its names; it goes into the run's own report. `remarks` is the same for
people, `summary` in one line.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from likeness.storage.v1 import artifact_pb2 as pb
from likeness.storage.v1.artifact_pb2 import FindingKind as Kind

from services.domain.findings import findings_of
from services.trainer.buckets import MUCH_LOST, Size, is_upscaled, lost_share
from services.trainer.captions import CaptionedPicture, written_caption

MAX_NAMED = 20
"""So many files are named one by one for each kind of remark."""

_SENTENCES = {
    Kind.FINDING_KIND_CAPTION_TRUNCATED: 'its caption is too long; not used: "{detail}"',
    Kind.FINDING_KIND_UPSCALED: "it is smaller than the size it is trained at and was enlarged: {detail}",
    Kind.FINDING_KIND_CROPPED: "it is so narrow or so flat that much of it is cropped away: {detail}",
    Kind.FINDING_KIND_NOT_ENCODED: "left out, it cannot be encoded",
    Kind.FINDING_KIND_NEVER_USED: "never used: the multipliers of its folder add up to next to nothing",
}
_WORDS = {
    Kind.FINDING_KIND_PICTURE_CHANGED: "changed",
    Kind.FINDING_KIND_DESCRIPTION_FAULT: "with faulty descriptions",
    Kind.FINDING_KIND_CAPTION_TRUNCATED: "with captions cut",
    Kind.FINDING_KIND_UPSCALED: "enlarged",
    Kind.FINDING_KIND_CROPPED: "cropped much",
    Kind.FINDING_KIND_NOT_ENCODED: "not encoded",
    Kind.FINDING_KIND_NEVER_USED: "never used",
}


def completed(
    report: pb.DatasetReport,
    assignments: Sequence[tuple[CaptionedPicture, Size]],
    *,
    lost_words: Mapping[str, str],
    unusable: Collection[str] = (),
    never_used: Iterable[CaptionedPicture] = (),
) -> pb.DatasetReport:
    """Returns the report with all that training adds to it.

    Args:
        report: storage's; it is not changed.
        assignments: each picture with the size that it is trained at, in the order of names.
        lost_words: what captions lose because the text encoder reads no more, by caption (`written_caption`).
        unusable: sample ids of pictures that were left out.
        never_used: pictures that no epoch has.
    """
    whole = pb.DatasetReport()
    whole.CopyFrom(report)
    captions = [(picture.name, lost_words.get(written_caption(picture), "")) for picture, _ in assignments]
    found = {
        Kind.FINDING_KIND_CAPTION_TRUNCATED: [(name, lost) for name, lost in captions if lost],
        Kind.FINDING_KIND_UPSCALED: [
            (picture.name, f"{_of(picture.size)} to {_of(bucket)}")
            for picture, bucket in assignments
            if is_upscaled(picture.size, bucket)
        ],
        Kind.FINDING_KIND_CROPPED: [
            (picture.name, f"{lost_share(picture.size, bucket):.0%}")
            for picture, bucket in assignments
            if lost_share(picture.size, bucket) > MUCH_LOST
        ],
        Kind.FINDING_KIND_NOT_ENCODED: [
            (picture.name, "") for picture, _ in assignments if picture.sample_id in unusable
        ],
        Kind.FINDING_KIND_NEVER_USED: [(picture.name, "") for picture in never_used],
    }
    for kind, files in found.items():
        whole.findings.extend(findings_of(kind, files))
    counts = Counter(bucket for _, bucket in assignments)
    whole.buckets.extend(
        pb.BucketCount(width_px=size.width_px, height_px=size.height_px, images=counts[size])
        for size in sorted(counts, key=lambda size: size.ratio)
    )
    return whole


def remarks(report: pb.DatasetReport) -> list[str]:
    """Returns what a trainer found, file by file as far as that is readable; storage has told of the rest already."""
    told = []
    for finding in report.findings:
        sentence = _SENTENCES.get(finding.kind)
        if sentence is None:
            continue
        named = finding.files[:MAX_NAMED]
        told += [f"{file.id}: {sentence.format(detail=file.detail)}" for file in named]
        if finding.count > len(named):
            told.append(f"and {finding.count - len(named)} more like this")
    return told


def summary(report: pb.DatasetReport) -> str:
    """Returns the report in one line, for the log."""
    sizes = ", ".join(f"{bucket.images} at {bucket.width_px}x{bucket.height_px}" for bucket in report.buckets)
    parts = [f"{report.read} pictures read" + (f" ({sizes})" if sizes else "")]
    counts = [(report.skipped_count, "files skipped"), (report.duplicate_count, "duplicates")]
    counts += [(finding.count, _WORDS[finding.kind]) for finding in report.findings if finding.kind in _WORDS]
    return ", ".join(parts + [f"{count} {words}" for count, words in counts if count])


def _of(size: Size) -> str:
    return f"{size.width_px}x{size.height_px}"
