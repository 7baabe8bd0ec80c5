"""Refuses a program that could read or write outside of its tensors.

The compiled library trusts what a program says. One that comes from a file is looked at here first.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils import _pytree as pytree

from moeflow.dtypes import TORCH_DTYPES
from moeflow.hf.passes.own_modules import OwnCall
from moeflow.kernels.cpu.step import MAX_DIMS
from moeflow.kernels.cpu.structs import block_number
from moeflow.kernels.quantization.formats import MOST_LOSSLESS_VALUES, find_format, lossless_format
from moeflow.step.program import DTYPES, POINTWISE, REDUCTIONS, STORED, Instruction, Operand, Program

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WRITTEN = ("constant", "made", "kept", "state")  # kinds of buffers that instructions write
_STATES = ("conv_states", "recurrent_states")
_MOST_ROWS = 1024
_MOST_FEATURES = 2048  # of a head's values: attention sums them on the stack
_MOST_BYTES = 1 << 33  # of all that a step makes
_ALONE = {
    "copy", "neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log", "sin", "cos", "tanh", "sigmoid", "silu", "gelu",
    "gelu_tanh", "relu", "softplus", "not",
}  # fmt: skip


class UnsoundProgramError(ValueError):
    """A program that must not run. It never leaves this room."""


def check_sound(program: Program, weights: Mapping[str, torch.Tensor], num_moe_layers: int) -> None:
    """Refuse a program that lowering does not write.

    Args:
        program: to look at.
        weights: the model's parameters and buffers, by name.
        num_moe_layers: of the model.

    Raises:
        UnsoundProgramError: it could read or write outside of its tensors.
    """
    _want(0 < program.num_rows <= _MOST_ROWS, "too many rows")
    _want(sum(one.num_bytes for one in program.buffers) <= _MOST_BYTES + _bytes_of(weights), "too much memory")
    for buffer in program.buffers:
        _want(buffer.kind in ("input", "weight", "literal", *_WRITTEN) and buffer.num_bytes >= 0, "an odd buffer")
        if buffer.kind in ("weight", "literal"):
            held = (weights if buffer.kind == "weight" else program.literals).get(buffer.name)
            _want(held is not None and held.device.type == "cpu" and _extent(held) == buffer.num_bytes, buffer.name)
        elif buffer.kind == "input":
            _want(buffer.num_bytes % 8 == 0, buffer.name)
    inputs = {one.name: one.num_bytes for one in program.buffers if one.kind == "input"}
    _want(inputs.get("input_ids") == 8 * program.num_rows and "position_ids" in inputs, "other inputs")
    _want(all(one.kind == "torch" for one in program.setup), "a setup that is not torch's")
    for instruction in (*program.setup, *program.body):
        _check_instruction(program, instruction, weights, num_moe_layers)
    attending = [one.attributes["layer"] for one in program.body if one.kind in ("attend", "attend_latent")]
    _want(len(set(attending)) == len(attending), "two attentions of a layer")
    _check_states(program, weights)
    for residual in program.residuals.values():
        _check_operand(program, residual.stream, weights)
    _check_operand(program, program.logits, weights)
    _want(program.logits.sizes[:-1] == (program.num_rows, 1) and program.logits.is_contiguous, "other logits")


def _check_states(program: Program, weights: Mapping[str, torch.Tensor]) -> None:
    """Each state is one whole buffer, which a cache's tensor of its size takes the place of."""
    numbers = [number for number, one in enumerate(program.buffers) if one.kind == "state"]
    _want(sorted(state.buffer for state in program.states) == numbers, "a state without a buffer")
    _want([name.kind in _STATES for name in program.state_names] == [True] * len(numbers), "an unknown state")
    dtypes = {state.buffer: state.dtype for state in program.states}
    for state in program.states:
        _check_operand(program, state, weights)
        whole = math.prod(state.sizes) * state.dtype.itemsize == program.buffers[state.buffer].num_bytes
        _want(whole and state.is_contiguous and not state.offset, "a part of a state")
    for one in program.body:
        for operand in (*one.outputs, *one.inputs):
            _want(dtypes.get(operand.buffer, operand.dtype) == operand.dtype, "a state of another dtype")


