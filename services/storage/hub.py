"""Downloads from the model hub; the only file that knows its library.

Of a repository only what a diffusers model needs is fetched: safetensors, JSON and text, one folder deep. Single-file
checkpoints beside it, half-precision copies of what is there in full, non-EMA copies, and pickles are left where they
are.
"""

import asyncio
import re
import threading
from pathlib import Path
from typing import Any, Final

from services.domain.artifacts import HUB_REPOSITORY
from services.domain.errors import BadInput, Unavailable
from services.storage.model_files import best_weights

_PAGE: Final = re.compile(
    rf"(?P<repository>{HUB_REPOSITORY.pattern})(?:/tree/(?P<revision>[\w.-]+))?", re.ASCII
)
ALLOWED: Final = ("model_index.json", "*/*.json", "*/*.txt")
IGNORED: Final = ("*/*/*",)


def repository_of(address: str, endpoint: str | None = None) -> tuple[str, str] | None:
    """Tells a repository of the hub from other addresses.

    Args:
        address: `OWNER/NAME`, or the address of a page of the hub.
        endpoint: address of the hub; None: its own.

    Returns:
        The repository and the revision that the page is of (empty: not told); None for an address of anything else,
        a single file of a repository included.
    """
    if HUB_REPOSITORY.fullmatch(address):
        return address, ""
    from huggingface_hub import constants

    root = (endpoint or constants.ENDPOINT).rstrip("/") + "/"
    if not address.startswith(root):
        return None
    page = _PAGE.fullmatch(address.removeprefix(root).split("?")[0].rstrip("/"))
    return (page["repository"], page["revision"] or "") if page else None


async def download(
    name: str, folder: Path, endpoint: str | None = None, *, subfolder: str = "", max_bytes: int = 0
) -> str:
    """Fetches a model.

    Args:
        name: `REPO`, or `REPO@REVISION`.
        folder: where its files go.
        endpoint: address of the hub; None: its own.
        subfolder: folder of the repository that holds the pipeline; it stays one below `folder`. Empty: the root.
        max_bytes: more than this is not fetched; 0: no limit.

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
            value = _download(name, folder, endpoint, subfolder.strip("/"), max_bytes)
        except Exception as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, failure)

    # A thread of the loop's own pool would keep a process from ending before the download does.
    threading.Thread(target=work, name="hub-download", daemon=True).start()
    return await result


def _download(name: str, folder: Path, endpoint: str | None, subfolder: str, max_bytes: int) -> str:
    # Imported here: it takes a third of a second, and most installations never ask the hub.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = name.partition("@")
    try:
        info = HfApi(endpoint=endpoint).model_info(
            repo, revision=revision or None, files_metadata=max_bytes > 0
        )
        commit = info.sha
        root = f"{subfolder}/" if subfolder else ""
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        inner = [path.removeprefix(root) for path in sizes if path.startswith(root)]
        weights = [root + stored for stored in best_weights(inner).values()]
        if max_bytes and sum(sizes[path] for path in weights) > max_bytes:
            raise BadInput(f"the weights of {name} take more than {max_bytes} bytes")
        options: dict[str, Any] = {
            "allow_patterns": [*(root + pattern for pattern in ALLOWED), *weights],
            "ignore_patterns": [root + pattern for pattern in IGNORED],
        }
        snapshot_download(repo, revision=commit, local_dir=folder, endpoint=endpoint, **options)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise BadInput(f"the hub has no model {name} that may be read") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise Unavailable(f"the hub did not give the model {name}") from error
    return f"hf:{repo}@{commit}"
