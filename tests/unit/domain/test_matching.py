import heapq
import random
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.domain.job import PRIORITY_HIGH, PRIORITY_NORMAL, JobKind, JobRef
from services.domain.matching import Asking, QueueKey, Waiting, choose, eligible, wait_until_eligible_ms

NOW = 1_000_000
T = 2000


def waiting(job_id: str, project: str = "a", age_ms: int = 0) -> Waiting:
    return Waiting(NOW - age_ms, job_id, JobRef(JobKind.GEN, project, job_id))


def asking(*warm: str, elsewhere: tuple[str, ...] = (), slots: int = 1) -> Asking:
    return Asking(frozenset(warm), frozenset(elsewhere), slots)


def pick(
    queues: dict[QueueKey, list[Waiting]], worker: Asking, running: dict[str, int] | None = None
) -> list[str]:
    return [job.id for job in choose(queues, worker, running or {}, patience_ms=T, now_ms=NOW)]


@pytest.mark.parametrize(
    ("model", "age_ms", "worker", "expected"),
    [
        pytest.param("m", 0, asking("m", elsewhere=("m",)), True, id="warm"),
        pytest.param("m", 0, asking(elsewhere=("m",)), False, id="warm elsewhere"),
        pytest.param("m", T - 1, asking(elsewhere=("m",)), False, id="nearly patient enough"),
        pytest.param("m", T, asking(elsewhere=("m",)), True, id="waited long enough"),
        pytest.param("m", 0, asking(elsewhere=("n",)), True, id="nobody holds it"),
        pytest.param("", 0, asking(elsewhere=("n",)), True, id="needs no model"),
    ],
)
def test_a_cold_worker_leaves_a_young_job_to_a_warm_one(
    model: str, age_ms: int, worker: Asking, expected: bool
) -> None:
    assert eligible(model, age_ms, worker, T) is expected


def test_priority_comes_before_everything_else() -> None:
    queues = {
        QueueKey(PRIORITY_NORMAL, "a", "warm"): [waiting("old", "a", 900_000)],
        QueueKey(PRIORITY_HIGH, "b", "cold"): [waiting("urgent", "b", 1)],
    }
    assert pick(queues, asking("warm"), {"b": 7}) == ["urgent"]


def test_the_project_with_fewer_running_jobs_comes_first() -> None:
    queues = {
        QueueKey(PRIORITY_NORMAL, "busy", ""): [waiting("older", "busy", 500)],
        QueueKey(PRIORITY_NORMAL, "quiet", ""): [waiting("younger", "quiet", 100)],
    }
    assert pick(queues, asking(), {"busy": 2, "quiet": 1}) == ["younger"]


def test_a_warm_model_comes_before_age() -> None:
    queues = {
        QueueKey(PRIORITY_NORMAL, "a", "cold"): [waiting("older", "a", 500)],
        QueueKey(PRIORITY_NORMAL, "a", "warm"): [waiting("younger", "a", 100)],
    }
    assert pick(queues, asking("warm")) == ["younger"]


def test_several_slots_get_jobs_of_one_model_and_projects_take_turns() -> None:
    queues = {
        QueueKey(PRIORITY_NORMAL, "a", "m"): [
            waiting("a1", "a", 90),
            waiting("a2", "a", 80),
            waiting("a3", "a", 70),
        ],
        QueueKey(PRIORITY_NORMAL, "b", "m"): [waiting("b1", "b", 60)],
        QueueKey(PRIORITY_NORMAL, "c", "n"): [waiting("c1", "c", 50)],
    }
    assert pick(queues, asking("m", slots=3)) == ["a1", "b1", "a2"]
    assert pick(queues, asking("m", slots=64)) == ["a1", "b1", "a2", "a3"]


def test_the_next_look_is_when_age_makes_a_job_eligible() -> None:
    queues = {
        QueueKey(PRIORITY_NORMAL, "a", "m"): [waiting("young", age_ms=300)],
        QueueKey(PRIORITY_NORMAL, "a", "n"): [waiting("old", age_ms=T)],
    }
    assert wait_until_eligible_ms(queues, T, NOW) == T - 300
    assert wait_until_eligible_ms({}, T, NOW) is None


@st.composite
def situations(draw: st.DrawFn) -> tuple[dict[QueueKey, list[Waiting]], Asking, dict[str, int]]:
    models = st.sampled_from(["", "m", "n", "o"])
    jobs = draw(
        st.lists(
            st.tuples(st.sampled_from([0, 1, 2]), st.sampled_from("abc"), models, st.integers(0, 5000)),
            max_size=25,
        )
    )
    queues: dict[QueueKey, list[Waiting]] = {}
    for number, (priority, project, model, age_ms) in enumerate(jobs):
        queues.setdefault(QueueKey(priority, project, model), []).append(
            waiting(f"j{number}", project, age_ms)
        )
    sets = st.frozensets(st.sampled_from(["m", "n", "o"]))
    worker = Asking(draw(sets), draw(sets), draw(st.integers(1, 6)))
    running = draw(st.dictionaries(st.sampled_from("abc"), st.integers(0, 4)))
    return {key: sorted(entries) for key, entries in queues.items()}, worker, running


