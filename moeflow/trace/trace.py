"""Routing traces: which experts each token took in each layer, read memory-mapped and written by appending.

Knows nothing of models or torch; docs/trace_format.md specifies the file.
"""

import functools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moeflow.errors import TraceError
from moeflow.trace.format import DECODE, PREFILL, TraceFormat, TraceHeader, read_trace_header

__all__ = ["DECODE", "PREFILL", "RoutingTrace", "TraceFormat", "TraceWriter"]


class RoutingTrace:
    """N tokens' routes. The arrays are read-only views of the file, nothing is copied.

    Args:
        format: the model and the fields.
        rows: [N], of the format's structured dtype.
        sequence_facts: what is known of each sequence, by sequence number.
        name: what errors call the trace.
    """

    def __init__(self, format: TraceFormat, rows: np.ndarray, *, sequence_facts: Iterable[dict] = (), name="trace"):
        self.format = format
        self.sequence_facts = list(sequence_facts)
        self.name = str(name)
        self._rows = rows

    @classmethod
    def open(cls, path: str | Path) -> "RoutingTrace":
        """Map a trace file; rows whose writing was interrupted are left out.

        Raises:
            TraceError: the file is missing, empty, truncated, corrupt or no trace.
        """
        try:
            with open(path, "rb") as file:
                header = read_trace_header(Path(path), file)
                if not header.num_rows:
                    raise TraceError(f"{path} is empty: a trace without tokens. Record or convert one first.")
                rows = np.memmap(file, header.dtype, "r", header.data_offset, (header.num_rows,))
        except OSError as error:
            raise TraceError(f"{path} cannot be read: {error.strerror}. Give a trace file.") from error
        return cls(header.format, rows, sequence_facts=header.sequence_facts, name=path)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_layers(self) -> int:
        return self.format.num_layers

    @property
    def num_experts(self) -> int:
        """The largest number of experts in a layer."""
        return self.format.num_experts

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        return self.format.experts_per_layer

    @property
    def top_k(self) -> int:
        return self.format.top_k

    @property
    def fingerprint(self) -> str:
        return self.format.fingerprint

    @property
    def none(self) -> int:
        """The expert id that stands for none; num_experts or more."""
        return self.format.none

    @property
    def token_ids(self) -> np.ndarray:
        """[N] int32, the token fed; -1 where it is not known."""
        return self._field("token_id")

    @property
    def sequence(self) -> np.ndarray:
        """[N] uint32, the sequence a row belongs to. Rows of one sequence stand in its order."""
        return self._field("sequence")

    @property
    def phase(self) -> np.ndarray:
        """[N] uint8, PREFILL or DECODE."""
        return self._field("phase")

    @property
    def experts(self) -> np.ndarray:
        """[N, L, K] uint8 or uint16, by falling weight where the trace is ranked."""
        return self._field("experts")

    @property
    def weights(self) -> np.ndarray | None:
        """[N, L, K] float16, the router's weights; None where they are not known."""
        return self._field("weights") if self.format.has_weights else None

    @property
    def lookahead(self) -> np.ndarray | None:
        """[N, L, D, M], what was predicted at layer l for layers l + 1 to l + D, likeliest first; None without."""
        return self._field("lookahead") if self.format.lookahead is not None else None

    @property
    def sequence_numbers(self) -> np.ndarray:
        """[S] uint32, the sequences that occur, ascending."""
        return self._order[0]

    def sequences(self) -> list[slice | np.ndarray]:
        """Return each sequence's rows in order, parallel to `sequence_numbers`.

        Returns:
            A slice where the rows lie together, else an array of row numbers: both index the arrays.
        """
        return list(self._order[1])

    def select(self, sequence_numbers: Iterable[int]) -> "RoutingTrace":
        """Return the trace of these sequences alone, rows in the same order, numbers as they are."""
        return self._where(np.isin(self.sequence, np.fromiter(sequence_numbers, np.int64)))

    def decode(self) -> "RoutingTrace":
        """Return the trace of the decode rows alone; itself when it has no others."""
        return self._where(self.phase == DECODE)

    def require_fingerprint(self, expected: str) -> None:
        """Refuse a trace of another model.

        Raises:
            TraceError: names both models.
        """
        if self.fingerprint != expected:
            raise TraceError(
                f"{self.name} is a trace of model {self.fingerprint}, and model {expected} is wanted here. "
                "Record a trace of that model."
            )

    def _field(self, name) -> np.ndarray:
        return self._rows[name].view(np.ndarray)  # a memmap object would cost time at every slice

    def _where(self, mask) -> "RoutingTrace":
        if mask.all():
            return self
        return RoutingTrace(self.format, self._rows[mask], sequence_facts=self.sequence_facts, name=self.name)

    @functools.cached_property
    def _order(self):
        numbers = np.ascontiguousarray(self.sequence)
        order = np.argsort(numbers, kind="stable")
        sorted_numbers = numbers[order]
        starts = np.flatnonzero(np.r_[True, sorted_numbers[1:] != sorted_numbers[:-1]][: len(order)])
        groups = []
        for rows in np.split(order, starts[1:]) if len(order) else []:
            first, last = int(rows[0]), int(rows[-1])
            groups.append(slice(first, last + 1) if last - first + 1 == len(rows) else rows)
        return sorted_numbers[starts], groups


class TraceWriter:
    """Appends rows to a trace file. What was written before a kill stays readable.

    Args:
        path: the file.
        format: the model and the fields.
        append: whether to go on with an existing file, which must then be of the same format.
        sequence_facts: what is known of each sequence, by sequence number; written once, at creation.

    Raises:
        TraceError: the file exists and `append` is false, is of another model or format, or cannot be written;
            another process is writing it.
    """

    def __init__(
        self, path: str | Path, format: TraceFormat, *, append: bool = False, sequence_facts: Iterable[dict] = ()
    ):
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

    def _begin(self, format, sequence_facts):
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

    def __exit__(self, *exc_info) -> None:
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
        """Append rows as `new_rows` makes them, then say in the header that they are there.

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
        """Cut off what an interrupted append left behind and close the file. Once is enough, twice is no error."""
        if not self._file.closed:
            self._file.truncate(self._header.data_offset + self._header.num_rows * self._header.dtype.itemsize)
            self._file.close()

    def _write_header(self, num_rows):
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


def _lock(file, path) -> None:
    """Keep other processes from appending to the same file at the same time."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover - Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise TraceError(f"{path} is being written by another process. Wait for it, or give another name.") from None
