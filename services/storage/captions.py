"""Text files beside pictures: which file belongs to which picture, and reading one.

Captions are text and nothing else: a caption that happens to be a path is never opened.
"""

from pathlib import PurePosixPath
from typing import Final

MAX_CAPTION_BYTES: Final = 64 * 1024
_SIDECAR_SUFFIXES: Final = (".caption", ".txt")
_IGNORED_SUFFIXES: Final = (".yaml", ".yml", ".json")


def is_sidecar(name: str) -> bool:
    """Whether a file describes pictures rather than being one."""
    return PurePosixPath(name).suffix.lower() in _SIDECAR_SUFFIXES + _IGNORED_SUFFIXES


def caption_names(picture: str) -> list[str]:
    """The files that may hold a picture's caption, strongest first.

    Args:
        picture: path of the picture, with slashes.

    Returns:
        ``a/b.caption``, ``a/b.txt``, ``a/b.png.txt`` for ``a/b.png``.
    """
    path = PurePosixPath(picture)
    return [str(path.with_suffix(suffix)) for suffix in _SIDECAR_SUFFIXES] + [f"{picture}.txt"]


def read_caption(data: bytes) -> tuple[str | None, list[str]]:
    """Reads a caption: UTF-8, with or without a byte order mark, else CP1252; line breaks become spaces.

    Args:
        data: the file's bytes.

    Returns:
        The caption, None when the file is not text, and warnings.
    """
    if len(data) > MAX_CAPTION_BYTES or b"\0" in data:
        return None, ["its caption file is not text and was ignored"]
    warnings = []
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
        warnings.append("its caption is not UTF-8 and was read as CP1252")
    caption = " ".join(text.split())
    if not caption:
        warnings.append("its caption is empty")
    return caption, warnings
