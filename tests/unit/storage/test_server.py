"""What the operator's settings mean for imports."""

import pytest
from pydantic import ValidationError

from services.adapters.settings import StorageSettings
from services.storage.archives import ArchiveLimits
from services.storage.datasets import ImportLimits
from services.storage.server import import_limits


def test_default_settings_are_the_default_limits() -> None:
    assert import_limits(StorageSettings()) == ImportLimits()


def test_each_setting_reaches_its_limit() -> None:
    settings = StorageSettings(
        max_archive_bytes=1,
        max_archive_files=2,
        max_archive_ratio=3.5,
        max_unpacked_bytes=4,
        max_image_pixels=5,
        alpha_background="#0aFF10",
    )
    assert import_limits(settings) == ImportLimits(
        max_archive_bytes=1,
        max_pixels=5,
        background=(10, 255, 16),
        archive=ArchiveLimits(max_files=2, max_ratio=3.5, max_unpacked_bytes=4),
    )


@pytest.mark.parametrize("colour", ["white", "#fff", "#fffffg", "ffffff", "#ffffff "])
def test_a_background_that_is_no_colour_is_refused(colour: str) -> None:
    with pytest.raises(ValidationError, match="must be a colour like #ffffff"):
        StorageSettings(alpha_background=colour)


@pytest.mark.parametrize(
    ("artifacts", "address"),
    [
        ("", None),
        ("folder:/srv/artifacts", None),
        ("s3:https://s3.example.org/likeness", ("https://s3.example.org", "likeness")),
        ("s3:http://127.0.0.1:8333/likeness/", ("http://127.0.0.1:8333", "likeness")),
    ],
)
def test_artifacts_lie_where_the_setting_says(artifacts: str, address: tuple[str, str] | None) -> None:
    assert StorageSettings(artifacts=artifacts).s3_address == address


@pytest.mark.parametrize(
    "artifacts",
    [
        "likeness",
        "s3:likeness",
        "s3:http://s3.example.org",
        "s3:ftp://s3.example.org/likeness",
        "s3:https://key:secret@s3.example.org/likeness",
        "s3:https://s3.example.org/likeness/folder",
    ],
)
def test_a_place_that_is_none_is_refused(artifacts: str) -> None:
    with pytest.raises(ValidationError, match=r"must be folder:PATH or s3:http\(s\)://HOST/BUCKET"):
        StorageSettings(artifacts=artifacts)
