"""The development key of an installation that is started for the first time."""

import asyncio
import contextlib
import logging
import os
import secrets
from pathlib import Path
from typing import Final

from likeness.access.v1.access_service_pb2 import Project

from services.domain.errors import InvalidSpec
from services.storage.access import Access, is_secret, new_secret

logger = logging.getLogger(__name__)

DEV_PROJECT: Final = "dev"


async def bootstrap(access: Access, path: Path) -> bool:
    """Sees to it that a file holds a working key of the development project.

    The file comes first and the key is made of it, so that a crash in between leaves nothing that does not work, and
    a key that is written down survives the loss of the store. A revoked key stays revoked.

    Args:
        access: where the key is made.
        path: the file; made with mode 0600 where it is missing.

    Returns:
        Whether a key was made.

    Raises:
        InvalidSpec: the file holds something else than a key.
    """
    secret = await asyncio.to_thread(_read_or_make, path)
    if not is_secret(secret):
        raise InvalidSpec(f"the file {path.name} does not hold a key")
    if await access.is_registered(secret):
        return False
    await access.create_project(Project(project_id=DEV_PROJECT, display_name="Development"))
    await access.create_key(DEV_PROJECT, display_name="bootstrap", secret=secret)
    logger.info("development key made", extra={"file": str(path)})
    return True


def _read_or_make(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().strip()  # perhaps a mounted secret, with no room beside it
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(making, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(new_secret() + "\n")
            file.flush()
            os.fsync(handle)
        os.link(making, path)
    except FileExistsError:
        logger.debug("key file is there already")
    finally:
        making.unlink(missing_ok=True)
    return path.read_text().strip()
