"""`python -m tests.eval [text|personalisation|page]`: how well a model draws, and how well the service teaches it.

    python -m tests.eval                                    both tables, into docs/evaluation (what `make eval` runs)
    python -m tests.eval text --model FOLDER --prompts 60   a look at any diffusers folder of the pocket grammar
    python -m tests.eval personalisation --subjects robot,cat --seeds 2

What is not the whole table of the released model goes to out/evaluation, unless `--out` says otherwise.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from models.pocket.figures import SUBJECTS
from services.adapters.settings import BenchSettings, load_or_exit
from tests.eval import personalisation, report, text
from tests.eval.recipes import RECIPES, SEEDS, SUBJECT_NAMES, shortened
from tests.eval.subjects import subjects

RELEASED = Path("models/pocket/weights")
PUBLISHED, UNPUBLISHED = Path("docs/evaluation"), Path("out/evaluation")
CACHE = Path("out/evaluation/cache")
PROMPTS = 12


def main() -> int:
    """Runs what is named, or everything.

    Returns:
        Exit status.
    """
    arguments = parser().parse_args()
    if arguments.what == "page":
        report.write_page(arguments.out or PUBLISHED)
        return 0
    if not (arguments.model / "model_index.json").is_file():
        sys.stderr.write(f"no diffusers folder at {arguments.model}: name one by --model\n")
        return 2
    if arguments.what in ("all", "text"):
        _text(arguments)
    if arguments.what in ("all", "personalisation"):
        _personalisation(arguments)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main_parser = argparse.ArgumentParser(
        prog="python -m tests.eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = main_parser.add_subparsers(dest="what")
    main_parser.set_defaults(what="all", model=RELEASED, prompts=None, out=None, cache=CACHE)
    main_parser.set_defaults(anchors=True, subjects=SUBJECT_NAMES, seeds=SEEDS, rows=None)
    main_parser.set_defaults(updates=None, class_images=None)
    texts = commands.add_parser("text", help="does the base draw what held-out prompts ask for?")
    texts.add_argument("--prompts", type=_from(1), default=None, help="so many of the 300; default: all")
    texts.add_argument("--no-anchors", dest="anchors", action="store_false", help="judge the model alone")
    taught = commands.add_parser("personalisation", help="does the service teach subjects?")
    taught.add_argument("--prompts", type=_from(1), help=f"so many of the {PROMPTS}; default: all")
    taught.add_argument("--subjects", type=_names, default=SUBJECT_NAMES, help="names, comma separated")
    taught.add_argument("--seeds", type=_from(2), default=SEEDS, help="pictures of each prompt, at least 2")
    taught.add_argument("--rows", type=_rows, default=None, help="names of recipes, separated by ';'")
    taught.add_argument("--updates", type=_from(1), help="of every training, for a trial")
    taught.add_argument("--class-images", type=_from(1), help="of every prior, for a trial")
    taught.add_argument("--cache", type=Path, default=CACHE, help="folder of finished pictures")
    for command in (texts, taught):
        command.add_argument("--model", type=Path, default=RELEASED, help=f"default: {RELEASED}")
    for command in (texts, taught, commands.add_parser("page", help="write the page from the JSON files")):
        command.add_argument("--out", type=Path, default=None, help="folder of the results")
    return main_parser


def _from(low: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if int(value) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}")
        return int(value)

    return read


def _names(value: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in value.split(","))
    unknown = sorted(set(names) - set(SUBJECTS))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no such subject: {', '.join(unknown)}; there are {', '.join(SUBJECTS)}"
        )
    return names


def _rows(value: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in value.split(";"))
    unknown = sorted(set(names) - {recipe.name for recipe in RECIPES})
    if unknown:
        raise argparse.ArgumentTypeError(f"no such recipe: {'; '.join(unknown)}")
    return names


def out_folder(arguments: argparse.Namespace, whole: bool) -> Path:
    """The results' folder: only whole tables of the released model replace what is published."""
    chosen: Path | None = arguments.out
    return chosen or (PUBLISHED if whole and arguments.model == RELEASED else UNPUBLISHED)


def _text(arguments: argparse.Namespace) -> None:
    out = out_folder(arguments, arguments.prompts is None and arguments.anchors)
    result = text.evaluate(arguments.model, arguments.prompts, out, anchors=arguments.anchors)
    report.write_result(out, report.TEXT, result)
    print("\n".join([*report.text_table(result), f"right forms: {result['by_noun']}", f"see {out}"]))


def _personalisation(arguments: argparse.Namespace) -> None:
    checkout = load_or_exit(BenchSettings).diffusers
    if checkout is None:
        sys.stderr.write("no row of diffusers' script: set LIKENESS_DIFFUSERS to a diffusers checkout\n")
    plan = personalisation.Plan(
        model=arguments.model,
        subjects=subjects(arguments.subjects),
        recipes=[
            shortened(recipe, arguments.updates, arguments.class_images)
            for recipe in RECIPES
            if arguments.rows is None or recipe.name in arguments.rows
        ],
        prompts=arguments.prompts or PROMPTS,
        seeds=arguments.seeds,
        cache=arguments.cache,
        checkout=checkout,
    )
    limits = (arguments.rows, arguments.prompts, arguments.updates, arguments.class_images)
    whole = not any(limits) and (arguments.seeds, arguments.subjects) == (SEEDS, SUBJECT_NAMES)
    out = out_folder(arguments, whole)
    result = personalisation.evaluate(plan, out)
    report.write_result(out, report.PERSONALISATION, result)
    print("\n".join([*report.personalisation_table(result), f"see {out}"]))


if __name__ == "__main__":
    sys.exit(main())
