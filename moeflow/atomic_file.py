"""Files written whole or not at all: a reader sees the old file or the new one, a kill leaves what the next run clears.
A file may carry its own checksum, so that later damage is seen too.

Knows files. Knows nothing of what is in them.
"""

import errno
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moeflow.errors import MoeflowError
from moeflow.file_lock import exclusive

NO_CHECKSUM = "0" * 8  # where `seal` puts the checksum
_CHECKSUM = re.compile(rb'crc32": ?"([0-9a-f]{8})"')
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(path: str | Path, error: type[MoeflowError] | None = MoeflowError) -> Iterator[Path]:
    """Give a path to write to. When the block ends well, what lies there takes the file's place, safe on the disk.

    Processes that write the same file take turns. A link stays one; a pipe or a device is written to directly.

    Args:
        path: the file; one that is there is replaced and keeps its permissions.
        error: what is raised; None leaves an OSError as it is.

    Raises:
        MoeflowError: the folder is not there or not the user's, the path is a folder's, the disk is full. The file is
            as it was, and nothing else is left.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not target.is_file():
            yield target
            return
        partial = target.with_name(f".{target.name}.partial")
        with exclusive(target.with_name(f".{target.name}.lock")) as lock:
            partial.unlink(missing_ok=True)
            try:
                yield partial
                sync_file(partial)
                partial.chmod(stat.S_IMODE((target.stat() if target.exists() else os.fstat(lock)).st_mode))
                os.replace(partial, target)
                sync_folder(target.parent)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as cause:
        if error is None:
            raise
        raise error(cannot_write(path, cause)) from cause


def write_atomically(path: str | Path, content: bytes | str, error: type[MoeflowError] | None = MoeflowError) -> None:
    """Write a file as `atomic_file` does.

    Args:
        path: the file.
        content: its bytes, or its text, which is written in UTF-8.
        error: what is raised; None leaves an OSError as it is.

    Raises:
        MoeflowError: see `atomic_file`.
    """
    with atomic_file(path, error) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def seal(content: bytes) -> bytes:
    """Put the CRC-32 of a content into the JSON in it, in place of the first checksum: `"crc32": "00000000"`."""
    place = _CHECKSUM.search(content)
    assert place is not None, "a content with a place for the checksum"
    assert place[1] == NO_CHECKSUM.encode(), "a place that is free"
    return content[: place.start(1)] + f"{zlib.crc32(content):08x}".encode() + content[place.end(1) :]


def is_sealed(content: bytes) -> bool:
    """Tell whether a content is as `seal` returned it."""
    place = _CHECKSUM.search(content)
    if place is None:
        return False
    unsealed = content[: place.start(1)] + NO_CHECKSUM.encode() + content[place.end(1) :]
    return place[1] == f"{zlib.crc32(unsealed):08x}".encode()


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of the bytes to an open file, which may take them in parts.

    Raises:
        OSError: the disk is full or failed.
    """
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def check_target(path: str | Path, error: type[MoeflowError] = MoeflowError) -> None:
    """Refuse, before the work, a file that could not be written after it.

    Args:
        path: the file.
        error: what is raised.

    Raises:
        MoeflowError: the path is a folder's, or its folder is not there or not the user's.
    """
    target = Path(os.path.realpath(path))
    number = 0
    if target.is_dir():
        number = errno.EISDIR
    elif not target.parent.exists():
        number = errno.ENOENT
    elif not target.parent.is_dir():
        number = errno.ENOTDIR
    elif not os.access(target.parent if target.is_file() or not target.exists() else target, os.W_OK):
        number = errno.EACCES
    if number:
        raise error(cannot_write(path, OSError(number, os.strerror(number))))


def cannot_write(path: str | Path, cause: OSError) -> str:
    """Return what to tell about a file that could not be written: the cause, and what to do."""
    if cause.errno in _FULL:
        remedy = "Make room, or give a file on another disk."
    elif cause.errno == errno.ENOENT:
        remedy = f"Make the folder {Path(path).absolute().parent} first, or give a file in another."
    elif cause.errno == errno.EISDIR:
        remedy = "Give the name of a file."
    else:
        remedy = "Give a file in a folder of yours."
    return f"{path} cannot be written: {cause.strerror or cause}. {remedy}"


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk.

    Raises:
        OSError: the disk is full or failed.
    """
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can: not every file system does."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
