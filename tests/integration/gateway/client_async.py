"""The same with the package's asynchronous client.

Usage: RUNPOD_ENDPOINT_BASE_URL=... client_async.py KEY
"""

import asyncio
import json
import sys
from typing import Any

import aiohttp
import runpod
from runpod import AsyncioEndpoint

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


async def main(key: str) -> None:
    runpod.api_key = key
    async with aiohttp.ClientSession() as session:
        endpoint = AsyncioEndpoint("dream-booth-v1", session)
        job = await endpoint.run(INPUT)
        say("id", job.job_id)
        say("first status", await job.status())
        say("output", await job.output(timeout=30))
        say("last status", await job.status())
        job = await endpoint.run(INPUT | {"num_train_epochs": 7})
        say("stream", [chunk async for chunk in job.stream()])
        held = await endpoint.run(INPUT | {"max_train_steps": 99999})
        say("cancel", await held.cancel())
        await endpoint.run(INPUT | {"max_train_steps": 99999})
        say("purge", await endpoint.purge_queue())
        say("health", await endpoint.health())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
