"""Layer sources of a checkpoint: transformers' conversion rules, applied to one expert at a time.

transformers tells which tensors feed which parameter and by which operations; this file turns that into byte ranges,
and, for the few layouts that are not stored as the module wants them, into a conversion of one expert alone.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from moeflow.checkpoint.headers import TensorEntry
from moeflow.checkpoint.layer_source import Conversion, Convert, LayerSource, PieceTable
from moeflow.checkpoint.pieces import Feeding, piece_tables
from moeflow.checkpoint.prequantized.records import place_matrix, quantized_record
from moeflow.checkpoint.prequantized.scheme import QuantizationScheme, StoredMatrix, find_matrices, stand_ins
from moeflow.core import LayerLayout, MatrixSpec, RecordLayout, TensorSpec
from moeflow.dtypes import DTYPE_NAMES, FLOAT_DTYPES, TORCH_DTYPES
from moeflow.errors import CheckpointError, UnsupportedModelError
from moeflow.hf import experts_interface, quantizer
from moeflow.hf.experts_interface import ExpertsModule


def map_experts(model: PreTrainedModel, tensors: dict[str, TensorEntry]) -> list[LayerSource]:
    """Find every expert's bytes in a checkpoint, by transformers' own conversion mapping.

    Experts that the checkpoint holds quantised get records in a weight format.

    Args:
        model: the empty model, experts still on it; their dtype is the dtype that unquantised records get.
        tensors: the checkpoint's tensors by their names in the checkpoint.

    Raises:
        CheckpointError: an expert's tensor is missing or has another shape than the model's.
        UnsupportedModelError: the checkpoint needs a conversion that mixes experts.
    """
    scheme, stored = _quantised(model, tensors)
    collected = experts_interface.collect_expert_tensors(model, stand_ins(tensors, stored))
    return [
        _layer_source(path, module, collected, stored, scheme)
        for path, module in experts_interface.experts_modules(model)
    ]


def map_layouts(model: PreTrainedModel) -> list[LayerLayout]:
    """Return each layer's layout of unquantised experts, from the empty model alone."""
    return [_layout(path, module) for path, module in experts_interface.experts_modules(model)]


def _layout(path: str, module: ExpertsModule) -> LayerLayout:
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    num_experts = next(iter(parameters.values())).shape[0]
    for name, value in parameters.items():
        if value.shape[0] != num_experts or not value.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"{path}.{name} is {value.dtype} {list(value.shape)}: moeflow needs float experts stacked along the "
                f"first dimension, here {num_experts}."
            )
    return LayerLayout(
        path,
        num_experts,
        RecordLayout.pack([(n, DTYPE_NAMES[p.dtype], tuple(p.shape[1:])) for n, p in parameters.items()]),
    )


def expert_tensor_names(model: PreTrainedModel, tensors: dict[str, TensorEntry]) -> set[str]:
    """Return the names of the checkpoint tensors that feed routed experts."""
    _, stored = _quantised(model, tensors)
    collected = experts_interface.collect_expert_tensors(model, stand_ins(tensors, stored)).values()
    keys = {key for _, groups, _ in collected for members in groups.values() for key, _ in members}
    pieces = {name for key in keys & stored.keys() for name, _ in stored[key].pieces.values()}
    return pieces | (keys - stored.keys())


def _quantised(
    model: PreTrainedModel, tensors: dict[str, TensorEntry]
) -> tuple[QuantizationScheme | None, dict[str, StoredMatrix]]:
    scheme = quantizer.quantization_scheme(model.config)
    return scheme, find_matrices(tensors, scheme) if scheme is not None else {}


def _layer_source(
    path: str,
    module: ExpertsModule,
    collected: dict[str, Feeding],
    stored: dict[str, StoredMatrix],
    scheme: QuantizationScheme | None,
) -> LayerSource:
    layout = _layout(path, module)
    floats = layout.record
    missing = [spec.name for spec in floats.tensors if f"{path}.{spec.name}" not in collected]
    if missing:
        raise CheckpointError(
            f"no tensor of the checkpoint feeds {path}.{missing[0]}. The checkpoint is incomplete or of another model: "
            "compare its config.json with its weights, or download it again."
        )
    matrices = {} if scheme is None else _quantised_matrices(path, module, floats, collected, stored, scheme)
    layout = layout._replace(record=quantized_record(floats, list(matrices.values())) if matrices else floats)
    places = {spec.name: spec for spec in layout.record.tensors}
    copies: list[tuple[PieceTable, int]] = []
    conversions: list[Conversion] = []
    for spec in floats.tensors:
        full_name = f"{path}.{spec.name}"
        if scheme is not None and spec.name in matrices:
            found = place_matrix(
                full_name, matrices[spec.name], layout.record, collected[full_name], stored, scheme, layout.num_experts
            )
        else:
            found = _place_floats(full_name, places[spec.name], collected[full_name], layout.num_experts)
        copies += found[0]
        conversions += found[1]
    return LayerSource(layout, tuple(copies), tuple(conversions))


