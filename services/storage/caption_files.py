"""Text files beside pictures and in their folders: which file speaks of which picture, and reading one.

Beside a picture ``a.png``: ``a.yaml``, ``a.caption``, ``a.txt``, ``a.png.txt``, strongest first. For all pictures of a
folder: single settings (``multiply.txt`` and its kind), then ``local.yaml``, then ``global.yaml`` of this folder and of
those above. Whatever is wrong in such a file is remarked upon and costs what it says, never a picture.

YAML is composed to plain text, lists and mappings and never constructed into objects: tags of a document have no
meaning, aliases are refused (with them a small file unfolds to a huge one), nesting is bounded.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, Final

import yaml

from services.storage.captions import MAX_CAPTION_CHARS, MAX_TAGS, Description, Source, Tag, file_name_caption

MAX_FILE_BYTES: Final = 64 * 1024
MAX_YAML_DEPTH: Final = 8
MAX_TAG_CHARS: Final = 500
MAX_BATCH_ID_CHARS: Final = 64
MAX_MULTIPLIER: Final = 1000.0
MAX_WEIGHT: Final = 1000.0
MAX_LOSS_SCALE: Final = 100.0

EMPTY: Final = "its caption is empty"

_YAML_SUFFIXES: Final = (".yaml", ".yml")
_TEXT_SUFFIXES: Final = (".caption", ".txt")
_IGNORED_SUFFIXES: Final = (".json",)
_LOCAL: Final = ("local.yaml", "local.yml")
_GLOBAL: Final = ("global.yaml", "global.yml")
_NOT_TEXT: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and halves of characters that no encoding can write."""
_YES: Final = frozenset({"true", "yes", "on", "1", ""})  # an empty shuffle_tags.txt is a wish by its presence
_NO: Final = frozenset({"false", "no", "off", "0"})


class DescriptionFault(Exception):
    """Part of a file that is not understood; the text is a sentence part."""


def is_sidecar(name: str) -> bool:
    """Whether a file describes pictures rather than being one."""
    return PurePosixPath(name).suffix.lower() in _YAML_SUFFIXES + _TEXT_SUFFIXES + _IGNORED_SUFFIXES


def sidecar_names(picture: str) -> tuple[list[str], list[str]]:
    """The files that may describe one picture, strongest first: YAML files, then texts.

    Args:
        picture: path of the picture, with slashes.

    Returns:
        ``a/b.yaml``, ``a/b.yml``; and ``a/b.caption``, ``a/b.txt``, ``a/b.png.txt``, for ``a/b.png``. Names that
        speak of whole folders are not among them.
    """
    path = PurePosixPath(picture)
    structured = [str(path.with_suffix(suffix)) for suffix in _YAML_SUFFIXES]
    texts = [*(str(path.with_suffix(suffix)) for suffix in _TEXT_SUFFIXES), f"{picture}.txt"]
    return _of_pictures(structured), _of_pictures(texts)


def read_text(data: bytes) -> tuple[str, list[str]]:
    """Reads a text: UTF-8, with or without a byte order mark, else CP1252.

    Args:
        data: the file's bytes.

    Returns:
        The text as it stands, and warnings.

    Raises:
        DescriptionFault: the file is not text.
    """
    if len(data) > MAX_FILE_BYTES:
        raise DescriptionFault(f"is larger than {MAX_FILE_BYTES} bytes")
    if b"\0" in data:
        raise DescriptionFault("is not text")
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace"), ["is not UTF-8 and was read as CP1252"]


def read_caption(data: bytes) -> tuple[Description, list[str]]:
    """Reads a caption; line breaks become spaces. Arguments, errors as for :func:`read_text`."""
    text, warnings = read_text(data)
    caption, cut = _words(text)
    return Description(text=caption, source=Source.TEXT), warnings + cut + ([] if caption else [EMPTY])


def read_setting(key: str, data: bytes) -> tuple[Description, list[str]]:
    """Reads a file that holds one setting of a folder.

    Args:
        key: which, for instance ``multiply``.
        data: the file's bytes.

    Raises:
        DescriptionFault: the file holds something else.
    """
    text, warnings = read_text(data)
    field, parse = SETTINGS[key]
    return replace(Description(), **{field: parse(text.strip())}), warnings


