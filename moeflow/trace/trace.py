"""Routing traces: which experts each token took in each layer, read memory-mapped.

Knows nothing of models or torch; docs/trace_format.md specifies the file.
"""

import functools
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moeflow.errors import TraceError
from moeflow.trace.format import DECODE, TraceFormat
from moeflow.trace.header import read_trace_header

_ROWS_AT_ONCE = 65536


class RoutingTrace:
    """N tokens' routes. The arrays are read-only views of the file, nothing is copied.

    Args:
        format: the model and the fields.
        rows: [N], of the format's structured dtype.
        sequence_facts: facts of each sequence, by sequence number.
        name: the trace's name in errors.
    """

    def __init__(
        self,
        format: TraceFormat,
        rows: np.ndarray,
        *,
        sequence_facts: Iterable[dict] = (),
        name: str | Path = "trace",
    ) -> None:
        self.format = format
        self.sequence_facts = list(sequence_facts)
        self.name = str(name)
        self._rows = rows

    @classmethod
    def open(cls, path: str | Path) -> "RoutingTrace":
        """Map a trace file; rows whose writing was interrupted are left out.

        Raises:
            TraceError: the file is missing, empty, truncated, corrupt or no trace; a checksum does not agree.
        """
        try:
            with open(path, "rb") as file:
                header = read_trace_header(Path(path), file)
                if not header.num_rows:
                    raise TraceError(f"{path} is empty: a trace without tokens. Record or convert one first.")
                content = np.memmap(file, np.uint8, "r", header.data_offset, (header.end - header.data_offset,))
        except OSError as error:
            raise TraceError(f"{path} cannot be read: {error.strerror}. Give a trace file.") from error
        rows = content.view(header.dtype)
        if header.crc32 is None:
            _check_numbers(path, header.format, rows)
        elif zlib.crc32(content.data) != header.crc32:
            raise TraceError(
                f"{path} is damaged: its rows, bytes {header.data_offset:,} to {header.end:,}, do not agree with their "
                "checksum. Copy or record it again."
            )
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
        """[N, L, D, M], predicted at layer l for layers l + 1 to l + D, likeliest first; None without."""
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

    def _field(self, name: str) -> np.ndarray:
        return self._rows[name].view(np.ndarray)  # a memmap object would cost time at every slice

    def _where(self, mask: np.ndarray) -> "RoutingTrace":
        if mask.all():
            return self
        return RoutingTrace(self.format, self._rows[mask], sequence_facts=self.sequence_facts, name=self.name)

    @functools.cached_property
    def _order(self) -> tuple[np.ndarray, list[slice | np.ndarray]]:
        """The sequences' numbers, ascending, and the rows of each."""
        numbers = np.ascontiguousarray(self.sequence)
        order = np.argsort(numbers, kind="stable")
        sorted_numbers = numbers[order]
        starts = np.flatnonzero(np.r_[True, sorted_numbers[1:] != sorted_numbers[:-1]][: len(order)])
        groups: list[slice | np.ndarray] = []
        for rows in np.split(order, starts[1:]) if len(order) else []:
            first, last = int(rows[0]), int(rows[-1])
            groups.append(slice(first, last + 1) if last - first + 1 == len(rows) else rows)
        return sorted_numbers[starts], groups


def _check_numbers(path: str | Path, format: TraceFormat, rows: np.ndarray) -> None:
    """Refuse rows without a checksum that hold what no trace holds: an expert that is not there, a third phase."""
    limits = np.array(format.experts_per_layer)[:, None]
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[begin : begin + _ROWS_AT_ONCE]
        good = (part["phase"] <= DECODE) & (part["token_id"] >= -1)
        good &= ((part["experts"] < limits) | (part["experts"] == format.none)).all(axis=(1, 2))
        if format.lookahead is not None:
            said = part["lookahead"]
            good &= ((said < format.num_experts) | (said == format.none)).all(axis=(1, 2, 3))
        if format.has_weights:
            good &= np.isfinite(part["weights"]).all(axis=(1, 2))
        if not good.all():
            number = begin + int(np.argmin(good))
            raise TraceError(f"{path} is damaged: row {number:,} is none of a trace. Copy or record it again.")
