"""Where each expert of a checkpoint lies: transformers' conversion rules, applied to one expert at a time.

transformers tells which tensors feed which parameter and by which operations; here that becomes byte ranges, and for
the few layouts that are not stored as the module wants them, a conversion of one expert alone.
"""

import copy
from array import array
from collections.abc import Callable

import torch

from moeflow import hf
from moeflow.checkpoint import TensorEntry
from moeflow.core import LayerLayout, RecordLayout
from moeflow.dtypes import DTYPE_NAMES, FLOAT_DTYPES, TORCH_DTYPES
from moeflow.errors import CheckpointError, UnsupportedModelError
from moeflow.layers import Conversion, LayerSource, PieceTable


def map_experts(model, tensors: dict[str, TensorEntry]) -> list[LayerSource]:
    """Find every expert's bytes in a checkpoint, by transformers' own conversion mapping.

    Args:
        model: the empty model, experts still on it; their dtype is the dtype the records get.
        tensors: the checkpoint's tensors by their names in the checkpoint.

    Raises:
        CheckpointError: an expert's tensor is missing or has another shape than the model's.
        UnsupportedModelError: the checkpoint needs a conversion that mixes experts.
    """
    collected = hf.collect_expert_tensors(model, tensors)
    return [_layer_source(path, module, collected) for path, module in hf.experts_modules(model)]


def map_layouts(model) -> list[LayerLayout]:
    """Return how each layer's experts lie in a slot, from the empty model alone."""
    return [_layout(path, module) for path, module in hf.experts_modules(model)]


def _layout(path, module) -> LayerLayout:
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    num_experts = next(iter(parameters.values())).shape[0]
    for name, value in parameters.items():
        if value.shape[0] != num_experts or not value.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"{path}.{name} is {value.dtype} {list(value.shape)}: moeflow needs float experts "
                "stacked along the first "
                f"dimension, here {num_experts}."
            )
    return LayerLayout(
        path,
        num_experts,
        RecordLayout.pack([(n, DTYPE_NAMES[p.dtype], tuple(p.shape[1:])) for n, p in parameters.items()]),
    )


def expert_tensor_names(model, tensors: dict[str, TensorEntry]) -> set[str]:
    """Return the names of the checkpoint tensors that feed routed experts."""
    collected = hf.collect_expert_tensors(model, tensors).values()
    return {key for _, groups, _ in collected for members in groups.values() for key, _ in members}


def _layer_source(path, module, collected) -> LayerSource:
    layout = _layout(path, module)
    copies, conversions = [], []
    for spec in layout.record.tensors:
        full_name = f"{path}.{spec.name}"
        if full_name not in collected:
            raise CheckpointError(
                f"no tensor of the checkpoint feeds {full_name}. The checkpoint is incomplete or of another model: "
                "compare its config.json with its weights, or download it again."
            )
        converter, groups, place = collected[full_name]
        operations = list(converter.operations) if converter is not None else []
        tables = _piece_tables(full_name, groups, layout.num_experts, place, converter)
        steps = _per_expert_steps(full_name, operations, tables, spec.shape)
        if not steps and all(table.dtype == spec.dtype for table in tables):
            offset = spec.offset
            for table in tables:
                copies.append((table, offset))
                offset += table.num_bytes
            written = offset - spec.offset
        else:
            conversions.append(Conversion(tuple(tables), _converter(converter, steps, tables, list(groups), spec)))
            written = sum(table.num_bytes * TORCH_DTYPES[spec.dtype].itemsize // TORCH_DTYPES[table.dtype].itemsize
                          for table in tables)  # fmt: skip
        if written != spec.num_bytes:
            raise CheckpointError(
                f"{full_name} needs {spec.num_bytes} bytes an expert, the checkpoint has {written} "
                f"({', '.join(f'{t.dtype} {list(t.shape)}' for t in tables)}). Its config.json is of another model."
            )
    return LayerSource(layout, tuple(copies), tuple(conversions))


def _piece_tables(name, groups, num_experts, place, converter) -> list[PieceTable]:
    """One table per source pattern, in the converter's order; stacked tensors are sliced along the expert."""
    order = [pattern for pattern in converter.source_patterns if pattern in groups] if converter else list(groups)
    splits_list = converter is not None and len(converter.target_patterns) > 1
    tables = []
    for pattern in order:
        members = groups[pattern]
        per_expert = "*" in pattern
        if splits_list and per_expert:  # one list of experts feeds several modules, in equal parts
            size = -(-len(members) // len(converter.target_patterns))
            members = members[place * size : (place + 1) * size]
        entries = [entry for _, entry in members]
        first = entries[0]
        if first.dtype not in FLOAT_DTYPES:
            raise UnsupportedModelError(
                f"{members[0][0]} is stored as {first.dtype}, which this version does not read yet. "
                "Use the model's float32, bfloat16 or float16 checkpoint."
            )
        if per_expert:
            if len(entries) != num_experts:
                raise CheckpointError(
                    f"{name} has {num_experts} experts, the checkpoint holds {len(entries)} tensors "
                    f"{pattern!r} for it. "
                    "Download the checkpoint again."
                )
            odd = [key for key, entry in members if entry.shape != first.shape or entry.dtype != first.dtype]
            if odd:
                raise CheckpointError(f"{odd[0]} differs in shape or dtype from the other experts of {name}.")
            files, begins = array("H", [e.file for e in entries]), array("Q", [e.begin for e in entries])
            tables.append(PieceTable(first.dtype, first.shape, first.num_bytes, files, begins))
        else:
            if len(entries) != 1 or not first.shape or first.shape[0] != num_experts:
                raise CheckpointError(
                    f"{name} has {num_experts} experts, the checkpoint's {members[0][0]} has shape "
                    f"{list(first.shape)}. Its config.json is of another model."
                )
            stride = first.num_bytes // num_experts
            begins = array("Q", range(first.begin, first.begin + first.num_bytes, stride))
            files = array("H", [first.file]) * num_experts
            tables.append(PieceTable(first.dtype, first.shape[1:], stride, files, begins))
    return tables


def _per_expert_steps(name, operations, tables, shape) -> list:
    """Return the operations one expert's bytes still need, none if they only have to follow one another."""
    steps, moves_only = [], True
    for operation in operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist" and operation.dim == 0:
            continue  # an expert is already one element of the list
        if kind == "ErnieFuseAndSplitTextVisionExperts" and (operation.stack_dim, operation.concat_dim) == (0, 1):
            continue  # the list was split in _piece_tables; what remains is a concatenation
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
                f"{name} is stored in a form that needs {kind}, which cannot be done for one expert "
                "alone. Write the model "
                "anew with from_pretrained(...).save_pretrained(...) on a large machine, or report "
                "the model to moeflow."
            )
        steps.append(operation)
        moves_only = False
    return [] if moves_only else steps


def _converter(converter, steps, tables, patterns, spec) -> Callable:
    """Build the function that turns one expert's raw pieces into its tensor inside the record."""
    target_dtype = TORCH_DTYPES[spec.dtype]
    shapes = [(TORCH_DTYPES[table.dtype], table.shape) for table in tables]
    target = converter.target_patterns[:1] if converter else ["tensor"]
    concatenates = len(tables) > 1 and not any(type(step).__name__ == "Concatenate" for step in steps)

    def convert(expert, pieces, record):
        tensors = [
            torch.from_numpy(piece).view(dtype).view(1, *shape)
            for piece, (dtype, shape) in zip(pieces, shapes, strict=True)
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
