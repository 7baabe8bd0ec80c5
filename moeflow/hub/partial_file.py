"""A file that is being fetched: its bytes under another name, and a journal of the pieces that are there.

Pieces outlive a kill of the process: what the journal names was written before. After a loss of power the journal may
name pieces that never reached the disk; the checksum of the whole file tells then.

Knows files. Knows nothing of where bytes come from.
"""

import hashlib
import json
import os
from pathlib import Path

from moeflow.atomic_file import sync_folder, write_all
from moeflow.hub.repository import RepositoryFile

PIECE_BYTES = 2 << 20  # four are on their way at once: a kill loses at most 8 MiB
_FORMAT = 1
_BLOCK_BYTES = 1 << 20


class PartialFile:
    """A file's pieces on disk. Threads may write different pieces at once; all else is for one thread at a time.

    Args:
        folder: of the partial file and its journal.
        file: that is fetched.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, file: RepositoryFile) -> None:
        self.path = folder / f"{file.etag}.partial"
        self._journal_path = journal_of(self.path)
        self._file = file
        self.done = pieces_there(folder, file)
        flags = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self._bytes = os.open(self.path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        try:
            self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | flags, 0o666)
        except OSError:
            os.close(self._bytes)
            raise
        self._descriptors = [self._bytes, self._journal]
        if not self.done:
            self.restart()

    @property
    def num_pieces(self) -> int:
        """How many pieces the file has; an empty one has none."""
        return -(-self._file.size // PIECE_BYTES)

    def span(self, piece: int) -> tuple[int, int]:
        """Return where a piece begins and ends."""
        return piece * PIECE_BYTES, min(self._file.size, (piece + 1) * PIECE_BYTES)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes of a piece.

        Raises:
            OSError: the disk is full or failed.
        """
        left = memoryview(data)
        while left:
            count = os.pwrite(self._bytes, left, offset)
            left, offset = left[count:], offset + count

    def finish(self, piece: int) -> None:
        """Note that all of a piece is written.

        Raises:
            OSError: the disk is full or failed.
        """
        write_all(self._journal, f"{piece}\n".encode())
        self.done.add(piece)

    def restart(self) -> None:
        """Forget all pieces.

        Raises:
            OSError: the disk is full or failed.
        """
        self.done = set()
        os.ftruncate(self._journal, 0)
        os.ftruncate(self._bytes, 0)
        write_all(self._journal, _head(self._file))

    def feed(self, digest: "hashlib._Hash", piece: int) -> None:
        """Give a piece's bytes to a digest.

        Raises:
            OSError: the disk failed.
        """
        begin, end = self.span(piece)
        while begin < end:
            data = os.pread(self._bytes, min(_BLOCK_BYTES, end - begin), begin)
            if not data:
                return  # the digest is wrong then
            digest.update(data)
            begin += len(data)

    def complete(self, target: Path) -> None:
        """Give the file its final name, safe on the disk, and remove the journal.

        Raises:
            OSError: the disk failed, or the folder of the target cannot be written.
        """
        os.fsync(self._bytes)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path, target)
        sync_folder(target.parent)
        self.close()
        self._journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files; they stay."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)


def new_digest(file: RepositoryFile) -> "hashlib._Hash":
    """Return the digest whose value for a whole file is its sha256, or else what git names it by.

    Args:
        file: as the repository lists it.
    """
    if file.sha256 is not None or len(file.etag) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def journal_of(partial: Path) -> Path:
    """Return where the journal of a partial file lies."""
    return partial.with_suffix(".journal")


def pieces_there(folder: Path, file: RepositoryFile) -> set[int]:
    """Return the pieces of a file that an earlier run wrote.

    Args:
        folder: of partial files.
        file: as the repository lists it.
    """
    path = folder / f"{file.etag}.partial"
    try:
        text, size = journal_of(path).read_bytes(), path.stat().st_size
    except OSError:
        return set()
    if not text.startswith(_head(file)):
        return set()
    last = -(-file.size // PIECE_BYTES)
    lines = text[len(_head(file)) :].split(b"\n")[:-1]  # no line that was cut
    numbers = {int(line) for line in lines if line.isdigit() and len(line) < 12}
    return {piece for piece in numbers if piece < last and min(file.size, (piece + 1) * PIECE_BYTES) <= size}


def bytes_there(folder: Path, file: RepositoryFile) -> int:
    """Return how many bytes of a file an earlier run wrote."""
    pieces = pieces_there(folder, file)
    return sum(min(file.size, (piece + 1) * PIECE_BYTES) - piece * PIECE_BYTES for piece in pieces)


def name_in_journal(journal: Path) -> str | None:
    """Return the name of the file that a journal is of, None where it is no journal."""
    try:
        with open(journal, "rb") as file:
            name = json.loads(file.readline())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def _head(file: RepositoryFile) -> bytes:
    head = {"format": _FORMAT, "name": file.name, "etag": file.etag, "size": file.size, "piece": PIECE_BYTES}
    return json.dumps(head).encode() + b"\n"
