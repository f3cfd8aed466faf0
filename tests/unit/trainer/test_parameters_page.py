"""The page that lists every parameter of a training is generated, complete and current."""

from pathlib import Path

import pytest
from likeness.training.v1 import training_job_pb2 as pb

from services.trainer.support import OF_OTHERS, RECIPES, honoured
from tests.unit.trainer import parameters_page
from tests.unit.trainer.proofs import PROOFS, places


def row_of(field: str) -> str:
    """The line of the page that is about one field of the specification."""
    lines = parameters_page.render_page().split("\n## ")[0].splitlines()
    (row,) = [line for line in lines if line.startswith(f"| `{field}` |")]
    return row


def test_the_parameters_page_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / "parameters.md"
    assert page.read_text(encoding="utf-8") == parameters_page.render_page()


@pytest.mark.parametrize("field", [field.name for field in pb.TrainingSpec.DESCRIPTOR.fields])
def test_every_field_has_a_meaning_and_a_proof_or_somebody_else_who_acts_on_it(field: str) -> None:
    _, name, meaning, who, proof, _ = (cell.strip() for cell in row_of(field).replace("\\|", "/").split("|"))
    assert name == f"`{field}`"
    assert len(meaning) > 10
    if any(field in honoured(recipe) for recipe in RECIPES):
        assert proof == f"`{PROOFS[field]}` in {places()[PROOFS[field]]}"
    elif field in OF_OTHERS:
        assert (who, proof) == ("others", OF_OTHERS[field])
    else:
        assert (who, proof) == ("refused", "")


def test_the_recipes_that_honour_a_field_are_named() -> None:
    assert "| all |" in row_of("seed")
    assert "| DreamBooth |" in row_of("with_prior_preservation")
    assert "| EveryDream |" in row_of("rated_dataset")
