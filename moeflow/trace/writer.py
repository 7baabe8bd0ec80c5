"""Writer of routing traces: appends rows; those written before a kill stay readable.

Knows nothing of models or torch; docs/trace_format.md specifies the file.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moeflow.errors import TraceError
from moeflow.trace.format import TraceFormat, TraceHeader, read_trace_header
from moeflow.trace.trace import RoutingTrace


class TraceWriter:
    """Appends rows to a trace file. Rows written before a kill stay readable.

    Args:
        path: the file.
        format: the model and the fields.
        append: whether to go on with an existing file, which must then be of the same format.
        sequence_facts: facts of each sequence, by sequence number; written once, at creation.

    Raises:
        TraceError: the file exists and `append` is false, is of another model or format, or cannot be written;
            another process is writing it.
    """

    def __init__(
        self, path: str | Path, format: TraceFormat, *, append: bool = False, sequence_facts: Iterable[dict] = ()
    ) -> None:
        self.path = Path(path)
        self.next_sequence = 0  # the first number that no row has
        try:
            self._file = open(self.path, "r+b" if append and self.path.exists() else "x+b")  # noqa: SIM115
        except FileExistsError:
            raise TraceError(f"{path} exists already. Append to it, or give another name.") from None
        except OSError as error:
            raise TraceError(
                f"{path} cannot be written: {error.strerror}. Give a file in a folder of yours."
            ) from error
        try:
            self._begin(format, sequence_facts)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, format: TraceFormat, sequence_facts: Iterable[dict]) -> None:
        """Write the header of a new file, or check that of the file that is there."""
        _lock(self._file, self.path)
        if not self._file.seek(0, os.SEEK_END):
            self._header = TraceHeader.reserve(format, sequence_facts)
            self._write_header(0)
            return
        self._header = read_trace_header(self.path, self._file)
        difference = self._header.format.row_difference(format)
        if difference is not None:
            raise TraceError(f"{self.path} cannot be appended to: its {difference}. Give another name.")
        if self._header.num_rows:
            self.next_sequence = int(RoutingTrace.open(self.path).sequence.max()) + 1

    @property
    def format(self) -> TraceFormat:
        return self._header.format

    @property
    def num_rows(self) -> int:
        """Rows in the file, those from before included."""
        return self._header.num_rows

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def new_rows(self, num_rows: int) -> np.ndarray:
        """Return [num_rows] rows to fill: no token, sequence 0, prefill, every rank none."""
        rows = np.zeros(num_rows, self._header.dtype)
        rows["token_id"] = -1
        rows["experts"] = self.format.none
        if self.format.lookahead is not None:
            rows["lookahead"] = self.format.none
        return rows

    def write(self, rows: np.ndarray) -> None:
        """Append rows as `new_rows` makes them, then count them in the header.

        Raises:
            TraceError: the disk is full or the file was closed.
        """
        if not len(rows):
            return
        assert rows.dtype == self._header.dtype, "rows of another format"
        if self._file.closed:
            raise TraceError(f"{self.path} was closed. Open it again to append.")
        header = self._header
        try:
            self._file.seek(header.data_offset + header.num_rows * header.dtype.itemsize)
            self._file.write(np.ascontiguousarray(rows).data)
            self._file.flush()
            self._write_header(header.num_rows + len(rows))
        except OSError as error:
            raise TraceError(f"{self.path} cannot be written: {error.strerror}. Rows before are safe.") from error
        self.next_sequence = max(self.next_sequence, int(rows["sequence"].max()) + 1)

    def close(self) -> None:
        """Cut off the rest of an interrupted append and close the file; a second call does nothing."""
        if not self._file.closed:
            self._file.truncate(self._header.data_offset + self._header.num_rows * self._header.dtype.itemsize)
            self._file.close()

    def after_fork(self) -> None:
        """Let go of the file in the child of a fork, unwritten: it and its lock are the parent's."""
        if not self._file.closed:
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, self._file.fileno())  # a thread of the parent's may have left bytes in the buffer
            os.close(nothing)

    def _write_header(self, num_rows: int) -> None:
        self._header = TraceHeader(
            self._header.format,
            self._header.dtype,
            num_rows,
            self._header.data_offset,
            self._header.sequence_facts,
        )
        self._file.seek(0)
        self._file.write(self._header.to_bytes())
        self._file.flush()


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep other processes from appending to the same file at the same time."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover - Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise TraceError(f"{path} is being written by another process. Wait for it, or give another name.") from None
