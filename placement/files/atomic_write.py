"""Files written whole or not at all: a reader sees the old file or the new one."""

import os
from pathlib import Path

from moeflow.errors import PlacementError


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it.

    Raises:
        PlacementError: the folder is not there or not the user's, or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise PlacementError(
            f"{path} cannot be written: {error.strerror}. Give a file in a folder of yours."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
