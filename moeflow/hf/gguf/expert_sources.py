"""Layer sources of a GGUF file: every expert's blocks as byte ranges of the file, copied as they are.

A matrix keeps the file's own type; gate and up of one type follow one another, row after row, and their blocks are the
record's. Matrices of two types in one parameter become float32 as they are read.
"""

from array import array

import numpy as np
import torch
from transformers import PreTrainedModel

from moeflow.checkpoint.headers import TensorEntry
from moeflow.checkpoint.layer_source import Conversion, Convert, LayerSource, PieceTable
from moeflow.checkpoint.prequantized.records import quantized_record
from moeflow.core import MatrixSpec, TensorSpec
from moeflow.dtypes import TORCH_DTYPES
from moeflow.errors import CheckpointError
from moeflow.hf.expert_sources import map_layouts
from moeflow.hf.experts_interface import experts_modules
from moeflow.hf.gguf.feeding import Fed
from moeflow.hf.gguf.values import values_of
from moeflow.kernels.quantization.ggml import BLOCK_TYPES

_MIXED = "float32"


def map_blocks(model: PreTrainedModel, tensors: dict[str, TensorEntry], fed: dict[str, Fed]) -> list[LayerSource]:
    """Find every expert's bytes in a GGUF file.

    Args:
        model: the empty model, experts still on it; its dtype is the dtype of biases.
        tensors: the file's tensors by name.
        fed: what feeds each parameter.

    Raises:
        CheckpointError: nothing feeds a parameter, or tensors of another shape than the model's do.
    """
    found = []
    for (path, module), layout in zip(experts_modules(model), map_layouts(model), strict=True):
        parts = {spec.name: _parts(path, spec, tensors, fed, layout.num_experts) for spec in layout.record.tensors}
        is_plain = not module.is_transposed and all(
            len({*part.types, spec.dtype}) == 1
            for spec, part in zip(layout.record.tensors, parts.values(), strict=True)
            if len(spec.shape) == 2
        )
        matrices = []
        for spec in layout.record.tensors if not is_plain else ():
            if len(spec.shape) == 2:
                rows, columns = spec.shape[::-1] if module.is_transposed else spec.shape
                matrices.append(MatrixSpec(spec.name, parts[spec.name].format, (rows, columns)))
        record = quantized_record(layout.record, matrices) if matrices else layout.record
        shapes: dict[str, tuple[int, ...]] = {spec.name: spec.shape for spec in record.tensors}
        shapes |= {matrix.name: matrix.shape for matrix in matrices}
        copies: list[tuple[PieceTable, int]] = []
        conversions: list[Conversion] = []
        for spec in record.tensors:
            part = parts[spec.name]
            part.check(f"{path}.{spec.name}", shapes[spec.name])
            part.place(spec, copies, conversions)
        found.append(LayerSource(layout._replace(record=record), tuple(copies), tuple(conversions)))
    return found


