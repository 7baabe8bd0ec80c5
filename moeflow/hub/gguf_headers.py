"""Headers of a GGUF file at the hub: files in a folder that have its bytes as far as the headers go, and holes behind.

Knows ranges and the sizes of files. Knows nothing of what headers hold: who reads them says whether they are whole.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moeflow.errors import CheckpointError
from moeflow.hub.repository import Repository
from moeflow.hub.selection import find_gguf

_FIRST_BYTES, _MOST_BYTES = 8 << 20, 256 << 20  # of a file: a vocabulary with its merges takes a few million

Read = TypeVar("Read")


def read_remote_gguf(repository: Repository, gguf_file: str, folder: Path, read: Callable[[Path], Read]) -> Read:
    """Read the headers of a GGUF file, or of all its splits, without their tensors.

    Args:
        repository: on the hub.
        gguf_file: name of the file in it, or of any of its splits.
        folder: for files of the same names and sizes, which take no more of the disk than what was fetched.
        read: called with the first of them; more is fetched, and it is called again, while it raises CheckpointError.

    Returns:
        What `read` returned.

    Raises:
        ModelSourceError: no such file, or the hub does not give it.
        CheckpointError: the headers are damaged.
    """
    sizes = {file.name: file.size for file in repository.files}
    names = find_gguf(repository.what, sizes, gguf_file)
    there, wanted = dict.fromkeys(names, 0), _FIRST_BYTES
    while True:
        for name in names:
            end = min(wanted, sizes[name])
            if end > there[name]:
                _add(folder / name, repository.read(name, there[name], end - there[name]), there[name], sizes[name])
                there[name] = end
        try:
            return read(folder / names[0])
        except CheckpointError:
            if wanted >= min(_MOST_BYTES, max(sizes[name] for name in names)):
                raise
        wanted *= 2


def _add(path: Path, content: bytes, offset: int, size: int) -> None:
    """Write bytes of a file that has its full size from the beginning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "r+b" if offset else "wb") as file:
        os.truncate(file.fileno(), size)
        file.seek(offset)
        file.write(content)
