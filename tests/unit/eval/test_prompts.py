"""The fixed list of prompts, and what the prompts of subjects say."""

import random
from collections import Counter

from models.pocket.figures import FIGURES, SUBJECTS, resembles_subject
from models.pocket.scenes import BACKGROUNDS, PLACES, WORDS, held_out
from tests.eval.prompts import GROUPS, text_prompts
from tests.eval.recipes import INSTANCE_PICTURES, SUBJECT_NAMES
from tests.eval.subjects import (
    asked_of,
    asked_of_class,
    asked_of_others,
    instance_scenes,
    scene_of,
    subjects,
)


def test_the_list_is_the_same_each_time_and_has_no_prompt_twice() -> None:
    texts = [prompt.text for prompt in text_prompts()]
    assert texts == [prompt.text for prompt in text_prompts()]
    assert len(set(texts)) == len(texts) == 300


def test_every_prompt_asks_for_combinations_that_are_never_trained() -> None:
    for prompt in text_prompts():
        assert all(
            held_out(thing.colour, thing.noun, prompt.scene.background) for thing in prompt.scene.things
        ), prompt.text


def test_every_word_is_in_the_grammar() -> None:
    for prompt in text_prompts():
        assert set(prompt.text.split()) <= set(WORDS), prompt.text


def test_the_prompt_says_what_its_scene_shows() -> None:
    for prompt in text_prompts():
        words = prompt.text.split()
        for thing in prompt.scene.things:
            assert thing.colour in words
            assert any(word.startswith(thing.noun) for word in words)
        assert prompt.scene.background in prompt.text
        if prompt.size:
            assert prompt.size == prompt.scene.size
            assert prompt.size in words
        if prompt.position:
            assert prompt.position == prompt.scene.position
            assert prompt.position in words


def test_every_background_and_noun_is_asked_for() -> None:
    prompts = text_prompts()
    assert {prompt.scene.background for prompt in prompts} == set(BACKGROUNDS)
    nouns = Counter(prompt.scene.things[0].noun for prompt in prompts)
    assert min(nouns.values()) >= 10


def test_the_first_prompts_are_a_fair_part_of_all() -> None:
    counts = Counter(prompt.group for prompt in text_prompts(60))
    assert all(abs(counts[group] - count / 5) <= 1 for group, (count, _) in GROUPS.items())


def test_each_subject_has_twelve_prompts_with_all_places_sizes_and_sides() -> None:
    for subject in subjects(tuple(SUBJECTS)):
        asked = asked_of(subject)
        assert len({entry.text for entry in asked}) == len(asked) == 12
        assert set(PLACES) <= {entry.background for entry in asked}
        assert {"small", "big"} <= {entry.size for entry in asked}
        assert {"left", "right"} <= {entry.position for entry in asked}
        assert any(entry.second for entry in asked)
        assert all(f"sks {subject.noun}" in entry.text for entry in asked)
        assert all(entry.background in entry.text and entry.size in entry.text for entry in asked)


def test_prompts_for_leaks_do_not_name_the_subject() -> None:
    for subject in subjects():
        others = asked_of_others(subject)
        assert {entry.noun for entry in others} == set(FIGURES) - {subject.noun}
        assert not [entry for entry in asked_of_class(subject) + others if "sks" in entry.text]


def test_a_scene_shows_what_is_asked() -> None:
    for subject in subjects():
        for asked in asked_of(subject):
            scene = scene_of(asked, random.Random(1), subject.features)
            assert scene.background == asked.background
            assert (scene.things[0].noun, scene.things[0].features) == (subject.noun, subject.features)
            assert (scene.size, scene.position) == (asked.size, asked.position or scene.position)
            rest = [(thing.noun, thing.colour) for thing in scene.things[1:]]
            assert rest == ([asked.second] if asked.second else [])


def test_without_an_individual_another_one_stands_there() -> None:
    for subject in subjects():
        for asked in asked_of(subject):
            features = scene_of(asked, random.Random(1), None).things[0].features
            assert features is not None
            assert not resembles_subject(subject.noun, features)


def test_subjects_are_learned_from_pictures_on_different_backgrounds() -> None:
    assert len(SUBJECT_NAMES) >= 6
    for subject in subjects():
        scenes = instance_scenes(subject)
        assert len({scene.background for scene in scenes}) == len(scenes) == INSTANCE_PICTURES
        assert {scene.things[0].features for scene in scenes} == {subject.features}
        assert scenes == instance_scenes(subject)
