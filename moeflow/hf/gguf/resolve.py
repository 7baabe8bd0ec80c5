"""GGUF files where users name a model: a file, one of its splits, or a folder that holds nothing else.

Knows names of files. Knows nothing of what is in them.
"""

import re
from pathlib import Path

from moeflow.checkpoint.headers import INDEX_FILE, SINGLE_FILE
from moeflow.checkpoint.packed_file import PACKED_FILE
from moeflow.errors import ModelSourceError
from moeflow.hf.gguf.folder import gguf_folder

_ENDING = ".gguf"
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE | re.DOTALL)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file by its name."""
    return path.suffix.lower() == _ENDING and path.is_file()


def gguf_folder_of(path: Path) -> Path:
    """Return the model folder of a path: the path, or the folder of small files that stands for its GGUF file.

    Args:
        path: a GGUF file, or a folder.

    Raises:
        ModelSourceError: a folder of several GGUF models.
        CheckpointError, UnsupportedModelError: see `gguf_folder`.
    """
    if not path.is_dir():
        return gguf_folder(path)
    if any((path / name).exists() for name in (SINGLE_FILE, INDEX_FILE, PACKED_FILE)):
        return path
    files = [file for file in sorted(path.iterdir()) if is_gguf(file)]
    models = {_SPLIT.sub(r"\1", file.name): file for file in reversed(files) if "mmproj" not in file.name.lower()}
    if not models:
        return path
    if len(models) > 1:
        names = ", ".join(file.name for file in sorted(models.values()))
        raise ModelSourceError(
            f"{path} holds {len(models)} GGUF models: {names:.300}. Give the file of one of them, not the folder."
        )
    return gguf_folder(*models.values())
