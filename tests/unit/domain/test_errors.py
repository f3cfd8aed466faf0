import http

import grpc
import pytest

from services.domain import errors
from services.domain.errors import ERROR_TABLE, Internal, InvalidSpec, LikenessError, Violation


def all_classes(kind: type[LikenessError] = LikenessError) -> set[type[LikenessError]]:
    """A class of the domain's errors and everything below it."""
    below = {deeper for child in kind.__subclasses__() for deeper in all_classes(child)}
    return {kind} | below


def test_every_error_has_a_row_of_its_own_and_no_row_is_left_over() -> None:
    assert set(ERROR_TABLE) == {kind for kind in all_classes() if kind.__module__ == errors.__name__}


def test_every_reason_names_one_class_and_leads_back_to_it() -> None:
    for kind, row in ERROR_TABLE.items():
        if kind is not LikenessError:
            assert errors.class_of(row.reason) is kind


def test_a_reason_of_another_version_is_an_internal_error() -> None:
    assert errors.class_of("NEVER_HEARD_OF") is Internal


@pytest.mark.parametrize("kind", ERROR_TABLE, ids=lambda kind: kind.__name__)
def test_rows_use_codes_that_exist(kind: type[LikenessError]) -> None:
    row = ERROR_TABLE[kind]

    assert row.grpc_code in grpc.StatusCode.__members__
    assert row.http_status == 499 or row.http_status in {status.value for status in http.HTTPStatus}
    assert row.reason == row.reason.upper().replace(" ", "_")


def test_no_error_both_ends_a_job_and_has_it_tried_again() -> None:
    assert not [kind for kind, row in ERROR_TABLE.items() if row.fails_job and row.retry_job]


def test_only_what_may_pass_is_unavailable() -> None:
    """UNAVAILABLE is the one code that clients repeat."""
    repeated = {kind for kind, row in ERROR_TABLE.items() if row.grpc_code == "UNAVAILABLE"}

    assert repeated == {errors.Unavailable, errors.OutcomeUnknown, errors.AlteredBytes}


def test_the_nearest_class_in_the_ancestry_wins() -> None:
    class Nearer(errors.StaleEpoch):
        pass

    assert errors.row_of(Nearer()) is ERROR_TABLE[errors.StaleEpoch]
    assert errors.row_of(Nearer) is ERROR_TABLE[errors.StaleEpoch]


def test_foreign_exceptions_are_internal_and_say_nothing() -> None:
    assert errors.row_of(KeyError("secret")) is ERROR_TABLE[Internal]
    assert errors.public_text(KeyError("secret")) == errors.INTERNAL_TEXT
    assert errors.public_text(Internal("a path")) == errors.INTERNAL_TEXT
    assert errors.public_text(errors.QueueFull("the queue is full")) == "the queue is full"


def test_all_violations_are_in_the_text() -> None:
    error = InvalidSpec([Violation("a", "must be small"), Violation("", "needs a picture")])

    assert str(error) == error.message == "a: must be small; needs a picture"
    assert InvalidSpec("must be small", "a").violations == (Violation("a", "must be small"),)
