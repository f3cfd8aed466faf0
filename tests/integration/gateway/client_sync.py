"""What a user of the `runpod` package writes; run as a program, writes what it saw as JSON lines.

Usage: RUNPOD_ENDPOINT_BASE_URL=... client_sync.py KEY ENDPOINT INPUT HELD

INPUT is what to submit, HELD the same for a job that stays in the queue; both as JSON.
"""

import json
import sys
from typing import Any

import runpod
from runpod.endpoint.runner import Job, RunPodClient


def say(name: str, value: Any) -> None:
    sys.stdout.write(json.dumps([name, value]) + "\n")


def refused(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main(key: str, name: str, given: Any, held_input: Any) -> None:
    runpod.api_key = key
    endpoint = runpod.Endpoint(name)

    job = endpoint.run({"input": given})
    say("id", job.job_id)
    say("first status", job.status())
    say("output", job.output(timeout=30))
    say("last status", job.status())

    say("run_sync", endpoint.run_sync(given, timeout=30))
    say("stream", list(endpoint.run(given).stream()))

    held = endpoint.run(held_input)
    say("cancel", held.cancel())
    say("cancelled", held.status())

    endpoint.run(held_input)
    say("purge", endpoint.purge_queue())
    say("health", endpoint.health())

    say("bad input", refused(lambda: endpoint.run({"samples": []})))
    say("unknown job", refused(lambda: Job(name, "no-such", RunPodClient(key)).status()))
    say("unknown endpoint", refused(lambda: runpod.Endpoint("no-such").run(given)))
    say("wrong key", refused(lambda: runpod.Endpoint(name, api_key="wrong").run(given)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4]))
