"""What a user of the `runpod` package writes; run as a program, writes what it saw as JSON lines.

Usage: RUNPOD_ENDPOINT_BASE_URL=... client_sync.py KEY
"""

import json
import sys
from typing import Any

import runpod
from runpod.endpoint.runner import Job, RunPodClient

INPUT = {
    "concepts": [
        {
            "instance_data": "https://files.example.org/rex.zip",
            "instance_prompt": "photo of zkw dog",
            "class_prompt": "photo of a dog",
        }
    ],
    "samples": [{"prompt": "zkw dog on the moon", "num_outputs": 2, "seed": 11}],
}


def say(name: str, value: Any) -> None:
    sys.stdout.write(json.dumps([name, value]) + "\n")


def refused(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main(key: str) -> None:
    runpod.api_key = key
    endpoint = runpod.Endpoint("dream-booth-v1")

    job = endpoint.run({"input": INPUT})
    say("id", job.job_id)
    say("first status", job.status())
    say("output", job.output(timeout=30))
    say("last status", job.status())

    say("run_sync", endpoint.run_sync(INPUT, timeout=30))
    say("stream", list(endpoint.run(INPUT | {"num_train_epochs": 7}).stream()))

    held = endpoint.run(INPUT | {"max_train_steps": 99999})
    say("cancel", held.cancel())
    say("cancelled", held.status())

    endpoint.run(INPUT | {"max_train_steps": 99999})
    say("purge", endpoint.purge_queue())
    say("health", endpoint.health())

    say("bad input", refused(lambda: endpoint.run({"samples": []})))
    say("unknown job", refused(lambda: Job("dream-booth-v1", "no-such", RunPodClient(key)).status()))
    say("unknown endpoint", refused(lambda: runpod.Endpoint("no-such").run(INPUT)))
    say("wrong key", refused(lambda: runpod.Endpoint("dream-booth-v1", api_key="wrong").run(INPUT)))


if __name__ == "__main__":
    main(sys.argv[1])
