"""Writer of routing traces: appends rows; those written before a kill stay readable.

Knows nothing of models or torch; docs/trace_format.md specifies the file.
"""

import os
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from moeflow.atomic_file import cannot_write, write_all
from moeflow.errors import TraceError
from moeflow.file_lock import lock_file
from moeflow.trace.format import TraceFormat
from moeflow.trace.header import Recording, TraceHeader, read_trace_header
from moeflow.trace.trace import RoutingTrace


class TraceWriter:
    """Appends rows to a trace file. Rows written before a kill stay readable.

    Args:
        path: the file.
        format: the model and the fields.
        append: whether to go on with an existing file, which must then be of the same format.
        sequence_facts: facts of each sequence, by sequence number; written once, at creation.

    Raises:
        TraceError: the file exists and `append` is false, is damaged, is of another model or format, or cannot be
            written; another process is writing it.
    """

    def __init__(
        self, path: str | Path, format: TraceFormat, *, append: bool = False, sequence_facts: Iterable[dict] = ()
    ) -> None:
        self.path = Path(path)
        self.next_sequence = 0  # the first number that no row has
        try:
            # Without a buffer: what was not written when the disk was full is not tried again by close().
            self._file = open(self.path, "r+b" if append and self.path.exists() else "x+b", buffering=0)  # noqa: SIM115
        except FileExistsError:
            raise TraceError(f"{path} exists already. Append to it, or give another name.") from None
        except OSError as error:
            raise TraceError(cannot_write(path, error)) from error
        try:
            self._begin(format, sequence_facts)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, format: TraceFormat, sequence_facts: Iterable[dict]) -> None:
        """Write the header of a new file, or check that of the file that is there."""
        if not lock_file(self._file.fileno(), self.path):
            raise TraceError(f"{self.path} is being written by another process. Wait for it, or give another name.")
        if not self._file.seek(0, os.SEEK_END):
            try:
                self._write_header(TraceHeader.reserve(format, sequence_facts))
            except BaseException as error:
                self.path.unlink(missing_ok=True)
                if isinstance(error, OSError):
                    raise TraceError(cannot_write(self.path, error)) from error
                raise
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
        header, content = self._header, np.ascontiguousarray(rows).view(np.uint8).data
        crc32 = None if header.crc32 is None else zlib.crc32(content, header.crc32)
        self._write(replace(header, num_rows=header.num_rows + len(rows), crc32=crc32), content)
        self.next_sequence = max(self.next_sequence, int(rows["sequence"].max()) + 1)

    def begin_recording(self, name: str, num_prompts: int) -> int:
        """Begin a recording of prompts, or go on with one that was interrupted: rows after its last prompt are cut off.

        Args:
            name: of the prompts, the model and the options.
            num_prompts: in all.

        Returns:
            How many prompts are done already.

        Raises:
            TraceError: the file cannot be written.
        """
        header, before = self._header, self._header.recording
        if header.crc32 is None:  # of an older moeflow: there may be no room in its header
            return 0
        if before is None or before.name != name or before.of != num_prompts or before.prompts == before.of:
            before = Recording(name, num_prompts, 0, header.num_rows, header.crc32, self.next_sequence)
        self._write(replace(header, num_rows=before.rows, crc32=before.crc32, recording=before))
        self.next_sequence = before.next_sequence
        return before.prompts

    def end_prompt(self) -> None:
        """Note that a prompt of the recording is done, with all rows written so far.

        Raises:
            TraceError: the file cannot be written.
        """
        header = self._header
        if header.recording is not None and header.crc32 is not None:
            done = Recording(
                header.recording.name,
                header.recording.of,
                header.recording.prompts + 1,
                header.num_rows,
                header.crc32,
                self.next_sequence,
            )
            self._write(replace(header, recording=done))

    def close(self) -> None:
        """Cut off the rest of an interrupted append and close the file; a second call does nothing.

        Raises:
            TraceError: the disk failed; the file is closed.
        """
        if self._file.closed:
            return
        try:
            self._file.truncate(self._header.end)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise TraceError(cannot_write(self.path, error)) from error
        finally:
            self._file.close()

    def after_fork(self) -> None:
        """Let go of the file in the child of a fork, unwritten: it and its lock are the parent's."""
        if not self._file.closed:
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, self._file.fileno())  # a second thread of the parent's may have been writing
            os.close(nothing)

    def _write(self, header: TraceHeader, content: memoryview | None = None) -> None:
        """Write rows behind those that count, then the header that counts them."""
        if self._file.closed:
            raise TraceError(f"{self.path} was closed. Open it again to append.")
        try:
            if content is not None:
                self._file.seek(self._header.end)
                write_all(self._file.fileno(), content)
            self._write_header(header)
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._header.end)
            raise TraceError(f"{cannot_write(self.path, error)} Rows before are safe.") from error

    def _write_header(self, header: TraceHeader) -> None:
        self._file.seek(0)
        write_all(self._file.fileno(), header.to_bytes())
        self._header = header
