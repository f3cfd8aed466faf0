"""Tells callers' addresses what became of their jobs: at least once, in order, none skipped, across restarts.

Which events there are is the dialect's: most tell the end only, some every change of a status. Events of a job have
numbers, and one revision of its record may be several of them.

The job log says what happened, a small cursor a job says what was told. A sender claims the cursor by
compare-and-set, posts, and moves it on; one that dies in between leaves a claim that runs out, and the next sender
posts the same event again under the same `X-Webhook-Id`.
"""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.domain.errors import OUTAGES, Conflict, LikenessError
from services.domain.job import TOLD_STATES, JobKind, JobRecord, JobRef
from services.domain.ports import Clock, JobFeed, JobLog, Revision, SmallLog

logger = logging.getLogger(__name__)

ID_HEADER = "X-Webhook-Id"
"""Names the event: the same for every try of it, another for each run of a job."""
JOB_HEADER = "X-Job-Id"
SIGNATURE_HEADER = "X-Webhook-Signature"
POSTS_AT_ONCE = 32
EVERY_EVENT = "WEBHOOK_SCOPE_EVERY_EVENT"

Post = Callable[[str, bytes, Mapping[str, str], float], Awaitable[int]]
Render = Callable[[Revision, int], Awaitable[bytes]]
"""Makes the body of an event: the revision that it is of, and its number."""
EventsOf = Callable[[JobRecord, int], Sequence[int]]
"""Numbers of the events that a revision is, rising, given the last one that was told of the job (0: none)."""


@dataclass(frozen=True, slots=True)
class WebhookPolicy:
    """How hard a webhook is tried.

    Attributes:
        tries: posts of one event in all.
        pause_s: seconds between two of them.
        timeout_s: seconds a receiver has to answer.
        claim_s: seconds after which a claim is void, because its sender must be dead.
        secret: key of the signature header; empty: none is sent.
    """

    tries: int = 3
    pause_s: float = 10.0
    timeout_s: float = 10.0
    claim_s: float = 60.0
    secret: bytes = b""


def final_events(record: JobRecord, last: int) -> Sequence[int]:
    """The end of a job's run is its one event, however often it is run; a cancellation is none."""
    return (1,) if record.event and record.state in TOLD_STATES else ()