def read_yaml(data: bytes, source: Source) -> tuple[Description, list[str]]:
    """Reads what a YAML file says; each key that is not understood costs itself only.

    Args:
        data: the file's bytes.
        source: which kind of place the file is at.

    Returns:
        The description, and warnings. A picture's file that is empty is an empty caption.

    Raises:
        DescriptionFault: the file is not YAML, or not a mapping.
    """
    text, warnings = read_text(data)
    content = _composed(text)
    if content is None or content == {}:
        empty = Description(text="", source=source) if source is Source.YAML else Description()
        return empty, [*warnings, EMPTY if source is Source.YAML else "is empty"]
    if not isinstance(content, dict):
        raise DescriptionFault("is not a mapping of keys to values")
    found: dict[str, Any] = {}
    for key, value in content.items():
        try:
            found |= _understood(key, value, warnings)
        except DescriptionFault as fault:
            warnings.append(f"'{_one_line(key)[:40]}' {fault} and was ignored")
    description = Description(**found)
    if not description.has_words:
        return description, warnings
    if not description.caption:
        warnings.append(EMPTY)
    return replace(description, source=source), warnings


class CaptionFiles:
    """All text files of an archive; answers what they say of one picture.

    Attributes:
        remarks: files of folders that were not wholly understood, with what was wrong.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], bytes]) -> None:
        """Reads the files that speak of folders.

        Args:
            names: paths of the text files, with slashes. Capitals do not count: no two differ in them alone.
            read: bytes of one of them; raises DescriptionFault where they cannot be had.

        """
        self._names = {_key(name): name for name in names}
        self._read = read
        self.remarks: list[tuple[str, str]] = []
        self._said = {
            key: self._of_folder(name) for key, name in sorted(self._names.items()) if _is_of_folder(key)
        }

    def describe(self, picture: str) -> tuple[Description, list[str]]:
        """What the files, and at last its own name, say of a picture; and warnings.

        Args:
            picture: path of the picture, with slashes.
        """
        own, warnings = self._beside(picture)
        found = own.over(self._around(picture.rpartition("/")[0]))
        if not found.has_words:
            name = file_name_caption(picture)
            found = replace(found, text=name, source=Source.FILE_NAME)
            warnings += [] if name or found.tags else [EMPTY]
        finished = found.finished()
        if len(finished.tags) > MAX_TAGS:
            warnings.append(f"has more than {MAX_TAGS} tags; the rest was ignored")
        return replace(finished, tags=finished.tags[:MAX_TAGS]), warnings

    def _beside(self, picture: str) -> tuple[Description, list[str]]:
        """YAML and the strongest text that can be read; the text's words count only where YAML has none."""
        structured, texts = sidecar_names(picture)
        found, warnings = Description(), list[str]()
        for name in structured:
            found = found.over(self._try(name, lambda data: read_yaml(data, Source.YAML), warnings))
        for name in texts:
            if not found.has_words:
                found = found.over(self._try(name, read_caption, warnings))
        return found, warnings

    def _try(
        self, name: str, reader: Callable[[bytes], tuple[Description, list[str]]], warnings: list[str]
    ) -> Description:
        stored = self._names.get(_key(name))
        if stored is None:
            return Description()
        label = PurePosixPath(stored).name
        try:
            description, found = reader(self._read(stored))
        except DescriptionFault as fault:
            warnings.append(f"{label}: {fault}; it was ignored")
            return Description()
        warnings += [warning if warning == EMPTY else f"{label}: {warning}" for warning in found]
        return description

    def _of_folder(self, name: str) -> Description:
        base = PurePosixPath(name).name.casefold()
        try:
            if base in _LOCAL + _GLOBAL:
                description, warnings = read_yaml(self._read(name), Source.FOLDER)
            else:
                description, warnings = read_setting(PurePosixPath(base).stem, self._read(name))
        except DescriptionFault as fault:
            self.remarks.append((name, f"{fault}; it was ignored"))
            return Description()
        self.remarks += [(name, warning) for warning in warnings]
        return description

    def _around(self, folder: str) -> Description:
        """What the files of a picture's folder say, and below them those above it."""
        parts = folder.split("/") if folder else []
        found = Description()
        for depth in range(len(parts) + 1):
            found = self._from("/".join(parts[:depth]), _GLOBAL).over(found)
        found = self._from(folder, _LOCAL).over(found)
        return self._from(folder, tuple(f"{key}.txt" for key in FOLDER_SETTINGS)).over(found)

    def _from(self, folder: str, names: Iterable[str]) -> Description:
        found = Description()
        for name in names:
            found = found.over(self._said.get(_key(f"{folder}/{name}" if folder else name), Description()))
        return found


def _of_pictures(names: list[str]) -> list[str]:
    return [name for name in names if not _is_of_folder(_key(name))]


def _is_of_folder(key: str) -> bool:
    name = PurePosixPath(key).name
    return name in _LOCAL + _GLOBAL or name in {f"{setting}.txt" for setting in FOLDER_SETTINGS}


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


