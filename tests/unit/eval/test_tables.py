"""How results are kept, gone on with and shown; a fake takes the place of training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from likeness.training.v1 import training_job_pb2 as pb
from PIL import Image

from models.pocket.drawing import draw
from models.pocket.scenes import Scene, background_phrase
from services.domain.training_spec import resolve_training_spec
from services.gateway.dialects.runpod.dream_booth_v1 import read_input
from services.trainer.support import check_supported
from tests.eval import __main__ as command
from tests.eval import peer, personalisation, report, service, text
from tests.eval.personalisation import Plan
from tests.eval.recipes import (
    CLASS_IMAGES,
    LEARNING_RATE,
    LORA_RANK,
    RECIPES,
    SUBJECT_NAMES,
    TEXT_ENCODER_UPDATES,
    UPDATES,
    Recipe,
    shortened,
)
from tests.eval.service import Learned, path_of, seeds_of
from tests.eval.subjects import Subject, drawn, instance_scenes, subjects

SEEDS = 2


class FakeTeacher:
    """Instead of training it draws what was asked for, the subject or anybody; it counts its trainings."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.taught: list[tuple[str, str]] = []

    def __call__(self, recipe: Recipe, subject: Subject, folder: Path) -> Learned:
        self.taught.append((recipe.name, subject.name))
        folder.mkdir(parents=True, exist_ok=True)
        for index, asked in enumerate(self.plan.asked(subject)):
            for offset in range(self.plan.seeds):
                features = subject.features if asked.kind == "subject" else None
                drawn(asked, offset, features).save(path_of(folder, index, offset))
        return Learned(seconds=12.5, training_seconds=7.25)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(Path("model"), subjects(("robot",)), RECIPES[:2], 2, SEEDS, tmp_path / "cache", None)


def _taught(plan: Plan, teacher: FakeTeacher, recipe: Recipe) -> personalisation.Drawings:
    return personalisation.teach_once(plan, plan.subjects[0], recipe, "0123", teacher)[0]


def test_a_finished_training_is_not_done_again_and_gives_the_same_pictures(plan: Plan) -> None:
    teacher = FakeTeacher(plan)
    first, second = (_taught(plan, teacher, RECIPES[0]) for _ in range(2))
    assert teacher.taught == [(RECIPES[0].name, "robot")]
    assert {key: picture.tobytes() for key, picture in first.items()} == {
        key: picture.tobytes() for key, picture in second.items()
    }


def test_a_training_that_was_cut_off_is_done_again(plan: Plan) -> None:
    def cut_off(recipe: Recipe, subject: Subject, folder: Path) -> Learned:
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path_of(folder, 0, 0))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        personalisation.teach_once(plan, plan.subjects[0], RECIPES[0], "0123", cut_off)
    assert _taught(plan, FakeTeacher(plan), RECIPES[0])[0, 0].size == (512, 512)


def test_another_model_recipe_or_number_of_pictures_is_another_training(plan: Plan) -> None:
    teacher = FakeTeacher(plan)
    changed = replace(RECIPES[0], input={**RECIPES[0].input, "learning_rate": 1e-5})
    for recipe in (RECIPES[0], RECIPES[1], changed):
        _taught(plan, teacher, recipe)
    other_model = personalisation.teach_once(plan, plan.subjects[0], RECIPES[0], "4567", teacher)
    more = replace(plan, seeds=SEEDS + 1)
    _taught(more, FakeTeacher(more), RECIPES[0])
    assert other_model[1] == Learned(12.5, 7.25)
    assert len(teacher.taught) == 4


def test_every_column_has_a_value_for_each_seed_or_training(plan: Plan) -> None:
    subject = plan.subjects[0]
    drawings = _taught(plan, FakeTeacher(plan), RECIPES[0])
    values = personalisation.score_pictures(plan, subject, drawings, Learned(12.5, 7.25))
    assert list(values) == list(personalisation.COLUMNS)
    assert min(values["subject"]) > 0.8
    assert values["prompt"] == [1.0, 1.0]
    assert max(values["class leak"]) < 0.6
    assert max(values["other leak"]) < 0.6
    assert values["diversity"][0] > 30
    assert (values["training s"], values["all s"]) == ([7.25], [12.5])