@settings(max_examples=200, deadline=None)
@given(situations())
def test_picks_are_distinct_eligible_of_one_model_and_none_is_better(
    situation: tuple[dict[QueueKey, list[Waiting]], Asking, dict[str, int]],
) -> None:
    queues, worker, running = situation
    picked = choose(queues, worker, running, patience_ms=T, now_ms=NOW)
    key_of = {job: key for key, jobs in queues.items() for job in jobs}
    fit = [job for job, key in key_of.items() if eligible(key.model, NOW - job.queued_ms, worker, T)]

    assert len(set(picked)) == len(picked) <= worker.free_slots
    assert set(picked) <= set(fit)
    assert len({key_of[job].model for job in picked}) <= 1
    assert bool(picked) == bool(fit)
    if picked:
        same = [job for job in fit if key_of[job].model == key_of[picked[0]].model]
        assert len(picked) == min(len(same), worker.free_slots)

        def rank(job: Waiting) -> tuple[int, int, bool, int]:
            key = key_of[job]
            warm = not key.model or key.model in worker.warm_models
            return key.priority, running.get(key.project, 0), not warm, job.queued_ms

        assert rank(picked[0]) == min(rank(job) for job in fit)


def simulate(arrivals: list[tuple[int, str, str]], workers: int, service_ms: int) -> dict[str, list[int]]:
    """Lets workers that keep two models serve jobs; returns each project's waits in milliseconds."""
    events: list[tuple[int, int, str, int]] = []
    order = count()
    for at, project, model in arrivals:
        heapq.heappush(events, (at, next(order), f"{project}/{model}", -1))
    queues: dict[QueueKey, list[Waiting]] = {}
    running: dict[str, int] = {}
    warm: list[list[str]] = [[] for _ in range(workers)]
    idle, waits = set(range(workers)), dict[str, list[int]]()
    owner: dict[int, str] = {}
    while events:
        now, _, what, worker = heapq.heappop(events)
        if worker >= 0:
            running[owner.pop(worker)] -= 1
            idle.add(worker)
        elif what:
            project, model = what.split("/")
            job = Waiting(now, f"j{next(order)}", JobRef(JobKind.GEN, project, "x"))
            queues.setdefault(QueueKey(PRIORITY_NORMAL, project, model), []).append(job)
            heapq.heappush(events, (now + T, next(order), "", -1))
        for free in sorted(idle):
            elsewhere = frozenset(m for other in range(workers) if other != free for m in warm[other])
            found = choose(
                queues, Asking(frozenset(warm[free]), elsewhere), running, patience_ms=T, now_ms=now
            )
            for job in found:
                key = next(key for key, jobs in queues.items() if job in jobs)
                queues[key].remove(job)
                if not queues[key]:
                    del queues[key]
                waits.setdefault(key.project, []).append(now - job.queued_ms)
                running[key.project] = running.get(key.project, 0) + 1
                owner[free] = key.project
                warm[free] = [key.model, *[m for m in warm[free] if m != key.model]][:2]
                idle.discard(free)
                heapq.heappush(events, (now + service_ms, next(order), "", free))
    return waits


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def test_a_project_with_fifty_times_the_load_hardly_delays_another() -> None:
    rng = random.Random(5)
    quiet = [(rng.randrange(0, 100_000), "quiet", "m") for _ in range(20)]
    flood = [(rng.randrange(0, 10_000), "flood", "m") for _ in range(1000)]
    beside_a_peer = [(at, "peer", "m") for at, _, _ in quiet[:20]] + quiet

    alone = simulate(sorted(beside_a_peer), workers=4, service_ms=500)["quiet"]
    crowded = simulate(sorted(quiet + flood), workers=4, service_ms=500)["quiet"]

    # In a flooded house every worker is busy when a job comes: it waits for the first to be free, never for the queue.
    assert percentile(crowded, 0.95) <= 1.5 * max(percentile(alone, 0.95), 500)
    assert len(crowded) == 20


def test_no_job_waits_beyond_its_patience_while_a_worker_is_free() -> None:
    rng = random.Random(7)
    arrivals = sorted(
        (rng.randrange(0, 60_000), rng.choice("ab"), rng.choice(["m", "n", "o", "p"])) for _ in range(150)
    )
    waits = simulate(arrivals, workers=6, service_ms=200)  # far more workers than work
    assert max(max(of_one) for of_one in waits.values()) <= T + 200