class _Parts:
    """The tensors that feed one parameter of every expert of a layer.

    Args:
        tables: of the tensors, one after another; `shape` is one expert's, in values.
        interleaves: whether rows of two tensors take turns.
    """

    def __init__(self, tables: list[PieceTable], interleaves: bool) -> None:
        self.tables = tables
        self.interleaves = interleaves
        self.types = {name for table in tables for name in (table.dtypes or (table.dtype,))}

    @property
    def format(self) -> str:
        """The weight format of the matrix that they make."""
        return BLOCK_TYPES[next(iter(self.types))].format if len(self.types) == 1 else _MIXED

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse tensors that do not make a parameter of that shape, [rows, ..] an expert."""
        rows = sum(table.shape[0] for table in self.tables)
        if (rows, *shape[1:]) != shape or any(table.shape[1:] != shape[1:] for table in self.tables):
            raise CheckpointError(
                f"{name} is {list(shape)} an expert (out, in features), the file has "
                f"{' and '.join(str(list(table.shape)) for table in self.tables)}. Its metadata, or the config.json "
                "beside it, is of another model."
            )

    def place(self, spec: TensorSpec, copies: list[tuple[PieceTable, int]], conversions: list[Conversion]) -> None:
        """Add the copies or the conversion that fill a tensor of the record."""
        as_it_is = len(self.types) == 1 and spec.num_bytes == sum(table.num_bytes for table in self.tables)
        is_same = as_it_is and (spec.dtype == "U8" or self.types == {spec.dtype})
        if is_same and not self.interleaves:
            offset = spec.offset
            for table in self.tables:
                copies.append((table, offset))
                offset += table.num_bytes
        else:
            conversions.append(Conversion(tuple(self.tables), self._converter(spec, is_same)))

    def _converter(self, spec: TensorSpec, is_same: bool) -> Convert:
        """Build the function that joins one expert's tensors: as bytes where they stay, else as values."""

        def convert(expert: int, pieces: list[np.ndarray], record: np.ndarray) -> None:
            out = torch.from_numpy(record[spec.offset : spec.offset + spec.num_bytes])
            rows = []
            for table, piece in zip(self.tables, pieces, strict=True):
                raw = torch.from_numpy(piece).view(table.shape[0], -1)
                rows.append(raw if is_same else values_of(raw, table.dtype_of(expert), spec.name))
            if not is_same:
                out = out.view(TORCH_DTYPES[spec.dtype])
            out = out.view(sum(len(part) for part in rows), -1)
            if self.interleaves:
                for number, part in enumerate(rows):
                    out[number :: len(rows)] = part
            else:
                torch.cat(rows, out=out) if rows[0].dtype == out.dtype else out.copy_(torch.cat(rows))

        return convert


def _parts(
    path: str, spec: TensorSpec, tensors: dict[str, TensorEntry], fed: dict[str, Fed], num_experts: int
) -> _Parts:
    name = f"{path}.{spec.name}"
    feeding = fed.get(name)
    if feeding is None:
        raise CheckpointError(
            f"no tensor of the file feeds {name}. The file is incomplete or of another model: download it again."
        )
    tables = []
    for number, tensor in enumerate(feeding.tensors):
        if feeding.is_per_expert:
            names = [feeding.of_expert(expert)[number] for expert in range(num_experts)]
            lacking = next((one for one in names if one not in tensors), None)
            if lacking is not None:
                raise CheckpointError(f"the file lacks {lacking}, of expert {names.index(lacking)} of {path}.")
            tables.append(_of_each(name, [tensors[one] for one in names]))
        else:
            tables.append(_of_stack(tensor, tensors[tensor], num_experts))
    return _Parts(tables, feeding.rule.interleaves)


def _of_stack(name: str, entry: TensorEntry, num_experts: int) -> PieceTable:
    if len(entry.shape) < 2 or entry.shape[0] != num_experts:
        raise CheckpointError(
            f"the model has {num_experts} experts a layer, the file's {name} has shape {list(entry.shape)}. Its "
            "metadata, or the config.json beside it, is of another model."
        )
    stride = entry.num_bytes // num_experts
    begins = array("Q", range(entry.begin, entry.begin + entry.num_bytes, stride))
    return PieceTable(entry.dtype, entry.shape[1:], stride, array("H", [entry.file]) * num_experts, begins)


def _of_each(name: str, entries: list[TensorEntry]) -> PieceTable:
    first = entries[0]
    odd = next((entry for entry in entries if entry.shape != first.shape), None)
    if odd is not None:
        raise CheckpointError(
            f"the experts of {name} differ in shape: {list(odd.shape)} and {list(first.shape)}. The file is damaged."
        )
    types = tuple(entry.dtype for entry in entries)
    files, begins = array("H", [entry.file for entry in entries]), array("Q", [entry.begin for entry in entries])
    sizes = array("Q", [entry.num_bytes for entry in entries])
    if len(set(types)) == 1:
        return PieceTable(first.dtype, first.shape, first.num_bytes, files, begins)
    return PieceTable(first.dtype, first.shape, max(sizes), files, begins, sizes, types)
