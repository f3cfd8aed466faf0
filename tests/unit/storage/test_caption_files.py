"""Texts beside pictures and in their folders: which count, and what damaged or hostile ones do."""

import json
import random
import time

import pytest

from services.storage.caption_files import (
    EMPTY,
    MAX_FILE_BYTES,
    CaptionFiles,
    DescriptionFault,
    is_sidecar,
    read_caption,
    read_yaml,
    sidecar_names,
)
from services.storage.captions import MAX_CAPTION_CHARS, MAX_TAGS, Description, Source, Tag


class Files:
    """An archive's texts, and how often each is read."""

    def __init__(self, files: dict[str, str | bytes]) -> None:
        self.files = {name: body.encode() if isinstance(body, str) else body for name, body in files.items()}
        self.read: list[str] = []
        self.captions = CaptionFiles(self.files, self._read)

    def _read(self, name: str) -> bytes:
        self.read.append(name)
        return self.files[name]

    def of(self, picture: str) -> Description:
        return self.captions.describe(picture)[0]

    def warnings(self, picture: str) -> list[str]:
        return self.captions.describe(picture)[1]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "b.caption", "local.yaml", "x.yml", "x.json"])
def test_describing_files_are_told_from_pictures(name: str) -> None:
    assert is_sidecar(name)
    assert not is_sidecar(f"{name}.png")


def test_files_beside_a_picture_are_looked_for_strongest_first() -> None:
    assert sidecar_names("a/b.png") == (["a/b.yaml", "a/b.yml"], ["a/b.caption", "a/b.txt", "a/b.png.txt"])


def test_each_source_gives_way_to_the_stronger_one() -> None:
    files: dict[str, str | bytes] = {
        "x/a_1.yaml": "caption: by yaml",
        "x/a_1.caption": "by caption",
        "x/a_1.txt": "by txt",
        "x/a_1.png.txt": "by png.txt",
        "x/local.yaml": "caption: by local",
        "x/global.yaml": "caption: by global",
        "global.yaml": "main_prompt: from the top",
    }
    found = []
    for weakest in [*files, ""]:
        description = Files(files).of("x/a_1.png")
        found.append((description.caption, description.source))
        files.pop(weakest, None)
    assert found == [
        ("by yaml", Source.YAML),
        ("by caption", Source.TEXT),
        ("by txt", Source.TEXT),
        ("by png.txt", Source.TEXT),
        ("by local", Source.FOLDER),
        ("by global", Source.FOLDER),
        ("from the top", Source.FOLDER),
        ("a", Source.FILE_NAME),
    ]


def test_capitals_in_names_do_not_matter() -> None:
    files = Files({"A/PHOTO.TXT": "a hill", "a/Local.YAML": "rating: 2"})
    assert (files.of("a/photo.JPG").text, files.of("a/photo.JPG").rating) == ("a hill", 2.0)


def test_a_yaml_file_says_everything_there_is_to_say() -> None:
    text = """
main_prompt: a robot, from the side
caption: on a hill, at night
tags:
  - blue
  - {tag: tall, weight: 2.5}
  - tag: old
rating: 1.5
max_caption_length: 90
multiply: 2.5
cond_dropout: 0.1
flip_p: 0.5
shuffle_tags: yes
loss_scale: 0.25
batch_id: night
"""
    assert Files({"a.yaml": text}).captions.describe("a.png") == (
        Description(
            main_prompt="a robot, from the side",
            text="on a hill, at night",
            tags=(Tag("blue"), Tag("tall", 2.5), Tag("old")),
            source=Source.YAML,
            rating=1.5,
            max_caption_chars=90,
            multiplier=2.5,
            caption_dropout=0.1,
            flip_probability=0.5,
            shuffle_tags=True,
            loss_scale=0.25,
            batch_id="night",
        ),
        [],
    )


def test_yaml_without_words_leaves_them_to_the_text_beside_it() -> None:
    files = Files({"a.yaml": "rating: 3\ntags: [tall, old]", "a.txt": "a robot, old"})
    found = files.of("a.png")
    assert (found.caption, found.rating, found.source) == ("a robot, old, tall", 3.0, Source.TEXT)


def test_values_that_look_like_numbers_dates_or_truths_stay_text() -> None:
    description, warnings = read_yaml(
        b"caption: no\nmain_prompt: 2024-01-01\ntags: [1, 2.50, true, ~]", Source.YAML
    )
    assert (description.main_prompt, description.text) == ("2024-01-01", "no")
    assert description.tags == (Tag("1"), Tag("2.50"), Tag("true"))
    assert warnings == []


