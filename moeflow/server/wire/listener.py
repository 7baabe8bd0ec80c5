"""The socket that connections come in at: where the process may open no more files, they are turned away.

Knows sockets. Knows nothing of what is answered.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from typing import Any

TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 2\r\nconnection: close\r\n"
    b'\r\n{"error":{"message":"too many connections are open. Try again later.","type":"server_error","param":null,'
    b'"code":"too_many_connections"}}'
)
_TELL_EVERY_S = 60.0
_logger = logging.getLogger("moeflow.server")


class Listener(socket.socket):
    """A listening socket that keeps one file open, to have a number for a connection when there is no other.

    Without it such a connection would stay in the queue, and asyncio would try in vain for as long as files are short.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._spare: int | None = None
        self._told_s = -_TELL_EVERY_S
        self._has_failed = False
        self._keep_spare()

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection.

        Raises:
            BlockingIOError: there is none, or it was turned away.
            OSError: nothing can be accepted.
        """
        if self._has_failed:  # asyncio asks again at once, many times, though it has just been told to wait
            self._has_failed = False
            raise BlockingIOError(errno.EAGAIN, "nothing could be accepted a moment ago")
        try:
            accepted = super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            if self._spare is None:
                self._has_failed = True
                raise
            self._turn_away()
            raise BlockingIOError(errno.EAGAIN, "it was turned away") from error
        self._keep_spare()
        return accepted

    def close(self) -> None:
        """Close the socket and the file."""
        self._free_spare()
        super().close()

    def _turn_away(self) -> None:
        """Answer the next connection with 503, in the place of the spare file."""
        now_s = time.monotonic()
        if now_s - self._told_s >= _TELL_EVERY_S:
            _logger.warning("connections are turned away: this process may open no more files (ulimit -n)")
            self._told_s = now_s
        self._free_spare()
        try:
            with contextlib.suppress(OSError), super().accept()[0] as connection:
                connection.setblocking(False)
                connection.send(TOO_MANY)
                connection.shutdown(socket.SHUT_WR)
        finally:
            self._keep_spare()

    def _keep_spare(self) -> None:
        if self._spare is None:
            with contextlib.suppress(OSError):  # another thread took the number
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _free_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
