"""The header of one GGUF file: its metadata, and the place of each of its tensors.

Knows the format's version 2 and 3 in little endian. Knows nothing of splits. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (the magic, a version, two counts, the keys with their values,
the tensors' names, shapes, types and offsets; then, aligned, the tensors' bytes).
"""

import math
import os
import struct
from pathlib import Path
from typing import NamedTuple

from moeflow.checkpoint.gguf.header_bytes import HeaderBytes
from moeflow.checkpoint.gguf.metadata import UINT32, Metadata, read_metadata
from moeflow.checkpoint.headers import TensorEntry
from moeflow.errors import CheckpointError
from moeflow.formatting import brief
from moeflow.kernels.quantization.ggml import BLOCK_TYPES

VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
MAX_TENSORS = 65_536  # a model of 671B parameters whose experts are not stacked has 46,000 in all its splits
MAX_NAME_BYTES = 64  # the format's own limit
MAX_DIMS = 4  # ggml's
MAX_ALIGNMENT = 1 << 20
_DEFAULT_ALIGNMENT = 32
_MOST = 1 << 63
_TYPES = {block.number: block for block in BLOCK_TYPES.values()}
_VERSION, _COUNTS, _NUM_DIMS = struct.Struct("<I"), struct.Struct("<QQ"), struct.Struct("<I")
_PLACES = [struct.Struct(f"<{num_dims}QIQ") for num_dims in range(MAX_DIMS + 1)]


class GgufHeader(NamedTuple):
    """What a file's header says.

    Args:
        metadata: of this file.
        tensors: of this file, by their names; `TensorEntry.file` is 0.
    """

    metadata: Metadata
    tensors: dict[str, TensorEntry]


def read_header(file: Path) -> GgufHeader:
    """Read the header of one file and check it against the file's size. Never reads a tensor.

    Raises:
        CheckpointError: the header is not one, or the file does not hold what its header says.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file. Give the path of a GGUF file.")
    try:
        with open(file, "rb") as handle:
            return _read(HeaderBytes(file, handle, os.fstat(handle.fileno()).st_size))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error


def _read(reader: HeaderBytes) -> GgufHeader:
    _check_version(reader)
    num_tensors, num_keys = reader.take(_COUNTS)
    if num_tensors > MAX_TENSORS:
        raise reader.fault(f"announces {num_tensors:,} tensors, at most {MAX_TENSORS:,} are allowed")
    metadata = read_metadata(reader, num_keys)
    alignment = _alignment(reader, metadata)
    tensors: dict[str, TensorEntry] = {}
    for number in range(num_tensors):
        reader.subject = f"tensor number {number + 1} of {num_tensors}"
        name = reader.text(MAX_NAME_BYTES)
        reader.subject = f"tensor {name!r}"
        if name in tensors:
            raise reader.fault("stands there twice")
        tensors[name] = _entry(reader, alignment)
    data = -(-reader.position // alignment) * alignment
    tensors = {name: entry._replace(begin=data + entry.begin) for name, entry in tensors.items()}
    _check_places(reader, tensors)
    return GgufHeader(metadata, tensors)


def _check_version(reader: HeaderBytes) -> None:
    file = reader.file
    reader.load(min(4, reader.size))
    magic = bytes(reader.data[:4])
    if magic != b"GGUF":
        raise CheckpointError(
            f"{file} begins with {magic!r}, a GGUF file with b'GGUF'. It is another kind of file, or damaged: download "
            "it again."
        )
    reader.position = 4
    (version,) = reader.take(_VERSION)
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, *VERSIONS):
        raise CheckpointError(
            f"{file} is big endian (its version number {swapped} is byte-swapped), and moeflow reads little endian. "
            "Convert it: python -m gguf.scripts.gguf_convert_endian FILE little, of the package gguf."
        )
    if version not in VERSIONS:
        raise CheckpointError(
            f"{file} is of version {version} of GGUF, and moeflow reads versions 2 and 3. "
            + ("Convert the model again with a newer llama.cpp." if version < 2 else "Update moeflow, or convert it.")
        )


def _alignment(reader: HeaderBytes, metadata: Metadata) -> int:
    kind = metadata.kind(ALIGNMENT_KEY)
    if kind is None:
        return _DEFAULT_ALIGNMENT
    reader.subject = f"key {ALIGNMENT_KEY!r}"
    if kind != UINT32:
        raise reader.fault(f"has a value of kind number {kind}, it must be {UINT32} (a 32-bit count)")
    alignment: int = metadata[ALIGNMENT_KEY]
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise reader.fault(f"is {alignment:,}, it must be a power of two, at most {MAX_ALIGNMENT:,}")
    return alignment


def _entry(reader: HeaderBytes, alignment: int) -> TensorEntry:
    """Return the place of the tensor whose name was read; `begin` counts from the first tensor's byte."""
    (num_dims,) = reader.take(_NUM_DIMS)
    if num_dims > MAX_DIMS:
        raise reader.fault(f"has {num_dims:,} dimensions, at most {MAX_DIMS} are allowed")
    *dims, number, offset = reader.take(_PLACES[num_dims])
    shape = tuple(reversed(dims))
    num_values = math.prod(shape)
    if not 0 < num_values < _MOST:
        raise reader.fault(f"has the shape {list(shape)}, which cannot be")
    block = _TYPES.get(number)
    if block is None:
        raise CheckpointError(
            f"{reader.file}: {reader.subject} is of type number {number}, and moeflow knows "
            f"{', '.join(sorted(BLOCK_TYPES))}. Convert the model to one of these with llama.cpp, or update moeflow."
        )
    row = shape[-1] if shape else 1
    if row % block.block_values:
        raise reader.fault(f"has rows of {row:,} values, and {block.name} has blocks of {block.block_values}")
    if offset % alignment:
        raise reader.fault(f"begins at offset {offset:,}, which is no multiple of {alignment:,}, the file's alignment")
    return TensorEntry(0, block.name, shape, offset, num_values // block.block_values * block.block_bytes)


def _check_places(reader: HeaderBytes, tensors: dict[str, TensorEntry]) -> None:
    """Refuse tensors that are not in the file, or that overlap."""
    position, before = 0, ""
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].begin):
        reader.subject = f"tensor {name!r}"
        if entry.begin < position:
            raise reader.fault(f"begins at byte {entry.begin:,}, and tensor {before!r} ends at {position:,}")
        position, before = entry.begin + entry.num_bytes, name
        if position > reader.size:
            raise CheckpointError(
                f"{reader.file} is truncated or damaged: tensor {brief(name)!r} of {entry.dtype} {list(entry.shape)} "
                f"ends at byte {position:,}, and the file has {reader.size:,} bytes. Download it again."
            )