def test_tags_may_be_one_text_with_commas() -> None:
    assert read_yaml(b"tags: 'tall, old,, blue'", Source.YAML)[0].tags == (
        Tag("tall"),
        Tag("old"),
        Tag("blue"),
    )


def test_folder_files_reach_as_far_as_their_names_say() -> None:
    files = Files(
        {
            "global.yaml": "rating: 1.5\ntags: [top]",
            "x/global.yaml": "tags: [inner]",
            "x/local.yaml": "flip_p: 0.5\ntags: [here]",
            "x/multiply.txt": "3",
        }
    )
    inside, below, outside = files.of("x/a.png"), files.of("x/y/a.png"), files.of("a.png")
    assert [tag.text for tag in inside.tags] == ["here", "inner", "top"]
    assert (inside.rating, inside.flip_probability, inside.multiplier) == (1.5, 0.5, 3.0)
    assert [tag.text for tag in below.tags] == ["inner", "top"]
    assert (below.rating, below.flip_probability, below.multiplier) == (1.5, None, None)
    assert [tag.text for tag in outside.tags] == ["top"]


def test_the_nearer_setting_wins() -> None:
    files: dict[str, str | bytes] = {
        "x/a.yaml": "multiply: 1",
        "x/multiply.txt": "2",
        "x/local.yaml": "multiply: 3",
        "x/global.yaml": "multiply: 4",
        "global.yaml": "multiply: 5",
    }
    found = []
    for nearest in list(files):
        found.append(Files(files).of("x/a.png").multiplier)
        del files[nearest]
    assert found == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert Files(files).of("x/a.png").multiplier is None


@pytest.mark.parametrize(
    ("file", "body", "field", "value"),
    [
        ("multiply.txt", "2.5\n", "multiplier", 2.5),
        ("multiply.txt", "0", "multiplier", 0.0),
        ("cond_dropout.txt", "\ufeff0.2", "caption_dropout", 0.2),
        ("flip_p.txt", "1", "flip_probability", 1.0),
        ("loss_scale.txt", "1e-1", "loss_scale", 0.1),
        ("batch_id.txt", " night \n", "batch_id", "night"),
        ("shuffle_tags.txt", "true", "shuffle_tags", True),
        ("shuffle_tags.txt", "", "shuffle_tags", True),
        ("shuffle_tags.txt", "off", "shuffle_tags", False),
    ],
)
def test_each_setting_may_stand_in_a_file_of_its_own(file: str, body: str, field: str, value: object) -> None:
    files = Files({f"x/{file}": body})
    assert getattr(files.of("x/a.png"), field) == value
    assert getattr(files.of("a.png"), field) is None
    assert files.captions.remarks == []


@pytest.mark.parametrize(
    ("file", "body", "why"),
    [
        ("multiply.txt", "-1", "is not a number from 0 to 1000"),
        ("multiply.txt", "1000000", "is not a number from 0 to 1000"),
        ("multiply.txt", "nan", "is not a number from 0 to 1000"),
        ("multiply.txt", "two", "is not a number from 0 to 1000"),
        ("cond_dropout.txt", "1.1", "is not a number from 0 to 1"),
        ("flip_p.txt", "", "is not a number from 0 to 1"),
        ("loss_scale.txt", "inf", "is not a number from 0 to 100"),
        ("batch_id.txt", "x" * 65, "is not a name of 1 to 64 characters"),
        ("shuffle_tags.txt", "perhaps", "is neither true nor false"),
        ("multiply.txt", "2\0", "is not text"),
        ("global.yaml", "- a\n- b", "is not a mapping of keys to values"),
        ("local.yaml", "a: [", "is not valid YAML"),
    ],
)
def test_a_folder_file_that_is_not_understood_is_remarked_upon_once(file: str, body: str, why: str) -> None:
    files = Files({f"x/{file}": body, "x/local.yml": "tags: [kept]"})
    assert files.of("x/a.png").tags == (Tag("kept"),)
    assert (files.of("x/a.png").multiplier, files.warnings("x/a.png")) == (None, [])
    assert files.captions.remarks == [(f"x/{file}", f"{why}; it was ignored")]


def test_folder_files_are_read_once_however_many_pictures_there_are() -> None:
    files = Files({"global.yaml": "rating: 2", "x/multiply.txt": "2"})
    for number in range(50):
        files.of(f"x/{number}.png")
    assert sorted(files.read) == ["global.yaml", "x/multiply.txt"]


