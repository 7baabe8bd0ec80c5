"""The header of a routing trace's file: what lies before the rows, with checksums of both (docs/trace_format.md).

Knows nothing of writers or readers of rows. Needs numpy, not torch.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moeflow.atomic_file import NO_CHECKSUM, is_sealed, seal
from moeflow.core import align_up
from moeflow.errors import TraceError
from moeflow.trace.format import TraceFormat, row_dtype

FORMAT, VERSION = "moeflow-trace", 1
_MIN_HEADER_BYTES = 4096  # the 8 bytes of the length included
_ROOM_BYTES = 320  # for what grows: the row count, the end offset, a recording
_MAX_ROW_BYTES = 1 << 31


@dataclass(frozen=True)
class Recording:
    """How far the latest recording of prompts in a trace has come.

    Args:
        name: of the prompts, the model and the options.
        of: prompts in all.
        prompts: of them that are done.
        rows: in the file when the last of these was done.
        crc32: of those rows.
        next_sequence: the number of the next prompt's sequence.
    """

    name: str
    of: int
    prompts: int
    rows: int
    crc32: int
    next_sequence: int


@dataclass(frozen=True)
class TraceHeader:
    """A trace file's header: the format, how many rows count, where they begin, and facts of the sequences.

    Args:
        format: the model and the fields.
        dtype: of a row, as the file describes it.
        num_rows: rows that were completely written.
        data_offset: bytes before the first row.
        sequence_facts: facts of each sequence, by sequence number; may be empty.
        crc32: of those rows; None in a file of an older moeflow, whose header has no checksum either.
        recording: the latest recording of prompts; None where there is none.
    """

    format: TraceFormat
    dtype: np.dtype
    num_rows: int
    data_offset: int
    sequence_facts: tuple[dict, ...] = ()
    crc32: int | None = 0
    recording: Recording | None = None

    @classmethod
    def reserve(cls, format: TraceFormat, sequence_facts: Iterable[dict] = ()) -> "TraceHeader":
        """Lay out the header of a trace without rows, with room for any number of them."""
        header = cls(format, format.dtype, 0, 0, tuple(sequence_facts))
        return replace(header, data_offset=align_up(8 + len(header._text()) + _ROOM_BYTES, _MIN_HEADER_BYTES))

    @property
    def end(self) -> int:
        """Bytes of the file up to the end of the rows that count."""
        return self.data_offset + self.num_rows * self.dtype.itemsize

    def to_bytes(self) -> bytes:
        """Return the header as it lies in the file, padded to `data_offset` bytes."""
        length = self.data_offset - 8
        text = self._text()
        assert len(text) <= length, "a header keeps its length"
        content = length.to_bytes(8, "little") + text.ljust(length)
        return content if self.crc32 is None else seal(content)

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
        metadata = {"format": FORMAT, "version": str(VERSION)}
        if self.crc32 is not None:
            metadata |= {"header_crc32": NO_CHECKSUM, "crc32": f"{self.crc32:08x}"}
        metadata["trace"] = _compact(trace)
        if self.recording is not None:
            metadata["recording"] = _compact(asdict(self.recording))
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
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    start = file.read(min(length, 4096)).lstrip()
    if size < 8 or length > 1 << 40 or not start.startswith(b"{"):
        raise _foreign(path)
    if length > size - 8:
        raise TraceError(
            f"{path} is truncated: {size:,} bytes on disk, and a header of {length:,} bytes announced. "
            "Copy or record it again."
        )
    file.seek(8)
    text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.get("__metadata__", {})
        kind, version = metadata.get("format"), metadata.get("version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise _corrupt(path, error) if FORMAT.encode() in text else _foreign(path) from None
    if kind != FORMAT:
        raise _foreign(path)
    if version != str(VERSION):
        raise TraceError(
            f"{path} is a trace of version {version}, and this moeflow reads version {VERSION}. Update moeflow."
        )
    try:
        if "header_crc32" in metadata and not is_sealed(prefix + text):
            raise ValueError("its checksum does not agree")
        found = _parse(metadata, header["rows"], 8 + length)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise _corrupt(path, error) from None
    if found.end > size:
        raise TraceError(
            f"{path} is truncated: {size:,} bytes on disk, {found.end:,} according to its header. "
            "Copy or record it again."
        )
    return found


def read_recording(path: str | Path) -> Recording | None:
    """Return how far the latest recording of prompts in a trace has come; None where there is no file, or none in it.

    Raises:
        TraceError: the file cannot be read, or is no trace or a damaged one.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return read_trace_header(path, file).recording if file.seek(0, 2) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}. Give another name.") from error


def _parse(metadata: dict, rows: dict, data_offset: int) -> TraceHeader:
    """Turn the header's text into a header; ValueError and the like where it is not as it must be."""
    trace = json.loads(metadata["trace"])
    num_rows, row_bytes = map(_whole, rows["shape"])
    if rows["dtype"] != "U8" or rows["data_offsets"] != [0, num_rows * row_bytes] or not row_bytes <= _MAX_ROW_BYTES:
        raise ValueError(f"rows {rows}")
    fields = [
        (name, _code(code), tuple(map(_whole, shape)), _whole(offset))
        for name, (code, shape, offset) in trace["row"].items()
    ]
    dtype = row_dtype(fields, row_bytes)
    names = set(dtype.names or ())
    lookahead = dtype["lookahead"].shape[1:] if "lookahead" in names else None
    format = TraceFormat(
        experts_per_layer=tuple(map(_whole, trace["num_experts"])),
        top_k=_whole(trace["top_k"]),
        fingerprint=str(trace["fingerprint"]),
        has_weights=bool(trace["has_weights"]),
        ranked=bool(trace["ranked"]),
        lookahead=lookahead,
        source=str(trace["source"]),
    )
    if not format.experts_per_layer or not min(format.experts_per_layer) > 0 or not format.num_experts <= 65535:
        raise ValueError(f"num_experts {trace['num_experts']}")
    for name, wanted in (format.dtype.fields or {}).items():
        if name not in names or dtype[name] != wanted[0]:
            raise ValueError(f"row {trace['row']}")
    facts = json.loads(metadata.get("sequences", "[]"))
    if not isinstance(facts, list) or not all(isinstance(fact, dict) for fact in facts):
        raise ValueError("sequences")
    recording = Recording(**json.loads(metadata["recording"])) if "recording" in metadata else None
    if recording is not None:
        told = {key: value for key, value in asdict(recording).items() if key != "name"}
        if any(type(value) is not int for value in told.values()) or not 0 <= recording.rows <= num_rows:
            raise ValueError(f"recording {told}")
    crc32 = int(metadata["crc32"], 16) if "crc32" in metadata else None
    return TraceHeader(format, dtype, num_rows, data_offset, tuple(facts), crc32, recording)


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _code(value: object) -> str:
    """Return a field's numpy type, which must be a number's."""
    if not isinstance(value, str) or not re.fullmatch("[<|]?[iuf][1248]", value):
        raise ValueError(f"{value!r} is no number's type")
    return value


def _field_code(dtype: np.dtype) -> tuple[str, list[int]]:
    return dtype.base.str.lstrip("|"), list(dtype.shape)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _corrupt(path: Path, error: Exception) -> TraceError:
    return TraceError(f"{path} has a corrupt trace header ({_short(error)}). Copy or record it again.")


def _short(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    return text if len(text) < 200 else text[:197] + "..."


def _foreign(path: Path) -> TraceError:
    return TraceError(
        f"{path} is not a routing trace. Give a file written by moeflow trace record or moeflow trace convert."
    )
