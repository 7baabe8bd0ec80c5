"""Names of GGUF files: which of a folder's or a repository's are models, and which are splits of one.

Knows names. Knows nothing of what is in the files.
"""

import re
from collections.abc import Iterable, Mapping

from moeflow.formatting import format_bytes

ENDING = ".gguf"
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
_NO_MODELS = ("mmproj", "imatrix")  # parts of names: an encoder of images, counts that a quantiser used
_MOST_LISTED = 40


def gguf_models(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the models among names of files: {first file of each: all its files, in order}.

    Args:
        names: with or without folders, written with slashes.
    """
    models: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(ENDING) and not any(part in name.rpartition("/")[2].lower() for part in _NO_MODELS):
            split = _SPLIT.fullmatch(name)
            models.setdefault((split[1], split[3]) if split else (name,), []).append(name)
    return {files[0]: files for files in models.values()}


def split_names(name: str) -> list[str]:
    """Return the names of all files of a model.

    Args:
        name: of its file, or of any of its splits.
    """
    split = _SPLIT.fullmatch(name)
    if split is None:
        return [name]
    ending = name[-len(ENDING) :]
    return [f"{split[1]}-{number:05d}-of-{split[3]}{ending}" for number in range(1, int(split[3]) + 1)]


def list_models(sizes: Mapping[str, int]) -> str:
    """Write the models among files, the largest first, each with its size.

    Args:
        sizes: {name of a file: its bytes}.
    """
    models = {first: sum(sizes[name] for name in files) for first, files in gguf_models(sizes).items()}
    ordered = sorted(models, key=lambda name: (-models[name], name))
    listed = [f"{name[:200]} ({format_bytes(models[name])})" for name in ordered[:_MOST_LISTED]]
    if len(ordered) > _MOST_LISTED:
        listed.append(f"and {len(ordered) - _MOST_LISTED} more")
    return ", ".join(listed)
