"""Rows of a trace on their way into the file, a few at a time.

Knows a trace's writer. Knows nothing of models.
"""

import threading

import numpy as np

from moeflow.trace.writer import TraceWriter

_BUFFERED_ROWS = 256


class BufferedRows:
    """Collects rows from any thread and writes them together.

    Args:
        writer: of the file, which these rows alone go to.
    """

    def __init__(self, writer: TraceWriter) -> None:
        self.writer = writer
        self._buffer = writer.new_rows(_BUFFERED_ROWS)
        self._num_buffered = 0
        self._lock = threading.RLock()

    @property
    def num_rows(self) -> int:
        """Rows in the file and on their way."""
        return self.writer.num_rows + self._num_buffered

    def add(self, rows: np.ndarray) -> None:
        """Take rows in; many at once are written at once.

        Raises:
            TraceError: the file cannot be written.
        """
        with self._lock:
            if self._num_buffered + len(rows) > len(self._buffer):
                self.flush()
            if len(rows) > len(self._buffer):
                self.writer.write(rows)
                return
            self._buffer[self._num_buffered : self._num_buffered + len(rows)] = rows
            self._num_buffered += len(rows)

    def flush(self) -> None:
        """Write what is on its way.

        Raises:
            TraceError: the file cannot be written; these rows are not tried again.
        """
        with self._lock:
            num_buffered, self._num_buffered = self._num_buffered, 0
            self.writer.write(self._buffer[:num_buffered])

    def end_prompt(self, next_sequence: int) -> None:
        """Write what is on its way and note that a prompt is done; the next one's sequence has this number.

        Raises:
            TraceError: the file cannot be written.
        """
        with self._lock:
            self.flush()
            self.writer.next_sequence = next_sequence
            self.writer.end_prompt()

    def close(self) -> None:
        """Write what is on its way and close the file.

        Raises:
            TraceError: the file cannot be written; it is closed.
        """
        with self._lock:
            try:
                self.flush()
            finally:
                self.writer.close()
