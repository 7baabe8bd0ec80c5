"""Locks that keep two processes from writing the same thing; the kernel drops them when their holder dies.

Knows files. Knows nothing of what is written.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)


def lock_file(descriptor: int, path: str | Path) -> bool:
    """Lock an open file, without waiting, until it is closed.

    Args:
        descriptor: of the file.
        path: where it lies.

    Returns:
        Whether other processes keep out now. False: one of them has it, or another file lies at the path by now.
    """
    if fcntl is not None and not _lock(descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB):
        return False
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def unlock_file(descriptor: int) -> None:
    """Let others lock a file, and close it. In the child of a fork only close it, so that the parent has it still."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child of a fork may have the descriptor as well
    os.close(descriptor)


@contextmanager
def exclusive(path: str | Path, *, on_taken: Callable[[], None] | None = None) -> Iterator[int]:
    """Hold a lock file, which is there only while it is held; one that a kill left is taken over.

    Args:
        path: the lock file.
        on_taken: called once where another process holds it. The wait follows, unless it raises.

    Yields:
        Its descriptor.

    Raises:
        OSError: the file cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            if not lock_file(descriptor, path):
                if on_taken is not None:
                    on_taken()
                    on_taken = None
                if fcntl is not None:
                    _lock(descriptor, path, fcntl.LOCK_EX)
                continue  # its holder has removed the file by now: make a new one
            try:
                yield descriptor
            finally:
                Path(path).unlink(missing_ok=True)
            return
        finally:
            if fcntl is not None:
                _lock(descriptor, path, fcntl.LOCK_UN)  # a child of a fork may have the descriptor as well
            os.close(descriptor)


def _lock(descriptor: int, path: str | Path, operation: int) -> bool:
    """Return whether the operation is done; a file system without locks does any."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        _log.warning("%s cannot be locked (%s): let no other process write there.", path, error.strerror)
    return True
