"""`python -m services.launcher`: the embedded platform, everything on one machine until Ctrl-C.

Owns processes, not work: it starts nats-server and the services, restarts what dies, and stops them in order. Should
it be killed itself, everything it started dies with it; nothing is lost, since all state is in the data folder.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time

from services.adapters.settings import LauncherSettings, load_or_exit
from services.launcher import plan
from services.launcher.home import Home, InUse
from services.launcher.supervisor import StartFailed, Supervisor

EXTRA_GRACE_S = 5.0
"""Time a program gets beyond the grace that it gives its own calls."""


def main() -> int:
    """Serves until a signal comes.

    Returns:
        Exit status: 0 after a signal, 1 when the platform could not start or could not be kept running.
    """
    parser = argparse.ArgumentParser(prog="likeness-platform", description="the embedded platform")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more than warnings")
    verbose = parser.parse_args().verbose
    settings = load_or_exit(LauncherSettings)
    home = Home(settings.home)
    try:
        with home.locked():
            _refuse_taken(settings)
            asyncio.run(_serve(settings, home, verbose))
    except (InUse, StartFailed) as error:
        _say(f"cannot start: {error}")
        return 1
    return 0


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _refuse_taken(settings: LauncherSettings) -> None:
    faults = plan.taken(plan.addresses(settings))
    if faults:
        raise StartFailed("\n  ".join(faults))


async def _serve(settings: LauncherSettings, home: Home, verbose: bool) -> None:
    stopping = _signalled()
    url = settings.public_url or f"http://{settings.http_addr}"
    supervisor = Supervisor(
        plan.stages(settings, home, os.environ),
        logs=home.logs,
        grace_s=settings.grace_s + EXTRA_GRACE_S,
        show=lambda name, line, severe: (
            _say(f"{time.strftime('%H:%M:%S')} {name}: {line}") if severe or verbose else None
        ),
        changed=lambda pids: home.write_state(url, pids),
    )
    running = asyncio.create_task(_run(supervisor, settings, home, url))
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
    finally:
        running.cancel()
        await _stop(supervisor)
        home.clear_state()


async def _run(supervisor: Supervisor, settings: LauncherSettings, home: Home, url: str) -> None:
    await supervisor.start()
    _tell_ready(settings, home, url)
    await supervisor.watch()


def _signalled() -> "asyncio.Future[None]":
    """A future that ends at the first SIGINT or SIGTERM."""
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _end, stopping)
    return stopping


def _end(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


async def _stop(supervisor: Supervisor) -> None:
    """Stops in order; a second signal stops at once."""
    again = _signalled()
    ending = asyncio.create_task(supervisor.stop())
    if supervisor.pids:
        _say("stopping; once more stops at once")
    await asyncio.wait({ending, again}, return_when=asyncio.FIRST_COMPLETED)
    if not ending.done():
        supervisor.kill_all()
    await ending


def _tell_ready(settings: LauncherSettings, home: Home, url: str) -> None:
    if settings.ready_fd is not None:
        with contextlib.suppress(OSError):
            os.write(settings.ready_fd, b"ready\n")
            os.close(settings.ready_fd)
    if not home.api_key.is_file():
        raise StartFailed(f"storage made no key in {home.api_key}")
    sys.stdout.write(
        welcome(url, home.api_key.read_text().strip(), str(home.api_key), settings.examples_address)
    )
    sys.stdout.flush()


def welcome(url: str, key: str, key_file: str, examples_addr: str) -> str:
    """What a person sees once the platform serves.

    Args:
        url: where the gateway answers.
        key: the development key.
        key_file: where the key is kept.
        examples_addr: where the example pictures are served.

    Returns:
        Text with three commands that can be pasted into a shell.
    """
    body = {
        "input": {
            "concepts": [
                {
                    "instance_data": f"http://{examples_addr}/{plan.EXAMPLE_ARCHIVE}",
                    "instance_prompt": "a photo of a sks robot",
                    "class_prompt": "a robot",
                    "num_class_images": 8,
                }
            ],
            "samples": [{"prompt": "a photo of a sks robot on the beach", "infer_steps": 20, "seed": 11}],
            "max_train_steps": 150,
            "train_batch_size": 4,
            "learning_rate": 3e-4,
            "pad_tokens": True,
        }
    }
    header = f"-H 'Authorization: Bearer {key}'"
    return "\n".join(
        [
            "",
            f"Likeness serves at {url}",
            f"API key: {key}   (kept in {key_file})",
            "",
            "Is it well?",
            f"  curl -s {url}/healthz",
            "Train on the bundled example:",
            f"  curl -s {url}/v1/dream-booth-v1/run {header} -H 'Content-Type: application/json' \\",
            f"    -d '{json.dumps(body)}'",
            "See how it goes (put the id from the answer above in place of ID):",
            f"  curl -s {url}/v1/dream-booth-v1/status/ID {header}",
            "",
            "Ctrl-C stops it.",
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
