"""The `likeness` command: train, look after jobs, find out what is wrong; against a gateway, with a key."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from services.adapters.settings import CliSettings, load_or_exit
from services.cli.gateway_client import Gateway, GatewayError, Snapshot
from services.cli.show import save_pictures, show_progress

app = typer.Typer(help="Teach an image model somebody's likeness, and draw it.", no_args_is_help=True)
jobs = typer.Typer(help="Look after jobs.", no_args_is_help=True)
app.add_typer(jobs, name="jobs")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
JobId = Annotated[str, typer.Argument(help="Id of the job.")]


@app.command()
def train(
    pictures: Annotated[str, typer.Argument(help="URL of a zip of pictures of the subject.")],
    prompt: Annotated[str, typer.Option(help="What they show, with a made-up name: 'photo of zkw dog'.")],
    class_prompt: Annotated[str, typer.Option(help="What kind of thing it is: 'photo of a dog'.")],
    sample: Annotated[list[str], typer.Option(help="Prompt of a picture to draw afterwards; repeatable.")],
    steps: Annotated[int, typer.Option(help="Optimizer updates.")] = 2000,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-6,
    resolution: Annotated[int, typer.Option(help="Side of the training square, pixels.")] = 512,
    class_images: Annotated[int, typer.Option(help="Pictures of the class that keep it from drifting.")] = 50,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out"),
    wait: Annotated[bool, typer.Option(help="Stay until the job has ended.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train on pictures of a subject and draw it in new scenes."""
    concept = {
        "instance_data": pictures,
        "instance_prompt": prompt,
        "class_prompt": class_prompt,
        "num_class_images": class_images,
    }
    request = {
        "input": {
            "concepts": [concept],
            "samples": [{"prompt": text} for text in sample],
            "max_train_steps": steps,
            "learning_rate": learning_rate,
            "resolution": resolution,
        }
    }
    with _gateway() as gateway:
        job_id = gateway.submit(request)
        if not wait:
            _print({"id": job_id}, f"submitted: {job_id}", as_json)
            return
        console = Console(stderr=as_json)
        ended = show_progress(gateway.follow(job_id), console)
        _exit_unless_completed(ended, as_json)
        paths = save_pictures(gateway, ended, out)
        _print(ended.body, "\n".join(str(path) for path in paths), as_json)


@jobs.command()
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show a job."""
    with _gateway() as gateway:
        snapshot = gateway.read(job_id)
    _print(snapshot.body, _in_words(snapshot), as_json)


@jobs.command()
def watch(job_id: JobId) -> None:
    """Follow a job until it has ended."""
    with _gateway() as gateway:
        _exit_unless_completed(show_progress(gateway.follow(job_id), Console()), as_json=False)


@jobs.command()
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """End a job."""
    with _gateway() as gateway:
        snapshot = gateway.cancel(job_id)
    _print(snapshot.body, _in_words(snapshot), as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say whether the platform serves, and what its queue and workers are doing."""
    with _gateway() as gateway:
        if not gateway.is_ready():
            raise GatewayError("the platform is not ready: see its log, or /readyz for what is missing")
        health = gateway.health()
    numbers = [f"{name} {count}" for part in ("jobs", "workers") for name, count in health[part].items()]
    _print(health, "ready; " + ", ".join(numbers), as_json)


def main() -> None:
    """Runs the command; a refusal is one message and exit status 1."""
    try:
        app()
    except GatewayError as error:
        Console(stderr=True).print(str(error), style="red", highlight=False)
        raise SystemExit(1) from None


def _gateway() -> Gateway:
    settings = load_or_exit(CliSettings)
    key_file = settings.home / "api-key"
    key = settings.api_key.get_secret_value() or (key_file.read_text().strip() if key_file.exists() else "")
    return Gateway(settings.url, key)


def _exit_unless_completed(snapshot: Snapshot, as_json: bool) -> None:
    if snapshot.status != "COMPLETED":
        _print(snapshot.body, _in_words(snapshot), as_json)
        raise SystemExit(1)


def _in_words(snapshot: Snapshot) -> str:
    parts = [snapshot.status, snapshot.stage, str(snapshot.body.get("error", ""))]
    return ": ".join(part for part in parts if part)


def _print(body: Any, text: str, as_json: bool) -> None:
    print(json.dumps(body, indent=2) if as_json else text)


if __name__ == "__main__":
    main()