class _Composer(yaml.SafeLoader):
    """Composes a document of bounded depth without aliases."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node and what is in it."""
        if self.check_event(yaml.AliasEvent):
            raise DescriptionFault("holds aliases")
        if self._depth == MAX_YAML_DEPTH:
            raise DescriptionFault(f"is nested more than {MAX_YAML_DEPTH} deep")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _composed(text: str) -> Any:
    """A YAML document as text, None, lists and dictionaries; None too for one that holds nothing."""
    try:
        loader = _Composer(text)
        try:
            return _plain(loader.get_single_node())
        finally:
            loader.dispose()
    except DescriptionFault:
        raise
    except Exception as error:
        # Beside its own errors the parser raises those of what it calls, for numbers of characters that do not exist.
        raise DescriptionFault("is not valid YAML") from error


def _plain(node: yaml.Node | None) -> Any:
    match node:
        case yaml.MappingNode():
            return {_key_of(key): _plain(value) for key, value in node.value}
        case yaml.SequenceNode():
            return [_plain(item) for item in node.value]
        case yaml.ScalarNode() if node.tag != "tag:yaml.org,2002:null":
            return str(node.value)
    return None


def _key_of(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise DescriptionFault("has a key that is not text")
    return str(node.value)


def _understood(key: str, value: Any, warnings: list[str]) -> dict[str, Any]:
    """The description's field that a key means, with its value; nothing for an absent value."""
    if value is None:
        return {}
    match key:
        case "main_prompt" | "caption":
            text, cut = _words(_text(value))
            warnings += cut
            return {"main_prompt" if key == "main_prompt" else "text": text}
        case "tags":
            return {"tags": _tags(value, warnings)}
    if key not in SETTINGS:
        raise DescriptionFault("is not a known key")
    field, parse = SETTINGS[key]
    return {field: parse(_text(value))}


def _words(text: str) -> tuple[str, list[str]]:
    words = _one_line(text)
    if len(words) <= MAX_CAPTION_CHARS:
        return words, []
    return words[:MAX_CAPTION_CHARS], [f"is longer than {MAX_CAPTION_CHARS} characters and was cut"]


def _one_line(text: str) -> str:
    return " ".join(_NOT_TEXT.sub(" ", text).split())


def _tags(value: Any, warnings: list[str]) -> tuple[Tag, ...]:
    """Reads a list of texts and of `{tag, weight}`, or one text with commas."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list):
        raise DescriptionFault("is not a list")
    found = []
    for item in items:
        try:
            found += _tag(item)
        except DescriptionFault as fault:
            warnings.append(f"has a tag that {fault}; it was ignored")
    return tuple(found)


def _tag(item: Any) -> list[Tag]:
    weight = None
    if isinstance(item, dict):
        if item.get("weight") is not None:
            weight = _number(0, MAX_WEIGHT, above=True)(_text(item["weight"]))
        item = item.get("tag")
    text = _one_line(_text(item if item is not None else ""))
    if len(text) > MAX_TAG_CHARS:
        raise DescriptionFault(f"is longer than {MAX_TAG_CHARS} characters")
    return [Tag(text, weight)] if text else []


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise DescriptionFault("is not text")
    return value


def _number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    rule = f"is not a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            raise DescriptionFault(rule)
        return value

    return parse


def _whole_number(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if not 1 <= value <= MAX_CAPTION_CHARS:
        raise DescriptionFault(f"is not a whole number from 1 to {MAX_CAPTION_CHARS}")
    return value


def _truth(text: str) -> bool:
    folded = text.strip().lower()
    if folded not in _YES | _NO:
        raise DescriptionFault("is neither true nor false")
    return folded in _YES


def _name(text: str) -> str:
    name = _one_line(text)
    if not 1 <= len(name) <= MAX_BATCH_ID_CHARS:
        raise DescriptionFault(f"is not a name of 1 to {MAX_BATCH_ID_CHARS} characters")
    return name


SETTINGS: Final[Mapping[str, tuple[str, Callable[[str], Any]]]] = {
    "multiply": ("multiplier", _number(0, MAX_MULTIPLIER)),
    "rating": ("rating", _number(0, MAX_WEIGHT, above=True)),
    "cond_dropout": ("caption_dropout", _number(0, 1)),
    "flip_p": ("flip_probability", _number(0, 1)),
    "shuffle_tags": ("shuffle_tags", _truth),
    "loss_scale": ("loss_scale", _number(0, MAX_LOSS_SCALE)),
    "batch_id": ("batch_id", _name),
    "max_caption_length": ("max_caption_chars", _whole_number),
}
"""Keys of a YAML file that are settings: which field of a description each is, and how its text is read."""

FOLDER_SETTINGS: Final = ("multiply", "cond_dropout", "flip_p", "loss_scale", "batch_id", "shuffle_tags")
"""Settings that may also stand in a text file of their own, for all pictures of its folder."""
