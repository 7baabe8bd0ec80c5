"""The journal of a pack run: which tensors and records of the files beside it are done, and of which run they are.

Each line is written after what it stands for. What a journal says is believed only where the bytes on disk agree.

Knows files. Knows nothing of what is in them.
"""

import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from moeflow.errors import ConfigError

JOURNAL = "experts.journal"
_LINE_BYTES = 9
_READ_BYTES = 16 << 20


class PackJournal:
    """Checksums of the parts of a partial folder, in the order of writing, under the run they belong to.

    Args:
        folder: the partial folder; it is made where it does not exist.
        run: names everything that decides the parts' bytes.

    Raises:
        ConfigError: the folder holds files and no journal: another program's.
        OSError: it cannot be made or read.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        self._head = f"{run}\n".encode()
        self._file: BinaryIO | None = None
        if folder.is_dir() and not (folder / JOURNAL).is_file() and any(folder.iterdir()):
            raise ConfigError(
                f"{folder} holds something that moeflow pack did not write. Remove it or choose another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.sums = self._read()  # of each part that is done

    def keep_intact(self, places: list[tuple[Path, int, int]], on_part: Callable[[int], None]) -> None:
        """Keep the parts whose bytes agree, up to the first that does not, and nothing else; then open to append.

        Args:
            places: (file, offset, bytes) of every part, in the order of writing.
            on_part: called with the number of each part that agrees.

        Raises:
            OSError: the folder cannot be read or written.
        """
        kept, files = 0, {file for file, _, _ in places}
        with ExitStack() as stack:
            handles = {file: stack.enter_context(open(file, "rb")) for file in files if self.sums and file.is_file()}
            for value, (file, offset, num_bytes) in zip(self.sums, places, strict=False):
                if file not in handles:
                    break
                handles[file].seek(offset)
                if _checksum(handles[file], num_bytes) != value:
                    break
                on_part(kept)
                kept += 1
        for other in self.folder.iterdir():  # the journal stays: it says whose the folder is
            if other.name != JOURNAL and not (kept and other in files):
                shutil.rmtree(other) if other.is_dir() and not other.is_symlink() else other.unlink()
        self._file = open(self.folder / JOURNAL, "r+b" if self.sums else "wb", buffering=0)  # noqa: SIM115
        self.sums = self.sums[:kept]
        if kept:
            self._file.truncate(len(self._head) + kept * _LINE_BYTES)
            self._file.seek(0, os.SEEK_END)
        else:
            self._file.truncate(0)
            self._file.write(self._head)

    def add(self, value: int) -> None:
        """Note the next part, which is in its file.

        Raises:
            OSError: the disk is full or failed.
        """
        assert self._file is not None, "keep_intact opens the journal"
        self._file.write(f"{value:08x}\n".encode())
        self.sums.append(value)

    def sync(self) -> None:
        """Wait until it is on the disk.

        Raises:
            OSError: the disk is full or failed.
        """
        assert self._file is not None, "keep_intact opens the journal"
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; it stays."""
        if self._file is not None:
            self._file.close()

    def _read(self) -> list[int]:
        if not is_of_run(self.folder, self._head.decode().strip()):
            return []
        found = []
        for line in (self.folder / JOURNAL).read_bytes()[len(self._head) :].split(b"\n")[:-1]:  # no line that was cut
            if len(line) != _LINE_BYTES - 1 or not set(line) <= set(b"0123456789abcdef"):
                break
            found.append(int(line, 16))
        return found


def is_of_run(folder: Path, run: str) -> bool:
    """Tell whether a folder holds the journal of a run."""
    try:
        return (folder / JOURNAL).read_bytes().startswith(f"{run}\n".encode())
    except OSError:
        return False


def _checksum(handle: BinaryIO, num_bytes: int) -> int | None:
    """Return the CRC-32 of the next bytes; None where the file ends before them."""
    value = 0
    while num_bytes:
        chunk = handle.read(min(num_bytes, _READ_BYTES))
        if not chunk:
            return None
        value, num_bytes = zlib.crc32(chunk, value), num_bytes - len(chunk)
    return value
