"""Downloads from the model hub; the only file that knows its library.

Of a repository only what a diffusers model needs is fetched: safetensors, JSON and text, one folder deep. Single-file
checkpoints beside it, half-precision copies of what is there in full, non-EMA copies, and pickles are left where they
are.
"""

import asyncio
import threading
from pathlib import Path
from typing import Any, Final

from services.domain.errors import BadInput, Unavailable
from services.storage.model_files import best_weights

ALLOWED: Final = ("model_index.json", "*/*.json", "*/*.txt")
IGNORED: Final = ("*/*/*",)


async def download(name: str, folder: Path, endpoint: str | None = None) -> str:
    """Fetches a model.

    Args:
        name: `REPO`, or `REPO@REVISION`.
        folder: where its files go.
        endpoint: address of the hub; None: its own.

    Returns:
        `hf:REPO@COMMIT`, the very state that was fetched.

    Raises:
        BadInput: there is no such repository or revision, or it may not be read.
        Unavailable: the hub does not answer.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[str] = loop.create_future()

    def settle(value: str | None, error: Exception | None) -> None:
        if result.done():
            return
        result.set_exception(error) if error else result.set_result(value or "")

    def work() -> None:
        value, failure = None, None
        try:
            value = _download(name, folder, endpoint)
        except Exception as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, failure)

    # A thread of the loop's own pool would keep a process from ending before the download does.
    threading.Thread(target=work, name="hub-download", daemon=True).start()
    return await result


def _download(name: str, folder: Path, endpoint: str | None) -> str:
    # Imported here: it takes a third of a second, and most installations never ask the hub.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = name.partition("@")
    try:
        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision or None)
        commit = info.sha
        weights = best_weights(file.rfilename for file in info.siblings or ())
        options: dict[str, Any] = {
            "allow_patterns": [*ALLOWED, *weights.values()],
            "ignore_patterns": list(IGNORED),
        }
        snapshot_download(repo, revision=commit, local_dir=folder, endpoint=endpoint, **options)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise BadInput(f"the hub has no model {name} that may be read") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise Unavailable(f"the hub did not give the model {name}") from error
    return f"hf:{repo}@{commit}"