def _quantised_matrices(
    path: str,
    module: ExpertsModule,
    floats: RecordLayout,
    collected: dict[str, Feeding],
    stored: dict[str, StoredMatrix],
    scheme: QuantizationScheme,
) -> dict[str, MatrixSpec]:
    """Return the parameters that the checkpoint holds quantised: all matrices of a layer, or none."""
    found = {}
    for spec in floats.tensors:
        _, groups, _ = collected[f"{path}.{spec.name}"]
        keys = {key for members in groups.values() for key, _ in members}
        if keys & stored.keys():
            if keys - stored.keys():
                raise UnsupportedModelError(
                    f"{path}.{spec.name} is quantised in part: {min(keys - stored.keys())} is not. Use the model's "
                    "float32, bfloat16 or float16 checkpoint."
                )
            rows, columns = spec.shape[::-1] if module.is_transposed else spec.shape
            found[spec.name] = MatrixSpec(spec.name, scheme.format, (rows, columns))
    unquantised = [spec.name for spec in floats.tensors if len(spec.shape) == 2 and spec.name not in found]
    if found and unquantised:
        raise UnsupportedModelError(
            f"{path} is quantised in part: {unquantised[0]} is not. Use the model's float32, bfloat16 or float16 "
            "checkpoint."
        )
    return found


def _place_floats(
    full_name: str, spec: TensorSpec, feeding: Feeding, num_experts: int
) -> tuple[list[tuple[PieceTable, int]], list[Conversion]]:
    """Return the copies and conversions that fill one float tensor of every expert."""
    converter, groups, _ = feeding
    for key, entry in (member for members in groups.values() for member in members):
        if entry.dtype not in FLOAT_DTYPES:
            raise UnsupportedModelError(
                f"{key} is stored as {entry.dtype}, which this version does not read yet. "
                "Use the model's float32, bfloat16 or float16 checkpoint."
            )
    copies: list[tuple[PieceTable, int]] = []
    conversions: list[Conversion] = []
    operations = list(converter.operations) if converter is not None else []
    tables = piece_tables(full_name, feeding, num_experts)
    steps = _per_expert_steps(full_name, operations, tables, spec.shape)
    if not steps and all(table.dtypes is None and table.dtype == spec.dtype for table in tables):
        offset = spec.offset
        for table in tables:
            copies.append((table, offset))
            offset += table.num_bytes
        written = offset - spec.offset
    else:
        conversions.append(Conversion(tuple(tables), _converter(converter, steps, tables, list(groups), spec)))
        written = sum(math.prod(table.shape) for table in tables) * TORCH_DTYPES[spec.dtype].itemsize
    if written != spec.num_bytes:
        raise CheckpointError(
            f"{full_name} needs {spec.num_bytes} bytes an expert, the checkpoint has {written} "
            f"({', '.join(f'{t.dtype} {list(t.shape)}' for t in tables)}). Its config.json is of another model."
        )
    return copies, conversions


def _per_expert_steps(name: str, operations: list[Any], tables: list[PieceTable], shape: tuple[int, ...]) -> list[Any]:
    """Return the operations that one expert's bytes need; none where they only follow one another."""
    steps, moves_only = [], True
    for operation in operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist" and operation.dim == 0:
            continue  # an expert is already one element of the list
        if kind == "ErnieFuseAndSplitTextVisionExperts" and (operation.stack_dim, operation.concat_dim) == (0, 1):
            continue  # the list was split in piece_tables; what remains is a concatenation
        if kind == "Concatenate" and operation.dim == 1:
            steps.append(operation)  # rows of one expert follow one another
            continue
        if kind == "Transpose" and getattr(operation, "check_dims", False):
            if tables[0].shape == shape:
                continue
            operation = copy.copy(operation)
            operation.check_dims = False
        dims = [getattr(operation, dim) for dim in ("dim", "dim0", "dim1") if hasattr(operation, dim)]
        if kind not in ("Transpose", "Interleave", "Concatenate") or not dims or min(dims) < 1:
            raise UnsupportedModelError(
                f"{name} is stored in a form that needs {kind}, which cannot be done for one expert alone. Write the "
                "model anew with from_pretrained(...).save_pretrained(...) on a large machine, or report the model to "
                "moeflow."
            )
        steps.append(operation)
        moves_only = False
    return [] if moves_only else steps


def _converter(
    converter: Any, steps: list[Any], tables: list[PieceTable], patterns: list[str], spec: TensorSpec
) -> Convert:
    """Build the function that turns one expert's raw pieces into its tensor inside the record."""
    target_dtype = TORCH_DTYPES[spec.dtype]
    target = converter.target_patterns[:1] if converter else ["tensor"]
    concatenates = len(tables) > 1 and not any(type(step).__name__ == "Concatenate" for step in steps)

    def convert(expert: int, pieces: list[np.ndarray], record: np.ndarray) -> None:
        tensors = [  # cast before the steps, as transformers does
            torch.from_numpy(piece).view(TORCH_DTYPES[table.dtype_of(expert)]).view(1, *table.shape).to(target_dtype)
            for piece, table in zip(pieces, tables, strict=True)
        ]
        if concatenates:
            tensors = [torch.cat(tensors, dim=1)]
        values = dict(zip(patterns if len(tensors) > 1 else target, tensors, strict=True))
        for step in steps:
            values = step.convert(values, source_patterns=list(values), target_patterns=target)
        (value,) = values.values()
        out = (
            torch.from_numpy(record[spec.offset : spec.offset + spec.num_bytes]).view(target_dtype).view(1, *spec.shape)
        )
        out.copy_(value)

    return convert
