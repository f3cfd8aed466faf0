"""What people see of a job: a bar while it runs, its pictures when it has ended."""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from services.cli.gateway_client import Gateway, Snapshot

WAITING = "waiting"


def show_progress(snapshots: Iterable[Snapshot], console: Console) -> Snapshot:
    """Draws a bar for each stage of a job until it has ended.

    Args:
        snapshots: the job as it moves, its end last.
        console: where to draw.

    Returns:
        The last snapshot.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<13}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.fields[numbers]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        bar, stage, total = bars.add_task(WAITING, total=100, numbers=""), WAITING, 0
        for snapshot in snapshots:
            now = snapshot.stage or (stage if snapshot.is_final else WAITING)
            if now != stage or snapshot.is_final:
                bars.update(bar, completed=100, numbers=f"{total}/{total}" if total else "")
                bars.stop_task(bar)
            if now != stage:
                bar, stage = bars.add_task(now, total=100, numbers=""), now
            if not snapshot.is_final:
                total = int(snapshot.progress.get("total_steps", 0))
                bars.update(bar, completed=snapshot.percent, numbers=_numbers(snapshot))
    return snapshot


def _numbers(snapshot: Snapshot) -> str:
    progress = snapshot.progress
    if not progress.get("total_steps"):
        return ""
    text = f"{progress['step']}/{progress['total_steps']}"
    return f"{text}, loss {progress['loss']:.4f}" if "loss" in progress else text


def save_pictures(gateway: Gateway, snapshot: Snapshot, folder: Path) -> list[Path]:
    """Downloads the pictures of a finished job.

    Args:
        gateway: where the job ran.
        snapshot: the job, COMPLETED.
        folder: where to put `<number>-seed-<seed>.png`.

    Returns:
        The files, in the order of the job's output.
    """
    output = snapshot.body["output"]
    pictures = output["samples"] if isinstance(output, dict) else output
    paths = []
    for number, picture in enumerate(pictures):
        path = folder / f"{number:02d}-seed-{picture['seed']}.png"
        gateway.download(picture["image"], path)
        paths.append(path)
    return paths
