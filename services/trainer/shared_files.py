"""Which files a trained model has in common with its base, by path alone. Without torch.

The trainer lays a model out so to read it back, the worker lists it so in its manifest.
"""

from collections.abc import Collection, Iterable
from fnmatch import fnmatch

from services.domain.artifacts import ADAPTER_PATTERN, SINGLE_FILE_CONFIG, SINGLE_FILE_NAME

_MOVED_UP = ("tokenizer/", "scheduler/")


def shared_paths(base: Iterable[str], *, changed: Collection[str], low_rank: bool) -> dict[str, str]:
    """Returns where the base's files lie in the trained model's folder.

    A LoRA keeps all of its base. A whole part that was trained has the base's LoRA files of that part in its weights
    already. Of a base that is one file, only tokenizer and scheduler are shared, where a diffusers folder has them: all
    weights come from the training's export.

    Args:
        base: the base's files, relative to its folder.
        changed: the parts that were trained.
        low_rank: they were trained by adapters.

    Returns:
        New path -> path in the base.
    """
    paths = list(base)
    if low_rank:
        return {path: path for path in paths}
    if is_single_file(paths):
        prefix = f"{SINGLE_FILE_CONFIG}/"
        inner = {path.removeprefix(prefix): path for path in paths if path.startswith(prefix)}
        return {new: path for new, path in inner.items() if new.startswith(_MOVED_UP)}
    merged = [f"{part}/{ADAPTER_PATTERN}" for part in changed]
    return {path: path for path in paths if not any(fnmatch(path, pattern) for pattern in merged)}


def part_folder(base: Iterable[str], part: str) -> str:
    """Returns the folder of a part's files beside which its LoRA files lie."""
    return f"{SINGLE_FILE_CONFIG}/{part}" if is_single_file(base) else part


def is_single_file(base: Iterable[str]) -> bool:
    """Whether the base's weights are one file in the original layout."""
    return SINGLE_FILE_NAME in set(base)
