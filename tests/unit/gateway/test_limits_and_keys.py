"""Windows of requests, requests at once, and what is remembered of keys."""

import pytest
from likeness.access.v1 import access_service_pb2 as pb

from services.domain.errors import RateLimited, Unauthenticated
from services.gateway.auth import REMEMBER_S, Authenticator, Caller, secret_of
from services.gateway.limits import RUNPOD_LIMITS, Limit, QueueLimit, RateLimiter

CALLER = Caller("k", "p")


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def use(limiter: RateLimiter, caller: Caller = CALLER, endpoint: str = "e", operation: str = "run") -> None:
    with limiter.admitted(caller, endpoint, operation):
        pass


def test_the_window_slides() -> None:
    time = Time()
    limiter = RateLimiter({"run": Limit(2, 9)}, time)
    use(limiter)
    time.now += 6
    use(limiter)
    with pytest.raises(RateLimited):
        use(limiter)
    time.now += 4.1
    use(limiter)
    with pytest.raises(RateLimited):
        use(limiter)


def test_requests_under_way_are_counted_until_they_end() -> None:
    limiter = RateLimiter({"run": Limit(99, 1)}, Time())
    with limiter.admitted(CALLER, "e", "run"), pytest.raises(RateLimited):
        use(limiter)
    use(limiter)


def test_keys_endpoints_and_operations_are_counted_apart() -> None:
    limiter = RateLimiter({"run": Limit(1, 9), "status": Limit(1, 9)}, Time())
    use(limiter)
    use(limiter, Caller("other", "p"))
    use(limiter, endpoint="f")
    use(limiter, operation="status")
    with pytest.raises(RateLimited):
        use(limiter)


def test_quiet_callers_are_forgotten() -> None:
    time = Time()
    limiter = RateLimiter({"run": Limit(1, 9)}, time)
    for number in range(50):
        use(limiter, Caller(f"k{number}", "p"))
    time.now += 11
    use(limiter)
    assert len(limiter._uses) == 1


def test_the_dialects_limits_are_the_documented_ones() -> None:
    assert {name: (limit.requests, limit.at_once) for name, limit in RUNPOD_LIMITS.items()} == {
        "run": (1000, 200),
        "runsync": (2000, 400),
        "status": (2000, 400),
        "cancel": (100, 20),
        "purge-queue": (2, 2),
        "health": (2000, 400),
    }


@pytest.mark.parametrize(
    ("waiting", "workers", "full"),
    [(50, 0, False), (500, 0, False), (501, 0, True), (501, 1, True), (501, 2, False), (1001, 2, True)],
)
def test_a_queue_is_full_beyond_fifty_and_beyond_five_hundred_a_worker(
    waiting: int, workers: int, full: bool
) -> None:
    assert QueueLimit().is_full(waiting, workers) is full


class Access:
    def __init__(self) -> None:
        self.asked = 0
        self.known = True

    async def CheckKey(self, request: pb.CheckKeyRequest, timeout: float) -> pb.CheckKeyResponse:
        self.asked += 1
        if not self.known:
            raise Unauthenticated("unknown")
        return pb.CheckKeyResponse(key=pb.Key(key_id="k", project_id="p"))


async def test_a_revoked_key_stops_working_after_a_few_seconds() -> None:
    time, access = Time(), Access()
    authenticator = Authenticator(access, time)
    assert (await authenticator.caller("Bearer s")).project == "p"
    access.known = False
    assert (await authenticator.caller("s")).project == "p"
    time.now += REMEMBER_S
    with pytest.raises(Unauthenticated):
        await authenticator.caller("Bearer s")
    assert access.asked == 2


async def test_no_key_is_kept_in_memory() -> None:
    authenticator = Authenticator(Access(), Time())
    await authenticator.caller("Bearer hunter2")
    assert "hunter2" not in repr(vars(authenticator))


@pytest.mark.parametrize("header", ["x" * 513, "a b c", "Bearer a b", "", "schlüssel"])
def test_malformed_headers_are_no_key(header: str) -> None:
    with pytest.raises(Unauthenticated):
        secret_of(header)


def test_scopes_name_a_dialect_or_an_endpoint() -> None:
    assert Caller("k", "p").may("runpod", "dream-booth-v1")
    assert Caller("k", "p", frozenset({"runpod"})).may("runpod", "dream-booth-v1")
    assert Caller("k", "p", frozenset({"dream-booth-v1"})).may("runpod", "dream-booth-v1")
    assert not Caller("k", "p", frozenset({"everydream-v1"})).may("runpod", "dream-booth-v1")
