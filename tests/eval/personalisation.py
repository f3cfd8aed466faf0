"""The personalisation table: teach subjects by several recipes, draw them, judge what came of it.

Pictures are kept in a folder by model, recipe and subject, so that a run that was cut off goes on where it was; they
are judged anew each time. Rows beside the recipes' are anchors: what real drawings score, what is left of them behind
the autoencoder, what another individual of the class scores, and what the untrained base draws.
"""

import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from models.pocket.drawing import draw
from tests.eval import grids, peer, pipelines
from tests.eval.leaks import diversity, palette_overlap
from tests.eval.machine import about_run
from tests.eval.recipes import INSTANCE_PICTURES, Recipe
from tests.eval.service import Learned, Service, path_of, seeds_of
from tests.eval.stats import bootstrap
from tests.eval.subject import score_subject
from tests.eval.subjects import (
    Asked,
    Subject,
    asked_of,
    asked_of_class,
    asked_of_others,
    drawn,
    instance_scenes,
    judge_asked,
)

COLUMNS: dict[str, str] = {
    "subject": "the subject's drawing, searched for in the pictures that name it: 0 to 1",
    "prompt": "share of these in which all else that the prompt says is right: background, size, position, "
    "second thing",
    "class leak": "the same search in pictures of the class word alone; what the untrained base has is chance",
    "other leak": "overlap of the colours of other classes with the subject's; what the untrained base has is chance",
    "diversity": "mean difference of two pictures of one class prompt, thing by thing, 0 to 255; near 0 all are one",
    "training s": "seconds from the request until the trained model is there, class pictures included",
    "all s": "seconds from the request to the last picture",
}
ANCHORS: dict[str, str] = {
    "real drawings": "drawings of the subject that the prompts are true of; of the class, random individuals",
    "round trip": "the same, once through the model's autoencoder: the most a model behind it could reach",
    "another of its class": "the same with random individuals in the subject's place",
    "untrained base": "the base model, asked with the same prompts",
}
GRID_PROMPTS = 6

Drawings = dict[tuple[int, int], Image.Image]
"""Pictures by position of their prompt and their number among its pictures."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run.

    Attributes:
        model: the base, a diffusers folder.
        subjects, recipes: which.
        prompts: for each subject, 1 to 12.
        seeds: pictures of each prompt, 2 or more.
        cache: folder of finished pictures.
        checkout: of diffusers; None leaves its rows out.
    """

    model: Path
    subjects: Sequence[Subject]
    recipes: Sequence[Recipe]
    prompts: int
    seeds: int
    cache: Path
    checkout: Path | None

    def asked(self, subject: Subject) -> list[Asked]:
        """All prompts of a subject, its own first."""
        own = asked_of(subject)[: self.prompts]
        return own + asked_of_class(subject) + asked_of_others(subject)


def evaluate(plan: Plan, out: Path) -> dict[str, Any]:
    """Teaches, draws, judges, and saves one grid of pictures a row.

    Args:
        plan: what to run.
        out: folder for `personalisation-*.png`.

    Returns:
        The table as plain data.
    """
    about = about_run(plan.model)
    rows: dict[str, list[dict[str, list[float]]]] = {}
    grid_rows: dict[str, list[list[Image.Image]]] = {}
    with ExitStack() as stack:
        learn = _learner(plan, stack)
        pipeline = pipelines.load_pipeline(plan.model)
        for subject in plan.subjects:
            taught = _teach_all(plan, subject, str(about["model_digest"]), learn)
            anchors = _anchors(plan, subject, pipeline)
            for row, (drawings, learned) in (taught | anchors).items():
                _say(f"judging {subject.name}: {row}")
                rows.setdefault(row, []).append(score_pictures(plan, subject, drawings, learned))
                first = [drawings[index, 0] for index in range(min(GRID_PROMPTS, plan.prompts))]
                grid_rows.setdefault(row, []).append([draw(instance_scenes(subject)[0]), *first])
    for row in [*(recipe.name for recipe in _offered(plan)), "untrained base"]:
        grids.save(out / f"personalisation-{slug(row)}.png", grid_rows[row])
    return tabulate(plan, about, rows)


def _teach_all(
    plan: Plan, subject: Subject, digest: str, learn: "Learner"
) -> dict[str, tuple[Drawings, Learned | None]]:
    """All recipes. The script works beside the service: each has half of the cores, and each of them always has it."""

    def lane(by: str) -> dict[str, tuple[Drawings, Learned | None]]:
        return {
            recipe.name: teach_once(plan, subject, recipe, digest, learn)
            for recipe in _offered(plan)
            if recipe.by == by
        }

    with ThreadPoolExecutor(1) as beside:
        script = beside.submit(lane, "diffusers")
        taught = lane("service") | script.result()
    return {recipe.name: taught[recipe.name] for recipe in _offered(plan)}


def _offered(plan: Plan) -> list[Recipe]:
    return [recipe for recipe in plan.recipes if recipe.by == "service" or plan.checkout is not None]


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


# --- pictures -----------------------------------------------------------------------------------------------

Learner = Callable[[Recipe, Subject, Path], Learned]