def _want(is_so: bool, what: str) -> None:
    if not is_so:
        raise UnsoundProgramError(what)


def _bytes_of(weights: Mapping[str, torch.Tensor]) -> int:
    return sum(_extent(one) for one in weights.values())


def _extent(held: torch.Tensor) -> int:
    """Return the bytes from a tensor's first value to its last."""
    if not held.numel():
        return 0
    return (1 + sum((s - 1) * n for s, n in zip(held.shape, held.stride(), strict=True))) * held.element_size()


def _check_operand(program: Program, operand: Operand, weights: Mapping[str, torch.Tensor]) -> None:
    _want(0 <= operand.buffer < len(program.buffers), "no such buffer")
    buffer = program.buffers[operand.buffer]
    sizes, strides = operand.sizes, operand.strides
    _want(len(sizes) == len(strides) and min((operand.offset, *sizes, *strides)) >= 0, "an odd tensor")
    last = operand.offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    _want(
        not math.prod(sizes) or (last + 1) * operand.dtype.itemsize <= buffer.num_bytes, "a tensor outside its buffer"
    )
    if buffer.kind in ("weight", "literal"):
        held = (weights if buffer.kind == "weight" else program.literals)[buffer.name]
        _want(held.dtype == operand.dtype, f"{buffer.name} is {held.dtype}")
    elif buffer.kind == "input":
        _want(operand.dtype == torch.int64, f"{buffer.name} is int64")


def _check_instruction(
    program: Program, one: Instruction, weights: Mapping[str, torch.Tensor], num_moe_layers: int
) -> None:
    for operand in (*one.outputs, *one.inputs):
        _check_operand(program, operand, weights)
    _want(len(one.outputs) > 0, "an instruction without a result")
    _want(all(program.buffers[out.buffer].kind in _WRITTEN for out in one.outputs), "a weight that is written")
    if one.kind == "torch":
        return _check_torch(program, one, weights)
    if one.kind == "own":
        return _want(isinstance(one.attributes["call"], OwnCall), "a call of nothing")
    known = DTYPES + STORED if one.kind in ("linear", "rows") else DTYPES
    for operand in (*one.outputs, *one.inputs):
        _want(len(operand.sizes) <= MAX_DIMS and operand.dtype in known, "a tensor that the library does not know")
    if one.kind not in ("pointwise", "attend", "attend_latent"):
        whole = (*one.outputs, *one.inputs[: 1 if one.kind == "scatter" else None])
        _want(all(operand.is_contiguous and operand.sizes for operand in whole), "gaps")
    _want(one.kind in _RULES, f"no kind {one.kind}")
    _want(_RULES[one.kind](one), f"{one.kind} of tensors that do not fit")
    if one.kind in ("experts", "attend", "attend_latent"):
        shape = one.inputs[0].sizes
        _want(shape[0] == program.num_rows, f"{one.kind} of other rows")
        most = num_moe_layers if one.kind == "experts" else 1 << 20
        _want(0 <= one.attributes["layer"] < most, "no such layer")


def _check_torch(program: Program, one: Instruction, weights: Mapping[str, torch.Tensor]) -> None:
    """Run the operation on tensors without values: its results must be what the program says."""

    def of(value: object) -> object:
        if not isinstance(value, Operand):
            return value
        _check_operand(program, value, weights)
        return torch.empty_strided(value.sizes, value.strides, dtype=value.dtype, device="meta")

    args, kwargs = pytree.tree_map(of, (one.attributes["args"], one.attributes["kwargs"]))
    if "device" in kwargs:
        kwargs["device"] = "meta"
    made = one.attributes["call"](*args, **kwargs)
    results = list(made) if isinstance(made, (tuple, list)) else [made]
    said = [(out.sizes, out.dtype) for out in one.outputs]
    _want(
        [(tuple(result.shape), result.dtype) for result in results] == said, f"other results of {one.attributes['op']}"
    )