def test_a_base_that_draws_nothing_scores_nothing(plan: Plan) -> None:
    subject = plan.subjects[0]
    asked = plan.asked(subject)
    empty = {
        (index, offset): draw(Scene((), "pink"))
        for index in range(len(asked))
        for offset in range(plan.seeds)
    }
    values = personalisation.score_pictures(plan, subject, empty, None)
    assert max(values["subject"] + values["class leak"] + values["other leak"] + values["diversity"]) < 0.1
    assert "all s" not in values


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_service_takes_the_request_of_every_recipe(recipe: Recipe) -> None:
    samples = [f"prompt {index}" for index in range(21)]
    prompts = "a photo of a sks robot", "a photo of a robot"
    request = service.request_for(recipe, prompts, "http://127.0.0.1:1/pictures.zip", samples, 3)
    assert not read_input(request["input"], lambda: 0).ignored
    spec = resolve_training_spec(service.spec_of(recipe, request))
    check_supported(spec)
    assert spec.max_train_steps == UPDATES
    assert spec.concepts[0].instance_prompt == prompts[0]
    assert [sample.seed for sample in spec.samples] == [seeds_of(index, 3)[0] for index in range(21)]
    assert all(sample.guidance_scale == 4 and sample.num_images == 3 for sample in spec.samples)


def test_what_http_has_no_words_for_is_asked_by_grpc() -> None:
    specs = {
        recipe.name: service.spec_of(recipe, service.request_for(recipe, ("a", "b"), "http://h/z", ["c"], 2))
        for recipe in RECIPES
        if recipe.spec
    }
    assert specs["LoRA, prior"].method == pb.TRAINING_METHOD_LOCON
    assert specs["LoRA, prior"].lora.rank == LORA_RANK
    assert specs["two schedules, prior"].text_encoder_steps == TEXT_ENCODER_UPDATES < UPDATES
    assert specs["captioned"].recipe == pb.RECIPE_EVERYDREAM


def test_captioned_pictures_say_their_background_and_others_say_nothing() -> None:
    subject = subjects(("cat",))[0]
    scenes = instance_scenes(subject)
    pictures = [(draw(scene), subject.captioned(scene.background)) for scene in scenes]
    plain, captioned = (
        next(recipe for recipe in RECIPES if recipe.captioned is wanted) for wanted in (False, True)
    )
    assert list(service.archive_files(plain, pictures)) == [f"{index}.png" for index in range(5)]
    captions = service.archive_files(captioned, pictures)
    assert [captions[f"{index}.txt"].decode() for index in range(5)] == [
        f"a photo of a sks cat {background_phrase(scene.background)}" for scene in scenes
    ]


def test_the_script_is_told_the_numbers_of_the_recipe_with_a_prior() -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.by == "diffusers")
    twin = next(recipe for recipe in RECIPES if recipe.by == "service")
    assert (recipe.input, recipe.concept) == (twin.input, twin.concept)
    told = peer.arguments_of(recipe, Path("m"), Path("w"), ("a photo of a sks cat", "a photo of a cat"))
    assert {"--with_prior_preservation", "--train_text_encoder", f"--max_train_steps={UPDATES}"} <= set(told)
    assert {f"--learning_rate={LEARNING_RATE}", "--class_prompt=a photo of a cat"} <= set(told)
    assert f"--num_class_images={CLASS_IMAGES}" in told


def test_a_trial_changes_updates_and_class_pictures_alone() -> None:
    for recipe in RECIPES:
        trial = shortened(recipe, 2, 3)
        assert trial.input == {**recipe.input, "max_train_steps": 2}
        assert trial.concept["num_class_images"] == (3 if recipe.input["with_prior_preservation"] else 0)
        assert shortened(recipe, None, None) == recipe


