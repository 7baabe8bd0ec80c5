"""Layer sources that give records back as floats: lossless ones as the bfloat16 records they were made of, and those in
GGML's blocks as the values of their blocks.

For what wants an expert's parameters: quantising, calibrating, packing as they were. Knows records and the lossless
format. Knows nothing of models.
"""

import numpy as np
import torch

from moeflow.checkpoint.layer_source import Conversion, LayerSource
from moeflow.checkpoint.lossless_source import any_lossless, parts_of
from moeflow.core import LayerLayout, RecordLayout
from moeflow.dtypes import tensors_of
from moeflow.errors import CheckpointError, ExpertReadError
from moeflow.kernels.cpu import lossless
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format, is_lossless


def float_sources(sources: list[LayerSource]) -> list[LayerSource]:
    """Return sources without lossless records: decoded ones in their place, and all others as they are.

    Args:
        sources: [num_layers].
    """
    return [_decoded(source) if any_lossless([source]) else source for source in sources]


def value_sources(sources: list[LayerSource], transposed: list[bool]) -> list[LayerSource]:
    """Return sources whose records in GGML's blocks, or with matrices of other floats, hold values in float32.

    Args:
        sources: [num_layers]; those without such records stay as they are.
        transposed: [num_layers], whether the layer's module has its matrices as [in, out].
    """
    return [
        _valued(source, turned) if _has_values(source) else source
        for source, turned in zip(sources, transposed, strict=True)
    ]


def _has_values(source: LayerSource) -> bool:
    kinds = {find_format(matrix.format).kind for record in source.layout.records for matrix in record.matrices}
    return bool(kinds) and kinds <= {"ggml", "float"}


def _valued(source: LayerSource, transposed: bool) -> LayerSource:
    """Return a source that makes float32 values of each record of another."""
    stored = source.layout
    shapes = {matrix.name: matrix.shape for matrix in stored.record.matrices}
    record = RecordLayout.pack(
        [
            (spec.name, "F32", shapes[spec.name][::-1] if transposed else shapes[spec.name])
            if spec.name in shapes
            else (spec.name, spec.dtype, spec.shape)
            for spec in stored.record.tensors
        ]
    )
    layout = LayerLayout(stored.name, stored.num_experts, record)

    def convert(expert: int, pieces: list[np.ndarray], out: np.ndarray) -> None:
        raw = torch.from_numpy(source.checked_record(expert, pieces))
        found = tensors_of(raw, stored.record_of(expert))
        for matrix in stored.record_of(expert).matrices:
            values = dequantize(found, matrix.name, find_format(matrix.format), matrix.shape)
            found[matrix.name] = values.T if transposed else values
        for name, tensor in tensors_of(torch.from_numpy(out), record).items():
            tensor.copy_(found[name])

    return LayerSource(layout, (), (Conversion(tuple(source.pieces()), convert),))


def parameters_of(raw: torch.Tensor, record: RecordLayout) -> dict[str, torch.Tensor]:
    """Return an expert's parameters by name: views of its bytes, and lossless matrices in memory of their own.

    Args:
        raw: uint8 [>= record.num_bytes].
        record: how they lie in it, as floats or without loss.

    Raises:
        CheckpointError: a lossless matrix is damaged.
    """
    found = tensors_of(raw, record)
    for matrix in record.matrices:
        value = torch.empty(matrix.shape, dtype=torch.bfloat16)
        lossless.decode(*parts_of(found, matrix), matrix.shape, value)
        found[matrix.name] = value
    return {name: found[name] for name, _, _ in _parameters(record)}


def _parameters(record: RecordLayout) -> list[tuple[str, str, tuple[int, ...]]]:
    """List the parameters of a record: (name, dtype, shape)."""
    shapes = {matrix.name: matrix.shape for matrix in record.matrices}
    parts = {f"{name}{part}" for name in shapes for part in ("_top", "_escapes")}
    return [
        (spec.name, "BF16", shapes[spec.name]) if spec.name in shapes else (spec.name, spec.dtype, spec.shape)
        for spec in record.tensors
        if spec.name not in parts
    ]


def _decoded(source: LayerSource) -> LayerSource:
    """Return a source that decodes each lossless record of another."""
    stored = source.layout
    record = next(filter(is_lossless, stored.records))
    layout = LayerLayout(stored.name, stored.num_experts, RecordLayout.pack(_parameters(record)))

    def convert(expert: int, pieces: list[np.ndarray], out: np.ndarray) -> None:
        raw = torch.from_numpy(source.checked_record(expert, pieces))
        try:
            found = parameters_of(raw, stored.record_of(expert))
        except CheckpointError as error:
            raise ExpertReadError(f"expert {expert} of {stored.name}: {error}") from error
        for name, tensor in tensors_of(torch.from_numpy(out), layout.record).items():
            tensor.copy_(found[name])

    return LayerSource(layout, (), (Conversion(tuple(source.pieces()), convert),))