# ---- What each kind's tensors must be like; each returns whether they are ----


def _linear(one: Instruction) -> bool:
    (out,), (x, weight, *bias) = one.outputs, one.inputs
    if "formats" in one.attributes:
        return _block_linear(one)
    if weight.dtype in STORED:
        return _lossless_linear(one)
    rows, features = weight.sizes
    return (
        x.sizes[-1] == features
        and out.sizes == (*x.sizes[:-1], rows)
        and x.dtype == weight.dtype == out.dtype
        and x.dtype in _FLOATS
        and len(bias) <= 1
        and all(one.sizes == (rows,) and one.dtype in _FLOATS for one in bias)
    )


def _is_lossless(parts: Sequence[Operand], rows: int, features: int) -> bool:
    """Whether codes, tops and escapes are those of a matrix."""
    wanted = lossless_format(parts[2].sizes[0] // 5).tensors("", (rows, features))
    return (
        [(part.sizes, part.dtype) for part in parts] == [(sizes, TORCH_DTYPES[dtype]) for _, dtype, sizes in wanted]
        and min(rows, features) > 0
        and rows * features <= MOST_LOSSLESS_VALUES
    )


def _lossless_linear(one: Instruction) -> bool:
    (out,), (x, codes, tops, escapes, *bias) = one.outputs, one.inputs
    (rows,), features = tops.sizes, x.sizes[-1]
    return (
        _is_lossless((codes, tops, escapes), rows, features)
        and out.sizes == (*x.sizes[:-1], rows)
        and x.dtype == out.dtype == torch.bfloat16
        and len(bias) <= 1
        and all(one.sizes == (rows,) and one.dtype in _FLOATS for one in bias)
    )


def _is_blocks(one: Instruction, table: Operand, features: int) -> bool:
    """Whether a tensor is a matrix in the blocks that an instruction names."""
    (form,) = one.attributes["formats"]
    if block_number(form) is None or table.dtype != torch.uint8 or min(*table.sizes, features) < 1:
        return False
    spec, (rows, _) = find_format(form), table.sizes
    return features % spec.group_size == 0 and spec.tensors("", (rows, features))[0][2] == table.sizes


def _block_linear(one: Instruction) -> bool:
    (out,), (x, blocks, *bias) = one.outputs, one.inputs
    rows, features = blocks.sizes[0], x.sizes[-1]
    return (
        _is_blocks(one, blocks, features)
        and out.sizes == (*x.sizes[:-1], rows)
        and x.dtype == out.dtype
        and x.dtype in _FLOATS
        and len(bias) <= 1
        and all(one.sizes == (rows,) and one.dtype in _FLOATS for one in bias)
    )


def _rms_norm(one: Instruction) -> bool:
    (out,), (x, weight) = one.outputs, one.inputs
    return (
        out.sizes == x.sizes and weight.sizes == x.sizes[-1:] and {out.dtype, weight.dtype} == {x.dtype} <= {*_FLOATS}
    )


def _experts(one: Instruction) -> bool:
    (out,), (x, index, weights) = one.outputs, one.inputs
    return (
        len(x.sizes) == len(index.sizes) == 2
        and out.sizes == x.sizes
        and out.dtype == x.dtype
        and index.dtype == torch.int64
        and index.sizes == weights.sizes
        and index.sizes[0] == x.sizes[0]
        and {x.dtype, weights.dtype} <= {*_FLOATS}
    )


def _attend(one: Instruction) -> bool:
    (out,), (query, key, value, *sinks) = one.outputs, one.inputs
    rows, heads, _, features = query.sizes
    groups = key.sizes[1]
    return (
        query.sizes[2] == 1
        and groups > 0
        and heads % groups == 0
        and key.sizes == (rows, groups, 1, features)
        and value.sizes[:3] == key.sizes[:3]
        and value.sizes[3] <= _MOST_FEATURES
        and out.sizes == (rows, 1, heads, value.sizes[3])
        and out.is_contiguous
        and len(sinks) <= 1
        and all(one.sizes == (heads,) for one in sinks)
        and key.dtype == value.dtype
        and {operand.dtype for operand in (out, *one.inputs)} <= {*_FLOATS}
        and min(one.attributes["window"], one.attributes["chunk"]) >= 0
    )


def _attend_latent(one: Instruction) -> bool:
    (out,), (query, latent, turned, weight) = one.outputs, one.inputs
    rows, heads, _, features = query.sizes
    plain = features - turned.sizes[3]
    return (
        query.sizes[2] == 1
        and plain > 0
        and latent.sizes[:3] == turned.sizes[:3] == (rows, 1, 1)
        and out.sizes[:3] == (rows, 1, heads)
        and out.is_contiguous
        and weight.sizes == (heads * (plain + out.sizes[3]), latent.sizes[3])
        and weight.is_contiguous
        and latent.dtype == turned.dtype
        and {operand.dtype for operand in (out, *one.inputs)} <= {*_FLOATS}
        and min(one.attributes["window"], one.attributes["chunk"]) >= 0
    )


def _pointwise(one: Instruction) -> bool:
    (out,), op, about = one.outputs, one.attributes["op"], one.attributes
    wanted = 1 if op in _ALONE else 3 if op == "where" else 2 - ("side" in about)
    return op in POINTWISE and len(one.inputs) == wanted and all(tensor.sizes == out.sizes for tensor in one.inputs)


def _softmax(one: Instruction) -> bool:
    (out,), (x,) = one.outputs, one.inputs
    return out.sizes == x.sizes and {out.dtype, x.dtype} <= {*_FLOATS}


def _top_k(one: Instruction) -> bool:
    (values, index), (x,) = one.outputs, one.inputs
    return (
        values.sizes == index.sizes
        and values.sizes[:-1] == x.sizes[:-1]
        and values.sizes[-1] <= x.sizes[-1]
        and index.dtype == torch.int64
        and {values.dtype, x.dtype} <= {*_FLOATS}
    )


def _reduce(one: Instruction) -> bool:
    (out,), (x,) = one.outputs, one.inputs
    return (
        one.attributes["op"] in REDUCTIONS
        and x.sizes[-1] > 0
        and math.prod(out.sizes) == math.prod(x.sizes[:-1])
        and {out.dtype, x.dtype} <= {*_FLOATS}
    )


def _gather(one: Instruction) -> bool:
    (out,), (x, index) = one.outputs, one.inputs
    same = out.sizes == index.sizes and index.sizes[:-1] == x.sizes[:-1]
    return same and out.dtype == x.dtype and index.dtype == torch.int64


def _scatter(one: Instruction) -> bool:
    (out,), (index, values) = one.outputs, one.inputs
    each = values.is_contiguous and values.sizes == index.sizes
    same = index.sizes[:-1] == out.sizes[:-1] and (each or not any(values.strides))
    return same and bool(values.sizes) and out.dtype == values.dtype and index.dtype == torch.int64


def _rows(one: Instruction) -> bool:
    (out,), (ids, table, *parts) = one.outputs, one.inputs
    if len(table.sizes) != 2 or ids.dtype != torch.int64:
        return False
    if "formats" in one.attributes:
        is_sound = not parts and _is_blocks(one, table, out.sizes[-1])
        return is_sound and out.sizes[:-1] == ids.sizes and out.dtype in _FLOATS
    if parts:
        is_sound = len(parts) == 2 and _is_lossless((table, *parts), table.sizes[0], out.sizes[-1])
        return is_sound and out.sizes[:-1] == ids.sizes and out.dtype == torch.bfloat16
    return out.sizes == (*ids.sizes, table.sizes[1]) and out.dtype == table.dtype and table.dtype in DTYPES


_RULES: dict[str, Callable[[Instruction], bool]] = {
    "linear": _linear, "rms_norm": _rms_norm, "experts": _experts, "attend": _attend,
    "attend_latent": _attend_latent, "pointwise": _pointwise, "softmax": _softmax, "top_k": _top_k, "reduce": _reduce,
    "gather": _gather, "scatter": _scatter, "rows": _rows,
}  # fmt: skip
