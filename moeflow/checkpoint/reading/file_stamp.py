"""Tells whether a file on disk is still the one that was looked at before.

Knows files. Knows nothing of what is in them.
"""

import os
from pathlib import Path
from typing import NamedTuple

from moeflow.errors import CheckpointError


class FileStamp(NamedTuple):
    """What changes when a file is replaced by another, written anew in place, or cut.

    Args:
        device: of the filesystem.
        inode: of the file on it.
        num_bytes: its size.
        mtime_ns: when its bytes were last written, in nanoseconds since 1970.
    """

    device: int
    inode: int
    num_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> "FileStamp":
        """Look at a file by its name or its descriptor.

        Raises:
            OSError: it is not there.
        """
        status = os.stat(file)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def change_to(self, now: "FileStamp") -> str:
        """Say in a few words what changed."""
        if self[:2] != now[:2]:
            return "another file has its name now"
        if self.num_bytes != now.num_bytes:
            return f"it had {self.num_bytes:,} bytes and has {now.num_bytes:,}"
        return "it was written to"


def check_stamps(files: list[Path], before: list[FileStamp], now: list[FileStamp]) -> None:
    """Refuse files that changed while a model was opened.

    Args:
        files: their names.
        before: [len(files)], when their headers were read.
        now: [len(files)].

    Raises:
        CheckpointError: one is another file, or was written to; the message names the first.
    """
    for file, stamp, found in zip(files, before, now, strict=True):
        if found != stamp:
            raise CheckpointError(
                f"{file} changed on disk while it was opened ({stamp.change_to(found)}). Run it again when the files "
                "no longer change."
            )


def check_unchanged(files: list[Path], before: list[FileStamp]) -> None:
    """Look at a model's files again and refuse those that changed.

    Args:
        files: their names.
        before: [len(files)], when their headers were read.

    Raises:
        CheckpointError: one is another file, was written to, or is gone; the message names the first.
    """
    try:
        now = [FileStamp.of(file) for file in files]
    except OSError as error:
        raise CheckpointError(f"{error.filename} is gone since its header was read. Run it again.") from None
    check_stamps(files, before, now)
