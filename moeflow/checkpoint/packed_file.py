"""The packed expert file: one aligned, checksummed record an expert. Specified in docs/packed_format.md.

Knows layouts of records. Knows nothing of models.
"""

import json
import os
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeflow.checkpoint.headers import SMALL_HEADER_BYTES
from moeflow.checkpoint.layer_source import LayerSource, PieceTable
from moeflow.core import PAGE_BYTES, TENSOR_ALIGNMENT_BYTES, LayerLayout, MatrixSpec, RecordLayout, TensorSpec, align_up
from moeflow.errors import CheckpointError, ConfigError
from moeflow.formatting import brief
from moeflow.kernels.quantization.formats import find_format, is_lossless

PACKED_FILE = "experts.moeflow"
MAGIC = b"MOEFLOW\x02"
PREFIX_BYTES = 24
MAX_HEADER_BYTES = 1 << 30
MAX_FILE_BYTES = 1 << 62
_HEXADECIMAL = set("0123456789abcdefABCDEF")
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)


def stride(layout: LayerLayout, expert: int) -> int:
    """Return the bytes an expert takes in the file: its record in whole pages."""
    return align_up(layout.record_of(expert).num_bytes, PAGE_BYTES)


def header_bytes(layouts: list[LayerLayout], crc32: list[list[int]] | None = None) -> bytes:
    """Build everything before the first record.

    Args:
        layouts: [num_layers].
        crc32: [num_layers][num_experts] checksums; zeros while they are not known (the length stays the same).
    """
    offset = 0
    for _ in range(2):  # records begin behind the header, whose length depends on their offsets
        layers, position = [], offset
        for number, layout in enumerate(layouts):
            sums = crc32[number] if crc32 else [0] * layout.num_experts
            entry = {
                "name": layout.name,
                "num_experts": layout.num_experts,
                "offset": f"{position:016x}",
                "records": [_describe(record) for record in layout.records],
            }
            if layout.variants:
                entry["record_of"] = list(layout.variant_of)
            layers.append({**entry, "crc32": [f"{value:08x}" for value in sums]})
            position += sum(stride(layout, expert) for expert in range(layout.num_experts))
        text = json.dumps({"format": "moeflow-experts", "version": 2, "layers": layers}, separators=(",", ":")).encode()
        offset = align_up(PREFIX_BYTES + len(text), PAGE_BYTES)
    prefix = MAGIC + len(text).to_bytes(8, "little") + zlib.crc32(text).to_bytes(4, "little") + bytes(4)
    return (prefix + text).ljust(offset, b"\0")


def record_offsets(layouts: list[LayerLayout], header_length: int) -> tuple[list[list[int]], int]:
    """Return the file offset of each record, [num_layers][num_experts], and the length of the file."""
    offsets: list[list[int]] = []
    position = header_length
    for layout in layouts:
        offsets.append([])
        for expert in range(layout.num_experts):
            offsets[-1].append(position)
            position += stride(layout, expert)
    return offsets, position


def read_packed(folder: Path, expected: list[LayerLayout]) -> list[LayerSource]:
    """Read a packed file's header and check it against the model.

    Args:
        folder: holds the packed file.
        expected: [num_layers], the model's layouts; their dtype matters only where no expert is in a weight format.

    Raises:
        CheckpointError: not a packed file, corrupt, truncated, or of another model or dtype.
    """
    file, layers = folder / PACKED_FILE, packed_layers(folder)
    if len(layers) != len(expected):
        raise _foreign(file, f"it has {len(layers)} layers of experts, the model {len(expected)}")
    if any(is_lossless(record) for source in layers for record in source.layout.records):
        expected = [_in_bfloat16(layout) for layout in expected]  # what stayed as it was is computed from bfloat16, too
    for source, wanted in zip(layers, expected, strict=True):
        _compare(file, source.layout, wanted)
    return layers


