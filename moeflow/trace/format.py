"""Layout of a routing trace's file: the fields of a row and the header before them (docs/trace_format.md).

Knows nothing of writers or readers of rows. Needs numpy, not torch.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moeflow.core import align_up
from moeflow.errors import TraceError

FORMAT, VERSION = "moeflow-trace", 1
PREFILL, DECODE = 0, 1  # phases
_MIN_HEADER_BYTES = 4096  # the 8 bytes of the length included
_ROW_ALIGNMENT_BYTES = 8
_COUNT_DIGITS = 40  # room for the row count and the end offset to grow into


@dataclass(frozen=True)
class TraceFormat:
    """The model and the rows of a trace.

    Args:
        experts_per_layer: [L], routed experts of each MoE layer.
        top_k: K, ranks a row holds.
        fingerprint: of the model, see hf.fingerprint.model_fingerprint; other sources use the model's name.
        has_weights: whether rows hold the ranks' weights.
        ranked: whether rank 0 has the highest weight; else the order of the ranks says nothing.
        lookahead: (D, M), layers ahead and expert ids of each, as predicted at every layer; None without.
        source: free text, where the rows come from.
    """

    experts_per_layer: tuple[int, ...]
    top_k: int
    fingerprint: str
    has_weights: bool = True
    ranked: bool = True
    lookahead: tuple[int, int] | None = None
    source: str = ""

    @property
    def num_layers(self) -> int:
        return len(self.experts_per_layer)

    @property
    def num_experts(self) -> int:
        """The largest number of experts in a layer."""
        return max(self.experts_per_layer)

    @property
    def none(self) -> int:
        """The expert id that stands for none: 255, or 65535 where 255 may be an expert."""
        return 255 if self.num_experts <= 255 else 65535

    @property
    def dtype(self) -> np.dtype:
        """The structured dtype of a row: two-byte fields on even offsets, a multiple of 8 bytes in all."""
        ids, ranks = ("u1" if self.none == 255 else "<u2"), (self.num_layers, self.top_k)
        fields: list[tuple[str, str, tuple[int, ...]]] = [("token_id", "<i4", ()), ("sequence", "<u4", ())]
        if self.has_weights:
            fields.append(("weights", "<f2", ranks))
        fields.append(("experts", ids, ranks))
        if self.lookahead is not None:
            fields.append(("lookahead", ids, (self.num_layers, *self.lookahead)))
        fields.append(("phase", "u1", ()))
        offsets, end = [], 0
        for _, code, shape in fields:
            offsets.append(end)
            end += np.dtype((code, shape)).itemsize
        return _structured(
            [(name, code, shape, offset) for (name, code, shape), offset in zip(fields, offsets, strict=True)],
            align_up(end, _ROW_ALIGNMENT_BYTES),
        )

    def row_difference(self, other: "TraceFormat") -> str | None:
        """Name the first thing that keeps rows of `other` out of a file of this format; None when they fit."""
        for name in ("fingerprint", "experts_per_layer", "top_k", "has_weights", "ranked", "lookahead"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} is {_short(getattr(self, name))} there and {_short(getattr(other, name))} here"
        return None


@dataclass(frozen=True)
class TraceHeader:
    """A trace file's header: the format, how many rows count, where they begin, and facts of the sequences.

    Args:
        format: the model and the fields.
        dtype: of a row, as the file describes it.
        num_rows: rows that were completely written.
        data_offset: bytes before the first row.
        sequence_facts: facts of each sequence, by sequence number; may be empty.
    """

    format: TraceFormat
    dtype: np.dtype
    num_rows: int
    data_offset: int
    sequence_facts: tuple[dict, ...] = ()

    @classmethod
    def reserve(cls, format: TraceFormat, sequence_facts: Iterable[dict] = ()) -> "TraceHeader":
        """Lay out the header of a trace without rows, with room for any number of them."""
        header = cls(format, format.dtype, 0, 0, tuple(sequence_facts))
        return cls(
            format,
            header.dtype,
            0,
            align_up(8 + len(header._text()) + _COUNT_DIGITS, _MIN_HEADER_BYTES),
            header.sequence_facts,
        )

    def to_bytes(self) -> bytes:
        """Return the header as it lies in the file, padded to `data_offset` bytes."""
        length = self.data_offset - 8
        return length.to_bytes(8, "little") + self._text().ljust(length)

    def _text(self) -> bytes:
        about, described = self.format, self.dtype.fields
        assert described is not None, "a row has named fields"
        fields = {name: [*_field_code(field[0]), field[1]] for name, field in described.items()}
        trace = {
            "num_layers": about.num_layers,
            "num_experts": list(about.experts_per_layer),
            "top_k": about.top_k,
            "fingerprint": about.fingerprint,
            "has_weights": about.has_weights,
            "ranked": about.ranked,
            "source": about.source,
            "row": fields,
        }
        metadata = {"format": FORMAT, "version": str(VERSION), "trace": _compact(trace)}
        if self.sequence_facts:
            metadata["sequences"] = _compact(self.sequence_facts)
        row_bytes = self.dtype.itemsize
        rows = {"dtype": "U8", "shape": [self.num_rows, row_bytes], "data_offsets": [0, self.num_rows * row_bytes]}
        return _compact({"__metadata__": metadata, "rows": rows}).encode()


def read_trace_header(path: Path, file: BinaryIO) -> TraceHeader:
    """Read and check the header of an open trace.

    Args:
        path: how errors call the file.
        file: positioned anywhere.

    Raises:
        TraceError: the file is empty, truncated, no trace, corrupt, or of a newer version.
    """
    size = file.seek(0, 2)
    file.seek(0)
    if not size:
        raise TraceError(f"{path} is empty: it has not even a header. Record or convert a trace into a new file.")
    length = int.from_bytes(file.read(8), "little")
    start = file.read(min(length, 4096)).lstrip()
    if size < 8 or length > 1 << 40 or not start.startswith(b"{"):
        raise _foreign(path)
    if length > size - 8:
        raise TraceError(
            f"{path} is truncated: {size:,} bytes on disk, and a header of {length:,} bytes announced. "
            "Copy or record it again."
        )
    file.seek(8)
    try:
        header = json.loads(file.read(length))
        metadata = header.get("__metadata__", {})
        kind, version = metadata.get("format"), metadata.get("version")
    except (ValueError, AttributeError):
        raise _foreign(path) from None
    if kind != FORMAT:
        raise _foreign(path)
    if version != str(VERSION):
        raise TraceError(
            f"{path} is a trace of version {version}, and this moeflow reads version {VERSION}. Update moeflow."
        )
    try:
        found = _parse(metadata, header["rows"], 8 + length)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TraceError(f"{path} has a corrupt trace header ({error!r}). Copy or record it again.") from None
    end = found.data_offset + found.num_rows * found.dtype.itemsize
    if end > size:
        raise TraceError(
            f"{path} is truncated: {size:,} bytes on disk, {end:,} according to its header. Copy or record it again."
        )
    return found


def _parse(metadata: dict, rows: dict, data_offset: int) -> TraceHeader:
    trace = json.loads(metadata["trace"])
    fields = [(name, code, tuple(shape), offset) for name, (code, shape, offset) in trace["row"].items()]
    num_rows, row_bytes = rows["shape"]
    if rows["dtype"] != "U8" or rows["data_offsets"] != [0, num_rows * row_bytes] or num_rows < 0:
        raise ValueError(f"rows {rows}")
    dtype = _structured(fields, row_bytes)
    num_layers, top_k = dtype["experts"].shape
    names, lookahead = set(dtype.names or ()), None
    if "lookahead" in names:
        _, distances, ranks = dtype["lookahead"].shape
        lookahead = (distances, ranks)
    format = TraceFormat(
        experts_per_layer=tuple(int(count) for count in trace["num_experts"]),
        top_k=int(trace["top_k"]),
        fingerprint=str(trace["fingerprint"]),
        has_weights=bool(trace["has_weights"]),
        ranked=bool(trace["ranked"]),
        lookahead=lookahead,
        source=str(trace["source"]),
    )
    required = {"token_id", "sequence", "phase"} | ({"weights"} if format.has_weights else set())
    if (num_layers, top_k) != (format.num_layers, format.top_k) or not required <= names:
        raise ValueError(f"row {trace['row']}")
    facts = json.loads(metadata.get("sequences", "[]"))
    if not isinstance(facts, list):
        raise ValueError("sequences")
    return TraceHeader(format, dtype, num_rows, data_offset, tuple(facts))


def _structured(fields: list[tuple[str, str, tuple[int, ...], int]], row_bytes: int) -> np.dtype:
    return np.dtype(
        {
            "names": [name for name, *_ in fields],
            "formats": [(code, shape) for _, code, shape, _ in fields],
            "offsets": [offset for *_, offset in fields],
            "itemsize": row_bytes,
        }
    )


def _field_code(dtype: np.dtype) -> tuple[str, list[int]]:
    return dtype.base.str.lstrip("|"), list(dtype.shape)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."


def _foreign(path: Path) -> TraceError:
    return TraceError(
        f"{path} is not a routing trace. Give a file written by moeflow trace record or moeflow trace convert."
    )