def test_recipes_differ_in_name_and_file_name() -> None:
    assert len({personalisation.slug(recipe.name) for recipe in RECIPES}) == len(RECIPES)


ABOUT = {
    "date": "2026-11-21",
    "model": "some/model",
    "model_digest": "0123456789ab",
    "machine": "2 cores",
    "python": "3.11.0",
    "versions": {"torch": "2.13.0"},
}


def _text_result() -> dict[str, Any]:
    share = {"right": 9, "n": 10, "value": 0.9, "low": 0.596, "high": 0.982}
    return {
        "about": ABOUT | {"seconds_a_picture": 0.25},
        "drawing": {
            "size_px": 512,
            "num_inference_steps": 20,
            "guidance_scale": 4.0,
            "scheduler": "DDIMScheduler",
        },
        "prompts": 10,
        "rows": {"model": dict.fromkeys(text.COLUMNS, share)},
        "by_noun": {"ring": "9/10"},
        "grid": [["a red ring on the beach"]],
    }


def _personalisation_result(plan: Plan) -> dict[str, Any]:
    drawings = _taught(plan, FakeTeacher(plan), RECIPES[0])
    values = personalisation.score_pictures(plan, plan.subjects[0], drawings, Learned(12.5, 7.25))
    return personalisation.tabulate(plan, ABOUT, {RECIPES[0].name: [values], RECIPES[1].name: [values]})


def test_the_page_holds_both_tables_and_is_made_from_the_json_files_alone(plan: Plan, tmp_path: Path) -> None:
    report.write_result(tmp_path, report.TEXT, _text_result())
    report.write_result(tmp_path, report.PERSONALISATION, _personalisation_result(plan))
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").unlink()
    report.write_page(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == page
    assert "| model | 90% (60 to 98, n=10) |" in page
    assert "a red ring on the beach" in page
    assert f"| {RECIPES[0].name} | " in page
    assert "7 (7 to 7)" in page
    assert all(f"**{column}**" in page for column in [*text.COLUMNS, *personalisation.COLUMNS])
    assert (
        max(len(line) for line in page.splitlines() if not line.startswith(("|", "*", "The prompts"))) < 400
    )


def test_results_are_json_with_a_mean_and_an_interval_for_each_column(plan: Plan) -> None:
    result = json.loads(json.dumps(_personalisation_result(plan)))
    cell = result["rows"][RECIPES[0].name]["subject"]
    assert cell["low"] <= cell["value"] <= cell["high"]
    assert cell["n"] == SEEDS
    assert result["by_subject"][RECIPES[0].name]["robot"]["prompt"] == 1.0
    assert len(result["prompts"]["robot"]) == 2 + 4 + 5


def test_only_whole_tables_of_the_released_model_replace_what_is_published() -> None:
    parse = command.parser().parse_args
    whole, other = parse([]), parse(["text", "--model", "elsewhere"])
    assert (whole.what, whole.model, whole.subjects) == ("all", command.RELEASED, SUBJECT_NAMES)
    assert command.out_folder(whole, whole=True) == command.PUBLISHED
    assert command.out_folder(whole, whole=False) == command.UNPUBLISHED
    assert command.out_folder(other, whole=True) == command.UNPUBLISHED
    assert command.out_folder(parse(["text", "--out", "here"]), whole=False) == Path("here")


@pytest.mark.parametrize(
    ("option", "value", "fault"),
    [
        ("--rows", "full, prior; nothing", "no such recipe: nothing"),
        ("--subjects", "robot,dog", "no such subject: dog"),
        ("--seeds", "1", "must be at least 2"),
        ("--prompts", "0", "must be at least 1"),
    ],
)
def test_a_wrong_option_is_refused(
    option: str, value: str, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.parser().parse_args(["personalisation", option, value])
    assert fault in capsys.readouterr().err
