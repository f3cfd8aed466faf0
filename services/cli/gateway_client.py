"""The command line's view of a gateway: submit, read, cancel, download. Speaks the RunPod dialect of /v2."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Final, Self

import httpx

ENDPOINT: Final = "dream-booth-v1"
FINAL_STATES: Final = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
POLL_S: Final = 0.5
PATIENCE_S: Final = 60.0


class GatewayError(Exception):
    """The gateway refused, or did not answer; the text says what to do."""


class GatewayAway(GatewayError):
    """The gateway did not answer, or not for now: asking again may help."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a job looks like at one moment.

    Attributes:
        status: IN_QUEUE, IN_PROGRESS, COMPLETED, FAILED, CANCELLED or TIMED_OUT.
        stage: what is being done; "" before the start and after the end.
        percent: share of the stage that is done, 0..100.
        progress: every number the gateway sent, by name.
        body: the whole answer.
    """

    status: str
    stage: str
    percent: float
    progress: Mapping[str, Any]
    body: Mapping[str, Any]

    @property
    def is_final(self) -> bool:
        """The job has ended."""
        return self.status in FINAL_STATES


class Gateway:
    """One gateway with one key.

    Args:
        url: scheme, host and port.
        key: API key; "" for the open routes only.
        timeout_s: seconds to wait for each answer.
    """

    def __init__(self, url: str, key: str = "", timeout_s: float = 15.0) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout_s)

    def __enter__(self) -> Self:
        """Returns the gateway itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connections."""
        self._http.close()

    def submit(self, request: Mapping[str, Any]) -> str:
        """Submits a training and returns its id.

        Args:
            request: `input`, and whatever else the endpoint takes.

        Raises:
            GatewayError: refused, with every fault that the gateway named.
        """
        return str(self._call("POST", f"/v2/{ENDPOINT}/run", json=request)["id"])

    def read(self, job_id: str) -> Snapshot:
        """Reads a job."""
        body = self._call("GET", f"/v2/{ENDPOINT}/status/{job_id}")
        output = body.get("output")
        progress = output.get("progress", {}) if isinstance(output, dict) else {}
        return Snapshot(
            status=str(body["status"]),
            stage=str(progress.get("stage", "")),
            percent=float(progress.get("percent", 0.0)),
            progress=progress,
            body=body,
        )

    def follow(self, job_id: str) -> Iterator[Snapshot]:
        """Reads a job again and again until it has ended.

        Raises:
            GatewayAway: it did not answer for longer than a restart takes.
            GatewayError: it refused.
        """
        answered = monotonic()
        while True:
            try:
                snapshot = self.read(job_id)
            except GatewayAway:
                if monotonic() - answered > PATIENCE_S:
                    raise
                sleep(POLL_S)
                continue
            answered = monotonic()
            yield snapshot
            if snapshot.is_final:
                return
            sleep(POLL_S)

    def cancel(self, job_id: str) -> Snapshot:
        """Ends a job; one that has ended already stays as it is."""
        self._call("POST", f"/v2/{ENDPOINT}/cancel/{job_id}")
        return self.read(job_id)

    def health(self) -> Mapping[str, Any]:
        """Figures of jobs and workers."""
        return self._call("GET", f"/v2/{ENDPOINT}/health")

    def is_ready(self) -> bool:
        """The gateway and everything behind it serve."""
        try:
            return self._http.get("/readyz").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def download(self, url: str, path: Path) -> None:
        """Saves what a link shows."""
        try:
            answer = self._http.get(url)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise GatewayError(f"cannot download {path.name}: {error}") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(answer.content)

    def _call(self, method: str, path: str, **kwargs: Any) -> Mapping[str, Any]:
        try:
            answer = self._http.request(method, path, **kwargs)
        except httpx.HTTPError as error:
            raise GatewayAway(
                f"no answer from {self._http.base_url}: {error}; is the platform up?"
            ) from error
        if answer.status_code != httpx.codes.OK:
            kind = GatewayAway if answer.is_server_error else GatewayError
            raise kind(_refusal(answer))
        body: Mapping[str, Any] = answer.json()
        return body


def _refusal(answer: httpx.Response) -> str:
    try:
        body = answer.json()
    except ValueError:
        return f"the gateway answered {answer.status_code}"
    lines = [str(body.get("error", f"the gateway answered {answer.status_code}"))]
    return "\n  ".join(lines + [str(detail) for detail in body.get("details", [])])