def test_names_of_folder_files_are_nobody_s_caption() -> None:
    files = Files({"multiply.txt": "2", "local.yaml": "rating: 2"})
    assert files.of("multiply.png").caption == "multiply"
    assert files.of("local.png").caption == "local"


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("colour: blue", "'colour' is not a known key and was ignored"),
        ("multiply: [2]", "'multiply' is not text and was ignored"),
        ("multiply: lots", "'multiply' is not a number from 0 to 1000 and was ignored"),
        ("rating: 0", "'rating' is not a number above 0 up to 1000 and was ignored"),
        (
            "max_caption_length: 1.5",
            "'max_caption_length' is not a whole number from 1 to 10000 and was ignored",
        ),
        (
            "max_caption_length: 0",
            "'max_caption_length' is not a whole number from 1 to 10000 and was ignored",
        ),
        (
            f"max_caption_length: {'9' * 5000}",
            "'max_caption_length' is not a whole number from 1 to 10000 and was ignored",
        ),
        ("main_prompt: {a: b}", "'main_prompt' is not text and was ignored"),
        ("tags: {a: b}", "'tags' is not a list and was ignored"),
        ("tags: [[a], kept]", "has a tag that is not text; it was ignored"),
        (
            "tags: [{tag: a, weight: -1}, kept]",
            "has a tag that is not a number above 0 up to 1000; it was ignored",
        ),
        (f"tags: ['{'x' * 501}', kept]", "has a tag that is longer than 500 characters; it was ignored"),
    ],
)
def test_a_key_that_is_not_understood_costs_itself_only(line: str, warning: str) -> None:
    files = Files({"a.yaml": f"caption: stays\n{line}"})
    description, warnings = files.captions.describe("a.png")
    assert description.text == "stays"
    assert warnings == [f"a.yaml: {warning}"]
    assert [tag.text for tag in description.tags] == (["kept"] if "kept" in line else [])


def test_an_absent_value_says_nothing() -> None:
    files = Files({"a.yaml": "caption:\nrating: ~\ntags: null\nflip_p: 0.5", "a.txt": "by txt"})
    assert files.captions.describe("a.png") == (
        Description(text="by txt", source=Source.TEXT, flip_probability=0.5),
        [],
    )


@pytest.mark.parametrize("name", ["a.yaml", "a.caption", "a.txt", "a.png.txt"])
@pytest.mark.parametrize("body", ["", " \n", "\ufeff"])
def test_an_empty_file_is_an_empty_caption_with_a_warning(name: str, body: str) -> None:
    files = Files({name: body, "local.yaml": "caption: of the folder"})
    description, warnings = files.captions.describe("a.png")
    assert (description.text, description.source is Source.FILE_NAME) == ("", False)
    assert warnings == [EMPTY]


@pytest.mark.parametrize(
    ("data", "caption", "warnings"),
    [
        (b"a robot on a hill", "a robot on a hill", []),
        (b"\xef\xbb\xbfa robot\r\non\ta hill\n", "a robot on a hill", []),
        ("ein Caf\u00e9".encode(), "ein Caf\u00e9", []),
        ("ein Caf\u00e9".encode("cp1252"), "ein Caf\u00e9", ["is not UTF-8 and was read as CP1252"]),
        (b"/etc/passwd", "/etc/passwd", []),
        (
            b"x " * 20_000,
            ("x " * 20_000)[:MAX_CAPTION_CHARS],
            ["is longer than 10000 characters and was cut"],
        ),
    ],
    ids=["plain", "mark and breaks", "utf-8", "cp1252", "path", "long"],
)
def test_a_caption_is_text_whatever_its_encoding(data: bytes, caption: str, warnings: list[str]) -> None:
    assert read_caption(data) == (Description(text=caption, source=Source.TEXT), warnings)


@pytest.mark.parametrize("body", ["/etc/passwd", "b.txt", "../b.txt", "file:///etc/passwd", "b.yaml"])
def test_a_caption_that_is_a_path_is_text_and_nothing_is_opened(body: str) -> None:
    files = Files({"a.txt": body, "b.txt": "the secret", "b.yaml": "caption: the secret"})
    assert files.of("a.png").caption == body
    assert files.read == ["a.txt"]