def packed_layers(folder: Path) -> list[LayerSource]:
    """Read a packed file's header, whatever the model.

    Args:
        folder: holds the packed file.

    Raises:
        CheckpointError: not a packed file, corrupt or truncated.
    """
    file = folder / PACKED_FILE
    with _malformed_header(file):
        header, begin, size = _read_header(file)
        layers = [_layer(entry, size) for entry in header["layers"]]
        end = _check_apart(layers, begin)
    if size < end:
        raise CheckpointError(f"{file} is truncated: {size:,} bytes on disk, {end:,} by its header. Write it again.")
    return layers


def packed_dtype(folder: Path) -> str | None:
    """Return the safetensors name of the dtype that a packed file's experts have; None in a weight format.

    Raises:
        CheckpointError: not a packed file, corrupt or truncated.
    """
    file = folder / PACKED_FILE
    with _malformed_header(file):
        header, _, _ = _read_header(file)
        record = _record(header["layers"][0]["records"][0])
    if is_lossless(record):
        return "BF16"
    return None if record.matrices else record.tensors[0].dtype


@contextmanager
def _malformed_header(file: Path) -> Iterator[None]:
    """Turn what goes wrong with another's header into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except (*_MALFORMED, ConfigError) as error:
        why = brief(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{file} has a malformed header ({why}). Write it again with moeflow pack.") from None


def _read_header(file: Path) -> tuple[dict, int, int]:
    """Return the header, the offset at which it ends, and the size of the file."""
    with open(file, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        prefix = handle.read(PREFIX_BYTES)
        if len(prefix) < PREFIX_BYTES or prefix[:7] != MAGIC[:7]:
            raise CheckpointError(f"{file} is not a packed expert file. Write it with moeflow pack.")
        if prefix[7] != MAGIC[7]:
            raise CheckpointError(
                f"{file} has format version {prefix[7]}, this moeflow reads version {MAGIC[7]}. "
                f"{'Update moeflow' if prefix[7] > MAGIC[7] else 'Write it again with moeflow pack'}."
            )
        length = int.from_bytes(prefix[8:16], "little")
        # A record takes a page at least, and a few bytes of the header.
        fits = length <= min(MAX_HEADER_BYTES, max(SMALL_HEADER_BYTES, size - PREFIX_BYTES - length))
        text = handle.read(length) if fits else b""
    if len(text) != length or zlib.crc32(text) != int.from_bytes(prefix[16:20], "little"):
        raise CheckpointError(
            f"{file} has a corrupt header: its checksum does not agree. Write it again with moeflow pack."
        )
    return json.loads(text.decode()), PREFIX_BYTES + length, size


def _compare(file: Path, found: LayerLayout, wanted: LayerLayout) -> None:
    """Refuse a layer of another model: in a weight format names and shapes must agree, else every byte."""
    if (found.name, found.num_experts) != (wanted.name, wanted.num_experts):
        raise _foreign(
            file, f"{found.name} of {found.num_experts} experts is not {wanted.name} of {wanted.num_experts}"
        )
    for record in found.records:
        if record.matrices:
            shapes = {spec.name: sorted(spec.shape) for spec in wanted.record.matrices or wanted.record.tensors}
            odd = [spec for spec in record.matrices if sorted(spec.shape) != shapes.get(spec.name)]
            if odd:
                raise _foreign(file, f"{found.name} has {odd[0]}, the model {shapes}")
        elif record != wanted.record:
            raise _foreign(file, f"{_brief_record(record)} is not {_brief_record(wanted.record)}")


def _in_bfloat16(layout: LayerLayout) -> LayerLayout:
    record = RecordLayout.pack([(spec.name, "BF16", spec.shape) for spec in layout.record.tensors])
    return layout._replace(record=record)


def _brief_record(record: RecordLayout) -> str:
    return brief(", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in record.tensors))


def _foreign(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file} does not hold the experts of the model in this folder as they are asked for ({why}). Load it with the "
        "dtype it was packed in, or pack the model again."
    )


def _describe(record: RecordLayout) -> dict:
    found: dict[str, Any] = {
        "record_bytes": record.num_bytes,
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "offset": t.offset} for t in record.tensors
        ],
    }
    if record.matrices:
        found["matrices"] = [{"name": m.name, "format": m.format, "shape": list(m.shape)} for m in record.matrices]
    return found


def _whole(value: Any, most: int = MAX_FILE_BYTES) -> int:
    """Return a whole number from 0 to `most`, and refuse all else that JSON can hold in its place."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r} is not a whole number from 0 to {most}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _shape(value: list) -> tuple[int, ...]:
    return tuple(_whole(dim) for dim in value)


