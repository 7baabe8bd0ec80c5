"""Where each expert's bytes come from: the plan a checkpoint or a packed file hands to the ExpertStore.

Pure numbers: no torch, no transformers, no open file.
"""

from array import array
from collections.abc import Callable
from typing import NamedTuple

from moeflow.core import LayerLayout


class PieceTable(NamedTuple):
    """One piece of every expert of a layer: expert e is `num_bytes` bytes at `begins[e]` of file `files[e]`.

    Args:
        dtype: safetensors dtype name of the piece on disk.
        shape: shape of one expert's piece.
        num_bytes: bytes of one piece.
        files: [num_experts], file numbers.
        begins: [num_experts], absolute byte offsets.
    """

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    files: array
    begins: array


class Conversion(NamedTuple):
    """Pieces that become one or more tensors of the record by arithmetic (transpose, interleave, cast).

    Args:
        pieces: the piece tables, in the order `convert` takes them.
        convert: `(expert, [uint8 array per piece], uint8 array of the whole record) -> None`.
    """

    pieces: tuple[PieceTable, ...]
    convert: Callable


class LayerSource(NamedTuple):
    """How one layer's records are filled from the files.

    Args:
        layout: the record and its layer's name.
        copies: `(piece table, offset in the record)`: bytes that are moved as they are.
        conversions: tensors that are not on disk as the module wants them.
        crc32: [num_experts], checksum of each record, or None where the file has none.
    """

    layout: LayerLayout
    copies: tuple[tuple[PieceTable, int], ...]
    conversions: tuple[Conversion, ...]
    crc32: array | None = None
