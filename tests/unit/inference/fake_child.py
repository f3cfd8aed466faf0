"""A drawing child without torch. What it does is written in the prompt, for the tests of its parent."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from services.adapters.child_process import ParentLink

PNG = b"\x89PNG fake"


def draw(link: ParentLink, command: dict[str, Any]) -> None:
    job, spec = command["job"], command["spec"]
    link.emit({"event": "loading", "model": command["model"]["digest"]})
    link.emit({"event": "models", "held": [command["model"]["digest"]]})
    prompt = spec.get("prompt", "")
    if prompt == "crash":
        os.abort()
    if prompt == "hang":
        time.sleep(600)
    if prompt == "wait":
        return
    if prompt == "refuse":
        failure = {"reason": "INVALID_SPEC", "message": "clip_skip: no", "field": "clip_skip"}
        link.emit({"event": "failed", "job": job, "retryable": False} | failure)
        return
    total = spec["num_images"]
    for number in range(total):
        link.emit({"event": "progress", "job": job, "done": number + 1, "total": total})
        path = Path(command["folder"]) / str(number)
        path.write_bytes(PNG + bytes([number]))
        facts = {"path": str(path), "media_type": "image/png", "digest": "d" * 64, "size_bytes": 10}
        facts |= {"width_px": 8, "height_px": 8, "seed": number, "number": number}
        link.emit({"event": "drawn", "job": job} | facts)
    remarks = [str(spec.get("clip_skip", 0))]
    for lora in command["loras"]:
        remarks.append(f"{lora['name']} {lora['strength']} {Path(lora['path']).read_text()}")
    for one in command["embeddings"]:
        remarks.append(f"{one['name']} {one['token']} {one['negative']} {Path(one['path']).read_text()}")
    for field, path in command["pictures"].items():
        remarks.append(f"{field} {Path(path).read_text()}")
    link.emit({"event": "finished", "job": job, "warnings": remarks, "device_s": 0.5})


def main() -> None:
    link = ParentLink.from_environ()
    if "--stillborn" in sys.argv:
        raise SystemExit(3)
    link.emit({"event": "ready", "device": "abacus", "memory_bytes": 7})
    for command in link.commands():
        if command["command"] == "draw":
            draw(link, command)
        elif command["command"] == "cancel":
            link.emit({"event": "cancelled", "job": command["job"]})


if __name__ == "__main__":
    main()
