"""The packed expert file: one aligned, checksummed record an expert. Specified in docs/packed_format.md.

Knows layouts of records. Knows nothing of models.
"""

import json
import zlib
from array import array
from pathlib import Path
from typing import Any

from moeflow.checkpoint.layer_source import LayerSource, PieceTable
from moeflow.core import PAGE_BYTES, TENSOR_ALIGNMENT_BYTES, LayerLayout, MatrixSpec, RecordLayout, TensorSpec, align_up
from moeflow.errors import CheckpointError, ConfigError
from moeflow.kernels.quantization.formats import find_format

PACKED_FILE = "experts.moeflow"
MAGIC = b"MOEFLOW\x02"
PREFIX_BYTES = 24
MAX_HEADER_BYTES = 1 << 30


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
                "records": [_describe(record) for record in layout.variants or (layout.record,)],
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
        expected: [num_layers], the model's layouts.

    Raises:
        CheckpointError: not a packed file, corrupt, truncated, or of another model or dtype.
    """
    file = folder / PACKED_FILE
    header = _read_header(file)
    try:
        layers = [_layer(entry) for entry in header["layers"]]
        end = max(source.copies[0][0].begins[-1] + stride(source.layout, -1) for source in layers)
    except (KeyError, TypeError, ValueError, IndexError, ConfigError) as error:
        raise CheckpointError(f"{file} has a malformed header ({error!r}). Write it again with moeflow pack.") from None
    size = file.stat().st_size
    if size < end:
        raise CheckpointError(f"{file} is truncated: {size:,} bytes on disk, {end:,} by its header. Write it again.")
    if len(layers) != len(expected):
        raise _foreign(file, f"it has {len(layers)} layers of experts, the model {len(expected)}")
    for source, wanted in zip(layers, expected, strict=True):
        _compare(file, source.layout, wanted)
    return layers


def _read_header(file: Path) -> dict:
    with open(file, "rb") as handle:
        prefix = handle.read(PREFIX_BYTES)
        if len(prefix) < PREFIX_BYTES or prefix[:7] != MAGIC[:7]:
            raise CheckpointError(f"{file} is not a packed expert file. Write it with moeflow pack.")
        if prefix[7] != MAGIC[7]:
            raise CheckpointError(
                f"{file} has format version {prefix[7]}, this moeflow reads version {MAGIC[7]}. "
                f"{'Update moeflow' if prefix[7] > MAGIC[7] else 'Write it again with moeflow pack'}."
            )
        length = int.from_bytes(prefix[8:16], "little")
        text = handle.read(length) if length <= MAX_HEADER_BYTES else b""
    if len(text) != length or zlib.crc32(text) != int.from_bytes(prefix[16:20], "little"):
        raise CheckpointError(
            f"{file} has a corrupt header: its checksum does not agree. Write it again with moeflow pack."
        )
    return json.loads(text)


def _compare(file: Path, found: LayerLayout, wanted: LayerLayout) -> None:
    """Refuse a layer of another model: in a weight format names and shapes must agree, else every byte."""
    if (found.name, found.num_experts) != (wanted.name, wanted.num_experts):
        raise _foreign(
            file, f"{found.name} of {found.num_experts} experts is not {wanted.name} of {wanted.num_experts}"
        )
    for record in found.variants or (found.record,):
        if record.matrices:
            shapes = {spec.name: sorted(spec.shape) for spec in wanted.record.matrices or wanted.record.tensors}
            odd = [spec for spec in record.matrices if sorted(spec.shape) != shapes.get(spec.name)]
            if odd:
                raise _foreign(file, f"{found.name} has {odd[0]}, the model {shapes}")
        elif record != wanted.record:
            raise _foreign(file, f"{record} is not {wanted.record}")


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


def _record(entry: dict) -> RecordLayout:
    tensors = tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"]), t["offset"]) for t in entry["tensors"])
    matrices = tuple(MatrixSpec(m["name"], m["format"], tuple(m["shape"])) for m in entry.get("matrices", ()))
    for spec in tensors:
        if spec.offset % TENSOR_ALIGNMENT_BYTES or spec.offset + spec.num_bytes > entry["record_bytes"]:
            raise ValueError(f"{spec.name} does not lie inside its record")
    names = {spec.name: (spec.dtype, spec.shape) for spec in tensors}
    for matrix in matrices:
        for name, dtype, shape in find_format(matrix.format).tensors(matrix.name, matrix.shape):
            if names.get(name) != (dtype, shape):
                raise ValueError(f"{matrix.name} in {matrix.format} needs {name} of {dtype} {shape}")
    return RecordLayout(tensors, entry["record_bytes"], matrices)


def _layer(entry: dict) -> LayerSource:
    records, count = tuple(_record(record) for record in entry["records"]), entry["num_experts"]
    kinds = entry.get("record_of", [0] * count)
    if len(kinds) != count or not all(0 <= kind < len(records) for kind in kinds):
        raise ValueError(f"{entry['name']} does not tell the record of each of its {count} experts")
    largest = max(records, key=lambda record: record.num_bytes)
    variants = (records, tuple(kinds)) if len(records) > 1 else ()
    layout, first = LayerLayout(entry["name"], count, largest, *variants), int(entry["offset"], 16)
    if first % PAGE_BYTES:
        raise ValueError(f"records of {entry['name']} are not aligned")
    begins, position = array("Q"), first
    for expert in range(count):
        begins.append(position)
        position += stride(layout, expert)
    sizes = array("Q", [layout.record_of(expert).num_bytes for expert in range(count)]) if variants else None
    table = PieceTable("U8", (largest.num_bytes,), largest.num_bytes, array("H", [0]) * count, begins, sizes)
    sums = array("L", [int(value, 16) for value in entry["crc32"]])
    if len(sums) != count:
        raise ValueError(f"{entry['name']} has {len(sums)} checksums for {count} experts")
    return LayerSource(layout, ((table, 0),), (), sums)
