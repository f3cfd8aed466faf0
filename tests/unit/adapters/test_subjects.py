import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.adapters import subjects
from services.domain.errors import InvalidSpec
from services.domain.job import JobKind, JobRef

tokens = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)


@given(st.sampled_from(JobKind), tokens, tokens)
def test_a_jobs_subject_leads_back_to_the_job(kind: JobKind, project: str, job_id: str) -> None:
    ref = JobRef(kind, project, job_id)

    assert subjects.ref_of(subjects.job(ref)) == ref


@given(st.text(max_size=80))
def test_no_text_adds_a_part_to_a_subject(text: str) -> None:
    try:
        found = [
            subjects.idempotency("p", text),
            subjects.hook("p", text),
            subjects.progress(text, "id"),
            subjects.cursor("p", text),
            subjects.beat(JobKind.GEN, text),
        ]
    except InvalidSpec:
        return
    assert all(subject.count(".") == 2 for subject in found)
    assert not any(set(subject) & set("*> \r\n\t") for subject in found)


@pytest.mark.parametrize("subject", ["job.gen.p", "hook.gen.p.id", "job.gen.p.id.more", "job.paint.p.id"])
def test_a_subject_of_anything_else_is_no_job(subject: str) -> None:
    with pytest.raises(ValueError):
        subjects.ref_of(subject)


def test_every_subject_lies_in_exactly_one_stream() -> None:
    ref = JobRef(JobKind.TRAIN, "p", "id")
    homes = {
        subjects.job(ref): subjects.JOBS,
        subjects.idempotency("p", "k"): subjects.IDEM,
        subjects.hook("p", "id"): subjects.HOOKS,
        subjects.beat(JobKind.GEN, "w"): subjects.LIVE,
        subjects.progress("p", "id"): subjects.LIVE,
        subjects.cursor("p", "id"): subjects.LIVE,
    }

    for subject, home in homes.items():
        assert [name for name, filters in subjects.STREAM_SUBJECTS.items() if matches(subject, filters)] == [
            home
        ]


def matches(subject: str, filters: tuple[str, ...]) -> bool:
    """One of the filters, whose stars stand for one part each, names the subject."""
    parts = subject.split(".")
    split = [each.split(".") for each in filters]
    return any(
        len(each) == len(parts) and all(w in ("*", p) for w, p in zip(each, parts, strict=True))
        for each in split
    )
