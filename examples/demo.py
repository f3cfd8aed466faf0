"""`make demo`: the main job on this machine, from pictures to pictures, over HTTP.

Starts the embedded platform with data of its own, trains on the bundled robot, shows the progress, saves the pictures
to `out/`, and stops everything again.
"""

import os
import sys
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from services.cli.gateway_client import Gateway, GatewayError
from services.cli.show import save_pictures, show_progress
from services.launcher.platform import Platform, PlatformFailed

OUT: Final = Path("out")
HOME: Final = Path(os.environ.get("LIKENESS_HOME", ".likeness")) / "demo"

REQUEST_INPUT: Final = {
    "samples": [
        {"prompt": "sks robot on the beach", "seed": 11, "infer_steps": 20},
        {"prompt": "sks robot at night", "seed": 12, "infer_steps": 20, "scheduler": "DPMSolverMultistep"},
        {
            "prompt": "a drawing of sks robot in the snow",
            "seed": 13,
            "infer_steps": 20,
            "scheduler": "K_EULER",
        },
    ],
    "max_train_steps": 60,
    "learning_rate": 1e-4,
}
CONCEPT: Final = {
    "instance_prompt": "a photo of sks robot",
    "class_prompt": "a photo of a robot",
    "num_class_images": 4,
}
NOISE: Final = (
    "The embedded base model has random weights so far: these pictures are noise. They show that the whole way works, "
    "not what a trained base draws; name one with LIKENESS_BASE_MODEL and LIKENESS_MODELS."
)


def main() -> int:
    """Runs the demo.

    Returns:
        Exit status: 0 when the pictures are there.
    """
    console = Console()
    console.print("starting the platform: NATS, storage, trainer, inference, gateway ...")
    try:
        with Platform(HOME.absolute()) as platform, Gateway(platform.url, platform.api_key) as gateway:
            console.print(f"serving at {platform.url}; training on {platform.example_url}")
            return _train_and_save(gateway, platform.example_url, console)
    except (GatewayError, PlatformFailed) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        return 1


def _train_and_save(gateway: Gateway, archive: str, console: Console) -> int:
    concept: dict[str, Any] = CONCEPT | {"instance_data": archive}
    job_id = gateway.submit({"input": {"concepts": [concept], **REQUEST_INPUT}})
    ended = show_progress(gateway.follow(job_id), console)
    if ended.status != "COMPLETED":
        console.print(
            f"the job ended {ended.status}: {ended.body.get('error', '')}", style="red", markup=False
        )
        return 1
    waited, worked = ended.body["delayTime"] / 1000, ended.body["executionTime"] / 1000
    console.print(f"done: waited {waited:.1f} s, worked {worked:.1f} s; the pictures:")
    for path in save_pictures(gateway, ended, OUT):
        console.print(f"  {path}")
    console.print(NOISE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