class WebhookSender:
    """Follows the log and delivers."""

    def __init__(
        self,
        *,
        feed: JobFeed,
        log: JobLog,
        hooks: SmallLog,
        clock: Clock,
        post: Post,
        render: Render,
        dialects: frozenset[str],
        policy: WebhookPolicy = WebhookPolicy(),
        name: str = "",
        kind: JobKind = JobKind.TRAIN,
        events_of: EventsOf = final_events,
    ) -> None:
        """Takes the ports and the two functions that reach outside.

        Args:
            feed: the revisions as they come.
            log: the revisions as they are.
            hooks: the cursors.
            clock: for pauses; what is due when goes by the log's own clock.
            post: sends a body to an address and returns the HTTP status.
            render: makes the body of an event.
            dialects: whose jobs are told of here.
            policy: how hard it is tried.
            name: names this sender in claims.
            kind: trainings or drawings.
            events_of: which events there are; others than the end of a run are told to webhooks whose scope is
                every event.
        """
        self._feed, self._log, self._hooks, self._clock = feed, log, hooks, clock
        self._post, self._render, self._dialects = post, render, dialects
        self._policy, self._name = policy, name
        self._kind, self._events_of = kind, events_of
        self._busy: dict[JobRef, bool] = {}
        self._gate = asyncio.Semaphore(POSTS_AT_ONCE)

    async def run(self) -> None:
        """Delivers for ever; what is under way when it is cancelled is delivered by the next run."""
        async with asyncio.TaskGroup() as group:
            async for item in self._feed.follow(self._kind):
                if isinstance(item, Revision) and self._concerns(item.record):
                    self._begin(item.record.ref, group)

    def _concerns(self, record: JobRecord) -> bool:
        """There may be something to tell: now, or left over from the run before a retry."""
        origin = record.options.get("origin", {})
        ours = bool(record.webhook_url) and origin.get("dialect", "") in self._dialects
        every = record.options.get("webhook", {}).get("scope") == EVERY_EVENT
        return ours and (every or record.state in TOLD_STATES or record.round > 0)

    def _begin(self, ref: JobRef, group: asyncio.TaskGroup) -> None:
        """Starts a delivery of a job, or tells the one under way to look again."""
        if ref in self._busy:
            self._busy[ref] = True
        else:
            self._busy[ref] = False
            group.create_task(self._deliver(ref))

    async def _deliver(self, ref: JobRef) -> None:
        try:
            while True:
                self._busy[ref] = False
                await self._deliver_all(ref)
                if not self._busy[ref]:
                    return
        finally:
            del self._busy[ref]

    async def _deliver_all(self, ref: JobRef) -> None:
        while True:
            try:
                if not await self._step(ref):
                    return
            except Conflict:
                continue  # another sender moved the cursor: read it again
            except LikenessError as error:
                logger.warning("webhook delayed", extra={"job_id": ref.id, "detail": str(error)})
                await self._clock.sleep(self._policy.pause_s)

    async def _step(self, ref: JobRef) -> bool:
        """Waits for, or makes, one try; false when everything has been told.

        Raises:
            Conflict: another sender was faster.
        """
        cursor, expected = await self._hooks.read_hook(ref.project, ref.id)
        told = int(cursor.get("told", 0))
        revision = await self._next_event(ref, int(cursor.get("next", 0)) - 1, told)
        if revision is None:
            return False
        number, *further = self._events_of(revision.record, told)
        pause_ms = int(cursor.get("due", 0)) - self._log.now_ms()
        if pause_ms > 0:
            await self._clock.sleep(pause_ms / 1000)
            return True
        tries = int(cursor.get("tries", 0)) if cursor.get("next") == revision.sequence else 0
        claim = self._cursor(revision.sequence, told, tries, self._policy.claim_s)
        claimed = await self._hooks.write_hook(ref.project, ref.id, claim, expected)
        async with self._gate:
            delivered = await self._try(revision, number)
        tries += delivered is not None
        if delivered or tries >= self._policy.tries:
            if not delivered:
                logger.warning("webhook given up", extra={"job_id": ref.id, "tries": tries})
            after = self._cursor(revision.sequence + (not further), number, 0, 0)
        else:
            after = self._cursor(revision.sequence, told, tries, self._policy.pause_s)
        await self._hooks.write_hook(ref.project, ref.id, after, claimed)
        return True

    async def _next_event(self, ref: JobRef, after: int, told: int) -> Revision | None:
        revision = await self._log.next_revision(ref, max(0, after))
        while revision is not None and not self._events_of(revision.record, told):
            revision = await self._log.next_revision(ref, revision.sequence)
        return revision

    def _cursor(self, following: int, told: int, tries: int, due_in_s: float) -> dict[str, Any]:
        due = self._log.now_ms() + round(due_in_s * 1000) if due_in_s else 0
        return {"next": following, "told": told, "tries": tries, "due": due, "claimed": self._name}

    async def _try(self, revision: Revision, number: int) -> bool | None:
        """Posts one event once; true when it was taken, None when there was nothing to post yet.

        The receiver is not to miss an event because a service of this side was away when it was due.
        """
        record = revision.record
        try:
            body = await self._render(revision, number)
        except OUTAGES as error:
            logger.info("webhook waits", extra={"job_id": record.id, "detail": str(error)})
            return None
        except Exception:
            logger.exception("webhook failed", extra={"job_id": record.id})
            return False
        several = len(self._events_of(record, 0)) > 1
        event = f"{revision.sequence}.{number}" if several else str(revision.sequence)
        return await self._posted(record, event, body)

    async def _posted(self, record: JobRecord, event: str, body: bytes) -> bool:
        try:
            headers = self._headers(record.id, event, body)
            status = await self._post(record.webhook_url, body, headers, self._policy.timeout_s)
        except LikenessError as error:
            logger.info("webhook not delivered", extra={"job_id": record.id, "detail": str(error)})
            return False
        except Exception:
            logger.exception("webhook failed", extra={"job_id": record.id})
            return False
        extra = {"job_id": record.id, "http_status": status}
        logger.info("webhook posted", extra=extra)
        return 200 <= status < 300

    def _headers(self, job_id: str, event: str, body: bytes) -> dict[str, str]:
        headers = {ID_HEADER: f"{job_id}.{event}", JOB_HEADER: job_id}
        if self._policy.secret:
            digest = hmac.new(self._policy.secret, body, hashlib.sha256).hexdigest()
            headers[SIGNATURE_HEADER] = f"sha256={digest}"
        return headers
