"""Texts beside pictures."""

import pytest

from services.storage.captions import caption_names, is_sidecar, read_caption


def test_caption_files_are_looked_for_strongest_first() -> None:
    assert caption_names("a/b.png") == ["a/b.caption", "a/b.txt", "a/b.png.txt"]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "b.caption", "local.yaml", "x.yml", "x.json"])
def test_describing_files_are_told_from_pictures(name: str) -> None:
    assert is_sidecar(name)
    assert not is_sidecar("a.txt.png")


@pytest.mark.parametrize(
    ("data", "caption", "warned"),
    [
        (b"a robot on a hill", "a robot on a hill", False),
        (b"\xef\xbb\xbfa robot\r\non\ta hill\n", "a robot on a hill", False),
        ("ein Caf\u00e9".encode(), "ein Caf\u00e9", False),
        ("ein Caf\u00e9".encode("cp1252"), "ein Caf\u00e9", True),
        (b"", "", True),
        (b" \n ", "", True),
        (b"a\0b", None, True),
        (b"x" * 70_000, None, True),
        (b"/etc/passwd", "/etc/passwd", False),
    ],
)
def test_caption_is_text_whatever_its_encoding(data: bytes, caption: str | None, warned: bool) -> None:
    text, warnings = read_caption(data)
    assert text == caption
    assert bool(warnings) is warned
