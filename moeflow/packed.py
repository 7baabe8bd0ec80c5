"""The packed expert file: one aligned, checksummed record an expert. Specified in docs/packed_format.md."""

import json
import zlib
from array import array
from pathlib import Path

from moeflow.core import PAGE_BYTES, LayerLayout, RecordLayout, TensorSpec, align_up
from moeflow.errors import CheckpointError
from moeflow.layers import LayerSource, PieceTable

PACKED_FILE = "experts.moeflow"
MAGIC = b"MOEFLOW\x01"
PREFIX_BYTES = 24
MAX_HEADER_BYTES = 1 << 30


def header_bytes(layouts: list[LayerLayout], crc32: list[list[int]] | None = None) -> bytes:
    """Build everything before the first record.

    Args:
        layouts: [num_layers].
        crc32: [num_layers][num_experts] checksums; zeros while they are not known (the length stays the same).
    """
    offset = 0
    for _ in range(2):  # the header's own length decides where records begin
        layers, position = [], offset
        for number, layout in enumerate(layouts):
            sums = crc32[number] if crc32 else [0] * layout.num_experts
            stride = align_up(layout.record.num_bytes, PAGE_BYTES)
            layers.append(
                {
                    "name": layout.name,
                    "num_experts": layout.num_experts,
                    "offset": f"{position:016x}",
                    "stride": stride,
                    "record_bytes": layout.record.num_bytes,
                    "tensors": [
                        {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "offset": t.offset}
                        for t in layout.record.tensors
                    ],
                    "crc32": [f"{value:08x}" for value in sums],
                }
            )
            position += stride * layout.num_experts
        text = json.dumps({"format": "moeflow-experts", "version": 1, "layers": layers}, separators=(",", ":")).encode()
        offset = align_up(PREFIX_BYTES + len(text), PAGE_BYTES)
    prefix = MAGIC + len(text).to_bytes(8, "little") + zlib.crc32(text).to_bytes(4, "little") + bytes(4)
    return (prefix + text).ljust(offset, b"\0")


def record_offsets(layouts: list[LayerLayout], header_length: int) -> list[int]:
    """Return the file offset of each layer's first record."""
    offsets, position = [], header_length
    for layout in layouts:
        offsets.append(position)
        position += align_up(layout.record.num_bytes, PAGE_BYTES) * layout.num_experts
    return [*offsets, position]


def read_packed(folder: Path, expected: list[LayerLayout]) -> list[LayerSource]:
    """Read a packed file's header and check it against the model it is to serve.

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
        end = max(
            source.copies[0][0].begins[-1] + entry["stride"]
            for source, entry in zip(layers, header["layers"], strict=True)
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file} has a malformed header ({error!r}). Write it again with moeflow pack.") from None
    size = file.stat().st_size
    if size < end:
        raise CheckpointError(f"{file} is truncated: {size:,} bytes on disk, {end:,} by its header. Write it again.")
    found = [source.layout for source in layers]
    if found != expected:
        odd = next(
            (f"{f} is not {e}" for f, e in zip(found, expected, strict=False) if f != e), "the number of layers differs"
        )
        raise CheckpointError(
            f"{file} does not hold the experts of the model in this folder as they are asked for "
            f"({odd}). Load it with the "
            "dtype it was packed in, or pack the model again."
        )
    return layers


def _read_header(file: Path) -> dict:
    with open(file, "rb") as handle:
        prefix = handle.read(PREFIX_BYTES)
        if len(prefix) < PREFIX_BYTES or prefix[:7] != MAGIC[:7]:
            raise CheckpointError(f"{file} is not a packed expert file. Write it with moeflow pack.")
        if prefix[7] != MAGIC[7]:
            raise CheckpointError(
                f"{file} has format version {prefix[7]}, this moeflow reads version {MAGIC[7]}. Update moeflow."
            )
        length = int.from_bytes(prefix[8:16], "little")
        text = handle.read(length) if length <= MAX_HEADER_BYTES else b""
    if len(text) != length or zlib.crc32(text) != int.from_bytes(prefix[16:20], "little"):
        raise CheckpointError(
            f"{file} has a corrupt header: its checksum does not agree. Write it again with moeflow pack."
        )
    return json.loads(text)


def _layer(entry: dict) -> LayerSource:
    tensors = tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"]), t["offset"]) for t in entry["tensors"])
    record, count = RecordLayout(tensors, entry["record_bytes"]), entry["num_experts"]
    first, stride = int(entry["offset"], 16), entry["stride"]
    if first % PAGE_BYTES or stride % PAGE_BYTES or stride < record.num_bytes:
        raise ValueError(f"records of {entry['name']} are not aligned")
    begins = array("Q", range(first, first + count * stride, stride))
    table = PieceTable("U8", (record.num_bytes,), record.num_bytes, array("H", [0]) * count, begins)
    sums = array("L", [int(value, 16) for value in entry["crc32"]])
    if len(sums) != count:
        raise ValueError(f"{entry['name']} has {len(sums)} checksums for {count} experts")
    return LayerSource(LayerLayout(entry["name"], count, record), ((table, 0),), (), sums)