@pytest.mark.parametrize("data", [b"a\0b", b"x" * (MAX_FILE_BYTES + 1)], ids=["nul", "large"])
def test_what_is_no_text_is_passed_over_for_the_next_source(data: bytes) -> None:
    files = Files({"a.yaml": data, "a.caption": data, "a.txt": "by txt"})
    description, warnings = files.captions.describe("a.png")
    assert description.text == "by txt"
    why = "is not text" if b"\0" in data else f"is larger than {MAX_FILE_BYTES} bytes"
    assert warnings == [f"a.yaml: {why}; it was ignored", f"a.caption: {why}; it was ignored"]


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (ALIASES, "holds aliases"),
        ("tags: &t [a, *t]", "holds aliases"),
        ("[" * 60_000, "is nested more than 8 deep"),
        ("- " * 30_000 + "a", "is nested more than 8 deep"),
        ("{a: " * 15_000, "is nested more than 8 deep"),
        ("? " * 30_000, "is nested more than 8 deep"),
        ("[a]: b", "has a key that is not text"),
        ("a: b\n---\nc: d", "is not valid YAML"),
        ("a: \x07", "is not valid YAML"),
        ("%YAML 9.9\n---\na: b", "is not valid YAML"),
        ("!<" + "x" * 60_000, "is not valid YAML"),
        ('caption: "\\U0011FFFF"', "is not valid YAML"),
        ('caption: "\\UFFFFFFFF"', "is not valid YAML"),
        ("just text", "is not a mapping of keys to values"),
        ("!!python/object/apply:os.system ['touch /tmp/owned']", "is not a mapping of keys to values"),
    ],
    ids=[
        "bomb",
        "loop",
        "flow",
        "block",
        "maps",
        "keys",
        "complex key",
        "two",
        "bell",
        "version",
        "tag",
        "beyond",
        "far beyond",
        "text",
        "object",
    ],
)
def test_hostile_yaml_is_refused_quickly(text: str, why: str) -> None:
    began = time.process_time()
    with pytest.raises(DescriptionFault, match=why):
        read_yaml(text.encode(), Source.YAML)
    assert time.process_time() - began < 5


def test_a_yaml_tag_makes_no_object() -> None:
    text = (
        "caption: !!python/object/apply:os.getcwd []\nrating: !!python/name:os.system 2\ntags: !!set {a, b}"
    )
    description, warnings = read_yaml(text.encode(), Source.YAML)
    assert description == Description(rating=2.0)
    assert warnings == ["'caption' is not text and was ignored", "'tags' is not a list and was ignored"]


def test_hostile_yaml_beside_a_picture_costs_only_what_it_says() -> None:
    files = Files({"a.yaml": ALIASES, "a.txt": "a hill", "global.yaml": ALIASES, "b.txt": "a lake"})
    assert files.captions.describe("a.png") == (
        Description(text="a hill", source=Source.TEXT),
        ["a.yaml: holds aliases; it was ignored"],
    )
    assert files.of("b.png").text == "a lake"
    assert files.captions.remarks == [("global.yaml", "holds aliases; it was ignored")]


def test_tags_beyond_the_limit_are_named_and_left_out() -> None:
    files = Files(
        {
            f"{'x/' * depth}global.yaml": f"tags: [{', '.join(f't{depth}-{n}' for n in range(200))}]"
            for depth in range(4)
        }
    )
    description, warnings = files.captions.describe("x/x/x/a.png")
    assert len(description.tags) == MAX_TAGS
    assert description.tags[0].text == "t3-0"
    assert warnings == [f"has more than {MAX_TAGS} tags; the rest was ignored"]


def test_what_cannot_be_written_or_shown_becomes_a_space() -> None:
    text = 'caption: "a\\uD800b\\0c\\e[31md"\ntags: ["x\\x07y"]\nbatch_id: "n\\u0085m"\n"k\\uDFFF": 1'
    description, warnings = read_yaml(text.encode(), Source.YAML)
    assert description == Description(
        text="a b c [31md", tags=(Tag("x y"),), source=Source.YAML, batch_id="n m"
    )
    assert warnings == ["'k' is not a known key and was ignored"]
    assert read_caption(b"a\x1b[31mb")[0].text == "a [31mb"


def test_mutated_yaml_is_read_or_refused_but_never_fails_otherwise() -> None:
    chance = random.Random(11)
    pieces = [
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        "?",
        "-",
        "&",
        "*",
        "!",
        "|",
        ">",
        "'",
        '"',
        "%",
        "@",
        "`",
        "#",
        "~",
        "\n",
        "\t",
        "1",
        "a",
        "tags",
        "caption",
        "multiply",
        "<<",
    ]
    pieces += [
        "- ",
        ": ",
        "? ",
        "&a ",
        "*a ",
        "!!int ",
        "%YAML 1.1\n",
        "---\n",
        "|\n  ",
        '"\\U0011FFFF"',
        '"\\uD800"',
        "!<%FF>",
    ]
    outcomes = set()
    for _ in range(3000):
        text = "".join(chance.choice(pieces) for _ in range(chance.randint(1, 25)))
        try:
            description, warnings = read_yaml(text.encode(), Source.YAML)
            json.dumps([description.to_message(), warnings], ensure_ascii=False).encode()
            outcomes.add("read")
        except DescriptionFault:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
