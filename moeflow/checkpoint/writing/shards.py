"""The shards that a packed folder is written from: on this disk already, or on it only while they are needed.

Knows files and room on disks. Knows nothing of what shards hold.
"""

import shutil
from pathlib import Path
from typing import Any, Protocol

from moeflow.checkpoint.reading.file_stamp import FileStamp
from moeflow.errors import ConfigError


class Shards(Protocol):
    """A checkpoint's shards. The writer plans its turns, then takes and drops one after another.

    Attributes:
        names: what tells them from others of the same headers; JSON.
        stamps: of the files, where they stay the same all the time; else None.
    """

    names: list[Any]
    stamps: list[FileStamp] | None

    def plan(self, turns: list[frozenset[int]], folder: Path, more_bytes: int) -> None:
        """Learn which shards each turn needs.

        Args:
            turns: numbers of shards, in the order of turns.
            folder: that is written.
            more_bytes: that will be written there.

        Raises:
            MoeflowError: there is no room.
        """

    def take(self, turn: int) -> list[Path]:
        """Return the files, by number, of which those that a turn needs are whole.

        Raises:
            MoeflowError: one cannot be had.
        """

    def drop(self, turn: int) -> None:
        """Hear that all that a turn writes is safe on the disk."""

    def finish(self) -> None:
        """Hear that the folder is whole and has its name."""


class LocalShards:
    """Shards that are on this disk, and stay there.

    Args:
        files: the shards.
        stamps: of them.
    """

    def __init__(self, files: list[Path], stamps: list[FileStamp]) -> None:
        self.files = files
        self.stamps: list[FileStamp] | None = stamps
        self.names = [name_of(file) for file in files]

    def plan(self, turns: list[frozenset[int]], folder: Path, more_bytes: int) -> None:
        """Refuse a disk without room."""
        free = shutil.disk_usage(folder).free
        if more_bytes > free:
            raise ConfigError(
                f"packing needs {more_bytes:,} more bytes in {folder.parent}, {free:,} are free. Make room."
            )

    def take(self, turn: int) -> list[Path]:
        """Return the shards."""
        return self.files

    def drop(self, turn: int) -> None:
        """Do nothing: they stay."""

    def finish(self) -> None:
        """Do nothing: they stay."""


def name_of(file: Path) -> tuple[str, int, int, int]:
    """Return what tells a file from others that had its name."""
    stat = file.stat()
    return file.name, stat.st_size, stat.st_mtime_ns, stat.st_ino
