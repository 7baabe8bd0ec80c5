"""Layer sources: for each expert, the places of its bytes in files and the steps that make a record of them.

Knows numbers and bytes. Knows nothing of torch, transformers or open files.
"""

import zlib
from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from moeflow.core import LayerLayout
from moeflow.errors import ExpertReadError


class PieceTable(NamedTuple):
    """One piece of every expert of a layer: expert e is `num_bytes` bytes at `begins[e]` of file `files[e]`.

    Args:
        dtype: safetensors dtype name of the piece on disk; of the first where `dtypes` is given.
        shape: shape of one expert's piece.
        num_bytes: bytes of one piece; of the largest where `sizes` is given.
        files: [num_experts], file numbers.
        begins: [num_experts], absolute byte offsets.
        sizes: [num_experts], bytes of each expert's piece, where they differ.
        dtypes: [num_experts], dtype name of each expert's piece, where they differ.
    """

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    files: array
    begins: array
    sizes: array | None = None
    dtypes: tuple[str, ...] | None = None

    def bytes_of(self, expert: int) -> int:
        """Return the bytes of one expert's piece."""
        return self.num_bytes if self.sizes is None else self.sizes[expert]

    def dtype_of(self, expert: int) -> str:
        """Return the dtype name of one expert's piece."""
        return self.dtype if self.dtypes is None else self.dtypes[expert]


Convert = Callable[[int, list[np.ndarray], np.ndarray], None]


class Conversion(NamedTuple):
    """Pieces that become one or more tensors of the record by arithmetic (transpose, interleave, cast).

    Args:
        pieces: the piece tables, in the order `convert` takes them.
        convert: `(expert, [uint8 array per piece], uint8 array of the whole record) -> None`.
    """

    pieces: tuple[PieceTable, ...]
    convert: Convert


class LayerSource(NamedTuple):
    """The bytes and steps that fill one layer's records from the files.

    Args:
        layout: the record and its layer's name.
        copies: `(piece table, offset in the record)`: bytes that are copied as they are.
        conversions: tensors that the disk holds in another form than the module.
        crc32: [num_experts], checksum of each record, or None where the file has none.
        check: looks at a record when it is first read, `(expert, uint8 array of the record) -> None`; raises
            CheckpointError where it is damaged. None where every record is good.
    """

    layout: LayerLayout
    copies: tuple[tuple[PieceTable, int], ...]
    conversions: tuple[Conversion, ...]
    crc32: array | None = None
    check: Callable[[int, np.ndarray], None] | None = None

    def pieces(self) -> Iterator[PieceTable]:
        """Yield every piece table, those that are copied first."""
        for table, _ in self.copies:
            yield table
        for conversion in self.conversions:
            yield from conversion.pieces

    def fill(self, expert: int, pieces: list[np.ndarray], record: np.ndarray) -> None:
        """Make an expert's record of its raw pieces.

        Args:
            expert: its number.
            pieces: uint8 arrays in the order of `pieces()`.
            record: uint8 [>= record.num_bytes], written.
        """
        raw = iter(pieces)
        for table, offset in self.copies:
            record[offset : offset + table.bytes_of(expert)] = next(raw)
        for conversion in self.conversions:
            conversion.convert(expert, [next(raw) for _ in conversion.pieces], record)

    def checked_record(self, expert: int, pieces: list[np.ndarray]) -> np.ndarray:
        """Make an expert's record in memory of its own, for a source that makes another record of it.

        Args:
            expert: its number.
            pieces: as for `fill`.

        Returns:
            uint8 [num_bytes of the expert's record].

        Raises:
            ExpertReadError: it has another checksum than the file says.
        """
        record = np.empty(self.layout.record_of(expert).num_bytes, np.uint8)
        self.fill(expert, pieces, record)
        if self.crc32 is not None and zlib.crc32(record.data) != self.crc32[expert]:
            raise ExpertReadError(
                f"expert {expert} of {self.layout.name} is corrupt: its checksum does not agree. Write the file again."
            )
        return record
