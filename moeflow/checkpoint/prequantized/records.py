"""Records filled from a checkpoint whose experts are quantised already: their own bits, in the weight formats.

Where the checkpoint's bytes are the format's, they are copied; else one expert's matrix is rearranged as it is read.
"""

from itertools import accumulate
from typing import Any

import numpy as np
import torch

from moeflow.checkpoint.headers import TensorEntry
from moeflow.checkpoint.layer_source import Conversion, Convert, PieceTable
from moeflow.checkpoint.pieces import Feeding, piece_tables, source_order
from moeflow.checkpoint.prequantized.scheme import BLOCK, QuantizationScheme, StoredMatrix
from moeflow.checkpoint.prequantized.values import in_format
from moeflow.core import MatrixSpec, RecordLayout, TensorSpec
from moeflow.dtypes import TORCH_DTYPES
from moeflow.errors import CheckpointError, ExpertReadError, UnsupportedModelError
from moeflow.kernels.quantization.formats import find_format

_PIECE_DTYPES = {
    **TORCH_DTYPES, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu
}  # fmt: skip
_ROWS_FOLLOW = {"MergeModulelist": 0, "Concatenate": 1}  # operations that leave each expert's rows as they are


def quantized_record(record: RecordLayout, matrices: list[MatrixSpec]) -> RecordLayout:
    """Return a float record's layout with some of its parameters in a weight format.

    Args:
        record: as the module has its parameters.
        matrices: those that are stored in a format.
    """
    by_name, tensors = {matrix.name: matrix for matrix in matrices}, []
    for spec in record.tensors:
        matrix = by_name.get(spec.name)
        if matrix is None:
            tensors.append((spec.name, spec.dtype, spec.shape))
        else:
            tensors += find_format(matrix.format).tensors(matrix.name, matrix.shape)
    return RecordLayout.pack(tensors, tuple(matrices))


def place_matrix(
    name: str,
    matrix: MatrixSpec,
    record: RecordLayout,
    feeding: Feeding,
    stored: dict[str, StoredMatrix],
    scheme: QuantizationScheme,
    num_experts: int,
) -> tuple[list[tuple[PieceTable, int]], list[Conversion]]:
    """Return the copies and conversions that fill one matrix of every expert.

    Args:
        name: full name of the parameter, for errors.
        matrix: how the record stores it.
        record: the record's layout.
        feeding: the stand-ins that feed it.
        stored: the checkpoint's quantised matrices.
        scheme: how they are quantised.
        num_experts: of the layer.

    Raises:
        CheckpointError: the checkpoint's matrices have another shape than the model's.
        UnsupportedModelError: they would have to be mixed, or their scales do not fit the format.
    """
    converter, groups, place = feeding
    _refuse_mixing(name, converter)
    endings = list(stored[next(iter(groups.values()))[0][0]].pieces)
    tables = {}  # {piece: one table for each part}; gate and up are two parts of one matrix
    for ending in endings:
        pieces = {pattern: [(key, _piece(stored[key], ending, key)) for key, _ in members]
                  for pattern, members in groups.items()}  # fmt: skip
        tables[ending] = piece_tables(name, Feeding(converter, pieces, place), num_experts)
    parts = [stored[groups[pattern][0][0]].shape for pattern in source_order(groups, converter)]
    rows = [shape[-2] for shape in parts]
    if sum(rows) != matrix.shape[0] or any(shape[-1] != matrix.shape[1] for shape in parts):
        raise CheckpointError(
            f"{name} is {list(matrix.shape)} an expert (out, in features), the checkpoint has "
            f"{' and '.join(str(list(shape)) for shape in parts)}. Its config.json is of another model."
        )
    if scheme.method == "fp8" and any(count % BLOCK for count in rows[:-1]):
        raise UnsupportedModelError(
            f"{name} is made of FP8 matrices of {rows} rows, and scales of {BLOCK} x {BLOCK} blocks can only be joined "
            f"at multiples of {BLOCK} rows. Use the model's bfloat16 checkpoint."
        )
    specs = {spec.name: spec for spec in record.tensors}
    copies, conversions = [], []
    for part, first in enumerate([0, *accumulate(rows)][:-1]):
        shape = (rows[part], matrix.shape[1])
        chosen = {ending: tables[ending][part] for ending in endings}
        if _same_bytes(scheme, chosen, shape):
            codes, scales = chosen.values()
            scale = specs[f"{matrix.name}_scale"]
            scale_row = first // BLOCK if scheme.method == "fp8" else first
            copies.append((codes, _row_offset(specs[matrix.name], first)))
            copies.append((scales, _row_offset(scale, scale_row)))
        else:
            convert = _converter(name, matrix, specs, scheme, chosen, shape, first)
            conversions.append(Conversion(tuple(chosen.values()), convert))
    return copies, conversions


def _refuse_mixing(name: str, converter: Any) -> None:
    for operation in converter.operations if converter is not None else ():
        kind = type(operation).__name__
        if kind not in _ROWS_FOLLOW or operation.dim != _ROWS_FOLLOW[kind]:
            raise UnsupportedModelError(
                f"{name} is quantised and stored in a form that needs {kind}, which moeflow does not do to quantised "
                "experts. Use the model's float32, bfloat16 or float16 checkpoint."
            )


def _piece(matrix: StoredMatrix, ending: str, key: str) -> TensorEntry:
    if ending not in matrix.pieces:
        raise CheckpointError(f"{key} has no {ending}, which other experts of its layer have. Download it again.")
    return matrix.pieces[ending][1]


def _same_bytes(scheme: QuantizationScheme, tables: dict[str, PieceTable], shape: tuple[int, int]) -> bool:
    """Tell whether the checkpoint's bytes are those of the format."""
    if scheme.method == "mxfp4":
        return True
    scales = tables.get("_scale_inv")
    return scales is not None and shape[1] % BLOCK == 0 and scales.dtypes is None and scales.dtype == "F32"


def _row_offset(spec: TensorSpec, row: int) -> int:
    return spec.offset + row * (spec.num_bytes // spec.shape[0])


def _converter(
    name: str,
    matrix: MatrixSpec,
    specs: dict[str, TensorSpec],
    scheme: QuantizationScheme,
    tables: dict[str, PieceTable],
    shape: tuple[int, int],
    first_row: int,
) -> Convert:
    """Build the function that brings one part of one expert's matrix into the record."""

    def convert(expert: int, pieces: list[np.ndarray], record: np.ndarray) -> None:
        tensors = {
            ending: torch.from_numpy(piece).view(_PIECE_DTYPES[table.dtype_of(expert)]).view(table.shape)
            for (ending, table), piece in zip(tables.items(), pieces, strict=True)
        }
        try:
            found = in_format(tensors, scheme, shape, matrix.name)
        except ValueError as error:
            raise ExpertReadError(
                f"expert {expert} of {name} cannot be used: {error}. Download the checkpoint again, or use another "
                "quantisation of the model."
            ) from None
        for tensor, value in found.items():
            spec = specs[tensor]
            # the scales of fp8 have a row for each block of rows
            begin = _row_offset(spec, first_row if spec.shape[0] == matrix.shape[0] else first_row // BLOCK)
            out = torch.from_numpy(record[begin : begin + value.nbytes]).view(TORCH_DTYPES[spec.dtype])
            out.view(value.shape).copy_(value)

    return convert