def _learner(plan: Plan, stack: ExitStack) -> Learner:
    """What carries out a recipe; the platform starts when it is first needed and stops with the stack."""
    started: list[Service] = []

    def learn(recipe: Recipe, subject: Subject, folder: Path) -> Learned:
        prompts = subject.instance_prompt, subject.class_prompt
        pictures = [(draw(scene), subject.captioned(scene.background)) for scene in instance_scenes(subject)]
        samples = [asked.text for asked in plan.asked(subject)]
        if recipe.by == "diffusers":
            assert plan.checkout is not None
            return peer.learn(
                recipe, plan.checkout, plan.model, prompts, pictures, samples, plan.seeds, folder
            )
        if not started:
            started.append(stack.enter_context(Service(plan.model)))
        return started[0].learn(recipe, prompts, pictures, samples, plan.seeds, folder)

    return learn


def teach_once(
    plan: Plan, subject: Subject, recipe: Recipe, digest: str, learn: Learner
) -> tuple[Drawings, Learned | None]:
    """The pictures of one training: those of an earlier run, or new ones."""
    asked = plan.asked(subject)
    key = _key(recipe, [entry.text for entry in asked], plan.seeds)
    folder = plan.cache / digest / f"{slug(recipe.name)}-{key}" / subject.name
    done = folder / "learned.json"
    if not done.exists():
        _say(f"teaching {subject.name}: {recipe.name}")
        learned = learn(recipe, subject, folder)
        done.write_text(json.dumps(asdict(learned)), encoding="utf-8")
    drawings = {
        (index, offset): Image.open(path_of(folder, index, offset)).convert("RGB")
        for index in range(len(asked))
        for offset in range(plan.seeds)
    }
    return drawings, Learned(**json.loads(done.read_text(encoding="utf-8")))


def _key(recipe: Recipe, prompts: Sequence[str], seeds: int) -> str:
    """Changes with anything that the pictures depend on, beside the model and the subject's drawing."""
    parts = [asdict(recipe), list(prompts), seeds, pipelines.STEPS, pipelines.GUIDANCE, INSTANCE_PICTURES]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def slug(name: str) -> str:
    """A row's name as a part of file names."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _anchors(plan: Plan, subject: Subject, pipeline: Any) -> dict[str, tuple[Drawings, None]]:
    asked = plan.asked(subject)
    keys = [(index, offset) for index in range(len(asked)) for offset in range(plan.seeds)]
    real = {
        (index, offset): drawn(
            asked[index], offset, subject.features if asked[index].kind == "subject" else None
        )
        for index, offset in keys
    }
    other = {(index, offset): drawn(asked[index], offset, None) for index, offset in keys}
    trips = dict(zip(keys, pipelines.round_trips(pipeline, list(real.values())), strict=True))
    seeds = [seeds_of(index, plan.seeds)[offset] for index, offset in keys]
    texts = [asked[index].text for index, _ in keys]
    _say(f"drawing {subject.name}: untrained base")
    base = dict(zip(keys, pipelines.draw_pictures(pipeline, texts, seeds), strict=True))
    pictures = (real, trips, other, base)
    return {name: (drawings, None) for name, drawings in zip(ANCHORS, pictures, strict=True)}


# --- scores -------------------------------------------------------------------------------------------------


def score_pictures(
    plan: Plan, subject: Subject, drawings: Drawings, learned: Learned | None
) -> dict[str, list[float]]:
    """One subject's values by column, one for each seed (or for each training)."""
    asked = plan.asked(subject)
    of_kind = {
        kind: [index for index, entry in enumerate(asked) if entry.kind == kind]
        for kind in ("subject", "class", "other")
    }

    def by_seed(kind: str, judge: Callable[[Asked, Image.Image], float]) -> list[float]:
        return [
            statistics.fmean(judge(asked[index], drawings[index, offset]) for index in of_kind[kind])
            for offset in range(plan.seeds)
        ]

    def resemblance(_: Asked, picture: Image.Image) -> float:
        return score_subject(picture, subject.noun, subject.features)

    def overlap(_: Asked, picture: Image.Image) -> float:
        return palette_overlap(picture, subject.noun, subject.features)

    alike = [
        diversity([drawings[index, offset] for offset in range(plan.seeds)]) for index in of_kind["class"]
    ]
    values = {
        "subject": by_seed("subject", resemblance),
        "prompt": by_seed("subject", judge_asked),
        "class leak": by_seed("class", resemblance),
        "other leak": by_seed("other", overlap),
        "diversity": [statistics.fmean(alike)],
    }
    if learned is not None:
        values |= {"training s": [learned.training_seconds], "all s": [learned.seconds]}
    return values


def tabulate(
    plan: Plan, about: Mapping[str, Any], rows: Mapping[str, list[dict[str, list[float]]]]
) -> dict[str, Any]:
    return {
        "about": dict(about),
        "subjects": [subject.name for subject in plan.subjects],
        "prompts": {subject.name: [entry.text for entry in plan.asked(subject)] for subject in plan.subjects},
        "seeds": plan.seeds,
        "pictures_a_subject": plan.seeds * len(plan.asked(plan.subjects[0])),
        "recipes": {recipe.name: asdict(recipe) for recipe in _offered(plan)},
        "rows": {row: _means(values) for row, values in rows.items()},
        "by_subject": {
            row: {
                subject.name: {name: round(statistics.fmean(column), 3) for name, column in values.items()}
                for subject, values in zip(plan.subjects, judged, strict=True)
            }
            for row, judged in rows.items()
        },
    }


def _means(judged: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    means = {}
    for column in COLUMNS:
        groups = [values[column] for values in judged if column in values]
        if groups:
            mean = asdict(bootstrap(groups, sum(len(group) for group in groups)))
            means[column] = {name: round(value, 4) for name, value in mean.items()}
    return means
