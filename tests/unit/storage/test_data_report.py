"""What is reported of an import: whole counts, bounded names."""

from pathlib import Path

from likeness.storage.v1.artifact_pb2 import DatasetReport, FindingKind

from services.domain.findings import MAX_FINDING_FILES
from services.storage.captions import Description, Source
from services.storage.data_report import (
    MAX_LISTED_FILES,
    MAX_NAMED_FILES,
    report_of,
    warnings_of,
)
from services.storage.decoding import Decoded, DecodedImage, SkippedFile
from services.storage.images import RefusalKind


def image(
    name: str, digest: str = "", source: Source | None = None, **found: tuple[str, ...]
) -> DecodedImage:
    description = Description(text="x", source=source) if source else None
    return DecodedImage(name, Path("x.png"), digest or name, 1, 64, 64, "PNG", description, **found)


def names(count: int, ending: str) -> list[str]:
    return [f"{number:05d}.{ending}" for number in range(count)]


def test_a_report_counts_all_and_names_the_first() -> None:
    many = MAX_LISTED_FILES + 7
    decoded = Decoded(
        images=[image(name, "same", Source.TEXT, changes=("became white",)) for name in names(many, "png")],
        skipped=[SkippedFile(name, RefusalKind.OTHER, "is not a picture") for name in names(many, "pdf")],
        ignored=3,
    )
    report = report_of(decoded)
    assert (report.read, report.ignored, report.skipped_count, report.duplicate_count) == (
        many,
        3,
        many,
        many - 1,
    )
    assert (len(report.skipped), len(report.duplicates)) == (MAX_LISTED_FILES, MAX_LISTED_FILES)
    assert report.duplicates[0] == "00001.png"
    (found,) = report.findings
    assert (found.kind, found.count) == (FindingKind.FINDING_KIND_PICTURE_CHANGED, many)
    assert [file.id for file in found.files] == names(MAX_FINDING_FILES, "png")
    warnings = warnings_of(decoded, report)
    assert len(warnings) == 3 * (MAX_NAMED_FILES + 1)
    assert warnings[MAX_NAMED_FILES] == f"and {many - MAX_NAMED_FILES} more like this"
    assert warnings[-1] == f"and {many - MAX_NAMED_FILES} more like this"


def test_a_file_with_two_faults_counts_once() -> None:
    decoded = Decoded(images=[image("a.png", faults=("one", "two")), image("b.png", faults=("three",))])
    (found,) = report_of(decoded).findings
    assert found.count == 2
    assert [(file.id, file.detail) for file in found.files] == [
        ("a.png", "one"),
        ("a.png", "two"),
        ("b.png", "three"),
    ]


def test_a_faultless_import_has_a_short_report_and_no_warning() -> None:
    decoded = Decoded(images=[image("a.png")])
    assert report_of(decoded) == DatasetReport(read=1)
    assert warnings_of(decoded, report_of(decoded)) == []
