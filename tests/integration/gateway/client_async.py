"""The same with the package's asynchronous client.

Usage: RUNPOD_ENDPOINT_BASE_URL=... client_async.py KEY ENDPOINT INPUT HELD

INPUT is what to submit, HELD the same for a job that stays in the queue; both as JSON.
"""

import asyncio
import json
import sys
from typing import Any

import aiohttp
import runpod
from runpod import AsyncioEndpoint


def say(name: str, value: Any) -> None:
    sys.stdout.write(json.dumps([name, value]) + "\n")


async def main(key: str, name: str, given: Any, held_input: Any) -> None:
    runpod.api_key = key
    async with aiohttp.ClientSession() as session:
        endpoint = AsyncioEndpoint(name, session)
        job = await endpoint.run(given)
        say("id", job.job_id)
        say("first status", await job.status())
        say("output", await job.output(timeout=30))
        say("last status", await job.status())
        job = await endpoint.run(given)
        say("stream", [chunk async for chunk in job.stream()])
        held = await endpoint.run(held_input)
        say("cancel", await held.cancel())
        await endpoint.run(held_input)
        say("purge", await endpoint.purge_queue())
        say("health", await endpoint.health())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])))