def _record(entry: dict) -> RecordLayout:
    num_bytes = _whole(entry["record_bytes"])
    tensors = tuple(
        TensorSpec(_text(t["name"]), t["dtype"], _shape(t["shape"]), _whole(t["offset"])) for t in entry["tensors"]
    )
    matrices = tuple(
        MatrixSpec(_text(m["name"]), _text(m["format"]), (rows, columns))
        for m in entry.get("matrices", ())
        for rows, columns in [_shape(m["shape"])]
    )
    position = 0
    for spec in sorted(tensors, key=lambda spec: spec.offset):
        if spec.offset % TENSOR_ALIGNMENT_BYTES or spec.offset < position:
            raise ValueError(f"{spec.name} is not aligned or overlaps another tensor")
        position = spec.offset + spec.num_bytes
    if not tensors or position > num_bytes:
        raise ValueError("a record has no tensors, or they do not lie inside it")
    names = {spec.name: (spec.dtype, spec.shape) for spec in tensors}
    for matrix in matrices:
        for name, dtype, shape in find_format(matrix.format).tensors(matrix.name, matrix.shape):
            if names.get(name) != (dtype, shape):
                raise ValueError(f"{matrix.name} in {matrix.format} needs {name} of {dtype} {shape}")
    return RecordLayout(tensors, num_bytes, matrices)


def _layer(entry: dict, size: int) -> LayerSource:
    """Return a layer's source; no more experts than pages in a file of `size` bytes are made room for."""
    records, count = tuple(_record(record) for record in entry["records"]), entry["num_experts"]
    _whole(count, size // PAGE_BYTES)
    kinds = entry.get("record_of", [0] * count)
    if not count or len(kinds) != count or not all(_whole(kind) < len(records) for kind in kinds):
        raise ValueError(f"{entry['name']} does not tell the record of each of its {count} experts")
    largest = max(records, key=lambda record: record.num_bytes)
    variants = (records, tuple(kinds)) if len(records) > 1 else ()
    layout, first = LayerLayout(_text(entry["name"]), count, largest, *variants), _hexadecimal(entry["offset"], 16)
    if first % PAGE_BYTES:
        raise ValueError(f"records of {layout.name} are not aligned")
    begins, position = array("Q"), first
    for expert in range(count):
        begins.append(position)
        position += stride(layout, expert)
    sizes = array("Q", [layout.record_of(expert).num_bytes for expert in range(count)]) if variants else None
    table = PieceTable("U8", (largest.num_bytes,), largest.num_bytes, array("H", [0]) * count, begins, sizes)
    sums = array("L", [_hexadecimal(value, 8) for value in entry["crc32"]])
    if len(sums) != count:
        raise ValueError(f"{layout.name} has {len(sums)} checksums for {count} experts")
    return LayerSource(layout, ((table, 0),), (), sums)


def _hexadecimal(text: str, digits: int) -> int:
    if len(text) != digits or not set(text) <= _HEXADECIMAL:
        raise ValueError(f"{text!r} is not a number of {digits} hexadecimal digits")
    return int(text, 16)


def _check_apart(layers: list[LayerSource], begin: int) -> int:
    """Refuse layers that overlap the header or each other; return where the last one ends."""
    position = begin
    for source in sorted(layers, key=lambda source: source.copies[0][0].begins[0]):
        begins = source.copies[0][0].begins
        if begins[0] < position:
            raise ValueError(f"records of {source.layout.name} begin inside of what is before them")
        position = begins[-1] + stride(source.layout, len(begins) - 1)
    return position
