"""Layer sources that quantise experts on their way from the checkpoint into a record.

`load_moe(quantization=...)` quantises at every read, `moeflow quantize` once.

Knows records and weight formats. Knows nothing of files.
"""

from typing import Protocol

import numpy as np
import torch

from moeflow.checkpoint.float_source import float_sources
from moeflow.checkpoint.layer_source import Conversion, LayerSource
from moeflow.core import LayerLayout, MatrixSpec, RecordLayout
from moeflow.dtypes import tensors_of
from moeflow.errors import ConfigError
from moeflow.kernels.quantization.formats import WRITABLE, WeightFormat, find_format
from moeflow.kernels.quantization.quantize import quantize


class Calibration(Protocol):
    """Inputs of experts on calibration text; `moeflow.calibration.expert_inputs.ExpertInputs` is one."""

    fingerprint: str

    def inputs(self, layer: int, expert: int, name: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the inputs [n, K] of a matrix of an expert, whose unquantised parameters are given."""


def writable_format(name: str) -> WeightFormat:
    """Return a format that experts can be quantised to.

    Raises:
        ConfigError: there is none of that name, or it is only read.
    """
    spec = find_format(name)
    if spec.name not in WRITABLE:
        raise ConfigError(
            f"experts cannot be quantised to {spec.name}: checkpoints that have it are read as they are. "
            f"Allowed: {', '.join(WRITABLE)}; int4, int3, int2 and int1 alone have groups of 64."
        )
    return spec


def quantize_sources(
    sources: list[LayerSource],
    formats: list[list[str]],
    transposed: list[bool],
    *,
    method: str = "rtn",
    calibration: Calibration | None = None,
) -> list[LayerSource]:
    """Return sources whose records hold the same experts in weight formats.

    Args:
        sources: [num_layers], of an unquantised checkpoint; lossless records are decoded.
        formats: [num_layers][num_experts], names of formats.
        transposed: [num_layers], whether the module stores its matrices [in, out].
        method: "rtn", "hqq" or "gptq".
        calibration: the inputs that GPTQ learns from.

    Raises:
        ConfigError: an unknown format, or experts that are quantised already.
    """
    return [
        _quantized(layer, source, names, turned, method, calibration)
        for layer, (source, names, turned) in enumerate(zip(float_sources(sources), formats, transposed, strict=True))
    ]


def _quantized(
    number: int,
    source: LayerSource,
    names: list[str],
    transposed: bool,
    method: str,
    calibration: Calibration | None,
) -> LayerSource:
    layout = source.layout
    if layout.record.matrices:
        raise ConfigError(
            f"{layout.name} is stored in {layout.record.matrices[0].format} already. Quantise the model's float "
            "checkpoint, or load this one without quantization."
        )
    records: dict[str, RecordLayout] = {}
    for name in names:
        records.setdefault(name, _record(layout.record, writable_format(name), transposed))
    variants = tuple(records.values())
    kinds = tuple(list(records).index(name) for name in names)
    largest = max(variants, key=lambda record: record.num_bytes)
    new = LayerLayout(layout.name, layout.num_experts, largest, *((variants, kinds) if len(variants) > 1 else ()))

    def convert(expert: int, pieces: list[np.ndarray], record: np.ndarray) -> None:
        raw = source.checked_record(expert, pieces)
        target = new.record_of(expert)
        out = tensors_of(torch.from_numpy(record), target)
        weights = tensors_of(torch.from_numpy(raw), layout.record)
        for name, value in weights.items():
            matrix = next((spec for spec in target.matrices if spec.name == name), None)
            if matrix is None:
                out[name].copy_(value)
                continue
            learnt = None if calibration is None else calibration.inputs(number, expert, name, weights)
            found = quantize(
                value.T if transposed else value,
                find_format(matrix.format),
                method=method,
                calibration=learnt,
                name=f"expert {expert} of {layout.name}: {name}",
            )
            for tensor, codes in zip(_names(matrix), found.values(), strict=True):
                out[tensor].copy_(codes)

    return LayerSource(new, (), (Conversion(tuple(source.pieces()), convert),))


def _record(record: RecordLayout, spec: WeightFormat, transposed: bool) -> RecordLayout:
    """Lay out an expert whose matrices are in a format; vectors (biases) stay as they are."""
    tensors, matrices = [], []
    for tensor in record.tensors:
        if len(tensor.shape) != 2:
            tensors.append((tensor.name, tensor.dtype, tensor.shape))
            continue
        shape = tensor.shape[::-1] if transposed else tensor.shape
        matrices.append(MatrixSpec(tensor.name, spec.name, shape))
        tensors += spec.tensors(tensor.name, shape)
    return RecordLayout.pack(tensors, tuple(matrices))


def _names(matrix: MatrixSpec) -> list[str]:
    return [name for name, _, _ in find_format(matrix.format).tensors(matrix.name, matrix.shape)]
