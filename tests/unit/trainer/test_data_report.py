"""The data report as a trainer completes it."""

from pathlib import Path
from typing import Any

from likeness.storage.v1.artifact_pb2 import DatasetFinding, DatasetReport, FindingFile, FindingKind

from services.domain.findings import MAX_FINDING_FILES
from services.trainer.buckets import Size, bucket_sizes
from services.trainer.captioned import CaptionedPlan
from services.trainer.captions import CaptionedPicture, UseRules
from services.trainer.data_report import MAX_NAMED, completed, remarks, summary


def picture(name: str, width: int = 600, height: int = 600, **said: Any) -> CaptionedPicture:
    text = said.pop("text", name)
    size = Size(width, height)
    return CaptionedPicture(f"0/instance/{name}", Path("x"), text, 0, 7, name, size, text=text, **said)


def report_on(
    *pictures: CaptionedPicture, report: DatasetReport | None = None, **found: Any
) -> DatasetReport:
    plan = CaptionedPlan(
        pictures,
        seed=1,
        buckets=bucket_sizes(512),
        train_batch_size=1,
        gradient_accumulation_steps=1,
        epochs=1,
        rules=UseRules(),
    )
    found = {"lost_words": {}, "never_used": plan.never_used} | found
    return completed(report or DatasetReport(read=len(pictures)), plan.assignments, **found)


def findings(report: DatasetReport) -> dict[FindingKind, list[tuple[str, str]]]:
    return {found.kind: [(file.id, file.detail) for file in found.files] for found in report.findings}


def test_upscaled_and_much_cropped_pictures_are_named() -> None:
    report = report_on(
        picture("fits.png"),
        picture("flat.png", 6000, 1000),
        picture("small.png", 300, 300),
        picture("narrow.png", 300, 1000),
    )
    assert findings(report) == {
        FindingKind.FINDING_KIND_UPSCALED: [("small.png", "300x300 to 512x512")],
        FindingKind.FINDING_KIND_CROPPED: [("flat.png", "33%")],
    }
    assert remarks(report) == [
        "small.png: it is smaller than the size it is trained at and was enlarged: 300x300 to 512x512",
        "flat.png: it is so narrow or so flat that much of it is cropped away: 33%",
    ]


def test_sizes_are_counted() -> None:
    report = report_on(
        picture("a.png"), picture("b.png"), picture("c.png", 1000, 600), picture("d.png", 600, 1000)
    )
    assert [(size.width_px, size.height_px, size.images) for size in report.buckets] == [
        (384, 640, 1),
        (512, 512, 2),
        (640, 384, 1),
    ]


def test_a_truncated_caption_is_named_with_what_it_loses() -> None:
    long = picture("long.png", text="a robot, and so on, to the end", max_caption_chars=20)
    report = report_on(picture("short.png"), long, lost_words={"a robot, and so on": "so on"})
    assert remarks(report) == ['long.png: its caption is too long; not used: "so on"']


def test_pictures_left_out_are_named_by_their_own_names() -> None:
    broken, faint = picture("broken.png"), picture("x/faint.png", multiplier=0.2)
    report = report_on(picture("good.png"), broken, faint, unusable=[broken.sample_id])
    assert findings(report) == {
        FindingKind.FINDING_KIND_NOT_ENCODED: [("broken.png", "")],
        FindingKind.FINDING_KIND_NEVER_USED: [("x/faint.png", "")],
    }


def test_what_storage_reported_stays_and_is_not_told_twice() -> None:
    storage = DatasetReport(
        read=1,
        skipped_count=2,
        duplicate_count=1,
        findings=[
            DatasetFinding(
                kind=FindingKind.FINDING_KIND_PICTURE_CHANGED,
                count=1,
                files=[FindingFile(id="small.png", detail="transparent parts became white")],
            )
        ],
    )
    before = DatasetReport.FromString(storage.SerializeToString())
    report = report_on(picture("small.png", 100, 100), report=storage)
    assert [found.kind for found in report.findings] == [
        FindingKind.FINDING_KIND_PICTURE_CHANGED,
        FindingKind.FINDING_KIND_UPSCALED,
    ]
    assert len(remarks(report)) == 1
    assert storage == before
    assert summary(report) == (
        "1 pictures read (1 at 512x512), 2 files skipped, 1 duplicates, 1 changed, 1 enlarged"
    )


def test_names_are_bounded_and_counts_are_whole() -> None:
    many = [picture(f"{number:04d}.png", 100, 100) for number in range(MAX_FINDING_FILES + 50)]
    report = report_on(*many)
    (found,) = report.findings
    assert (found.count, len(found.files)) == (len(many), MAX_FINDING_FILES)
    assert len(remarks(report)) == MAX_NAMED + 1
    assert remarks(report)[-1] == f"and {len(many) - MAX_NAMED} more like this"


def test_every_kind_of_finding_has_words() -> None:
    kinds = [name for name, number in FindingKind.items() if number]
    for kind in kinds:
        report = DatasetReport(read=3, findings=[DatasetFinding(kind=kind, count=2)])
        assert summary(report).startswith("3 pictures read, 2 ")
