"""Descriptions of matrices and experts in memory for the compiled CPU kernels, as C structures.

The structures are those of `_cpu.h`. Knows records and formats. Knows nothing of the library: describing needs none.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64
from functools import lru_cache

import torch

from moeflow.core import RecordLayout
from moeflow.errors import ConfigError
from moeflow.kernels.activations import ACTIVATIONS, Activation
from moeflow.kernels.quantization.formats import (
    FORMAT_OF_DTYPE,
    MOST_LOSSLESS_VALUES,
    WeightFormat,
    find_format,
    holds_matrix,
    lossless_format,
)

# In the order of the enums in _cpu.h.
_FORMATS = (
    "float32", "bfloat16", "float16", "int8", "uint4", "uint3", "uint2", "sign1", "mxfp4", "fp8", "lossless",
    "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "ggml_mxfp4",
)  # fmt: skip
_KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
_GATES = ("none", "concatenated", "interleaved")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of activations, by number."""

_MOST_FEATURES = 2**31 - 1  # of a side of a matrix

_BIAS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Matrix(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("codes", "scale", "zero", "bias")] + [
        (name, c_int32)
        for name in (
            "format",
            "bias_format",
            "num_rows",
            "in_features",
            "group_size",
            "padded",
            "transposed",
            "num_escapes",
        )
    ]


class _Activation(ctypes.Structure):
    _fields_ = [("kind", c_int32), ("gate", c_int32)] + [
        (name, c_float) for name in ("alpha", "gate_limit", "activated_limit", "up_limit", "up_offset")
    ] + [("reserved", c_int32)]  # fmt: skip


class _Expert(ctypes.Structure):
    _fields_ = [("first", Matrix), ("down", Matrix), ("activation", _Activation)]


class ExpertKernel:
    """The kernel of one record layout. Immutable; `build` makes one.

    Args:
        expert: the C description.
        num_features: H.
        intermediate_features: I.
    """

    def __init__(self, expert: _Expert, num_features: int, intermediate_features: int) -> None:
        self._expert = expert
        self.pointer = ctypes.addressof(expert)
        self.num_features = num_features
        self.intermediate_features = intermediate_features

    @classmethod
    def build(cls, record: RecordLayout, activation: Activation, *, is_transposed: bool) -> "ExpertKernel | None":
        """Describe a record: "gate_up_proj" or "up_proj", "down_proj", and biases under their names with "_bias".

        Args:
            record: the layout.
            activation: the one between the matrices.
            is_transposed: whether float matrices that are plain tensors lie [in, out].

        Returns:
            The kernel; None where none reads such a record.
        """
        names = {spec.name for spec in record.tensors} | {matrix.name for matrix in record.matrices}
        first_name = "gate_up_proj" if "gate_up_proj" in names else "up_proj"
        first = _matrix(record, first_name, is_transposed)
        down = _matrix(record, "down_proj", is_transposed)
        halves = 1 if activation.gate == "none" else 2
        if first is None or down is None or first.num_rows != halves * down.in_features:
            return None
        if down.num_rows != first.in_features:
            return None
        terms = ACTIVATIONS[activation.kind]
        unlimited = float("inf")
        formula = _Activation(
            _KINDS.index(terms.act),
            _GATES.index(activation.gate),
            activation.alpha,
            activation.limit if terms.limits_gate else unlimited,
            activation.limit if terms.limits_activated else unlimited,
            activation.limit if terms.limits_up else unlimited,
            terms.up_offset,
        )
        return cls(_Expert(first, down, formula), first.in_features, down.in_features)


def described_matrix(
    spec: WeightFormat,
    shape: tuple[int, int],
    places: dict[str, int],
    name: str,
    bias_dtype: torch.dtype | None,
    is_transposed: bool = False,
) -> Matrix | None:
    """Describe a matrix; None where no kernel knows it, or a side is empty or too long.

    Args:
        spec: its format.
        shape: [out, in].
        places: tensor name -> its start: an address, or bytes from the start of a record.
        name: of the matrix.
        bias_dtype: None where it has no bias.
        is_transposed: whether it lies [in, out].
    """
    kind = {"int": "int8", "uint": f"uint{spec.bits}", "sign": "sign1", "lossless": "lossless"}.get(
        spec.kind, spec.name
    )
    if kind not in _FORMATS or (bias_dtype is not None and bias_dtype not in DTYPES):
        return None
    if not all(1 <= size <= _MOST_FEATURES for size in shape):
        return None
    num_rows, in_features = shape
    padded = spec.padded(in_features)
    if spec.kind == "lossless" and num_rows * in_features > MOST_LOSSLESS_VALUES:
        return None
    scale, zero, bias = (places.get(part, -1) for part in _parts_of(name, spec))
    if spec.kind == "lossless" and not spec.num_escapes:
        zero = -1  # no tensor of no bytes has a place
    bias_format = 0 if bias_dtype is None else DTYPES[bias_dtype]
    return Matrix(
        places[name], scale, zero, bias, _FORMATS.index(kind), bias_format, num_rows, in_features,
        spec.group_size or padded, padded, is_transposed, spec.num_escapes,
    )  # fmt: skip


@lru_cache(maxsize=8192)
def float_matrix(address: int, bias: int, format: int, bias_format: int, num_rows: int, in_features: int) -> Matrix:
    """Describe a matrix of floats. The whole description is the cache's key, so none is ever out of date."""
    if max(num_rows, in_features) > _MOST_FEATURES:
        raise ConfigError(f"a matrix of {num_rows} x {in_features} values. Allowed: {_MOST_FEATURES} on a side.")
    return Matrix(
        address, -1, -1, bias, format, bias_format, num_rows, in_features, in_features, in_features
    )  # fmt: skip


@lru_cache(maxsize=8192)
def lossless_matrix(places: tuple[int, int, int, int], bias_format: int, shape: tuple[int, int], room: int) -> Matrix:
    """Describe a lossless matrix [N, K].

    Args:
        places: addresses of codes, tops, escapes and bias (-1: none).
        bias_format: number of the bias's dtype.
        shape: [N, K].
        room: E, for how many escapes it has room.
    """
    padded = lossless_format(room).padded(shape[1])
    return Matrix(*places, _FORMATS.index("lossless"), bias_format, *shape, padded, padded, 0, room)


def block_number(format: str) -> int | None:
    """Return a block format's number in the library; None where no kernel knows it."""
    return _FORMATS.index(format) if format in _FORMATS and find_format(format).kind == "ggml" else None


@lru_cache(maxsize=8192)
def block_matrix(
    address: int, bias: int, format: str, bias_format: int, num_rows: int, in_features: int
) -> Matrix | None:
    """Describe a matrix [N, K] in a block format of GGML, K a multiple of its block; None where no kernel knows it."""
    number = block_number(format)
    if number is None or max(num_rows, in_features) > _MOST_FEATURES:
        return None
    block = find_format(format).group_size
    return Matrix(address, -1, -1, bias, number, bias_format, num_rows, in_features, block, in_features)


def _parts_of(name, spec) -> tuple[str, str, str]:
    """Return the names of a matrix's scale, zero and bias; of its tops and escapes where it is lossless."""
    first, second = ("top", "escapes") if spec.kind == "lossless" else ("scale", "zero")
    return f"{name}_{first}", f"{name}_{second}", f"{name}_bias"


def _matrix(record, name, is_transposed) -> Matrix | None:
    """Describe one matrix of a record; None where a part is missing or of another size, or no kernel knows it."""
    tensors = {spec.name: spec for spec in record.tensors}
    places = {part: tensor.offset for part, tensor in tensors.items()}
    bias = tensors.get(f"{name}_bias")
    bias_dtype = None if bias is None else _BIAS_DTYPES.get(bias.dtype, torch.float64)
    for matrix in record.matrices:
        if matrix.name == name:
            form = find_format(matrix.format)
            if not holds_matrix(record, name, form, matrix.shape):
                return None
            return described_matrix(form, matrix.shape, places, name, bias_dtype)
    spec = tensors.get(name)
    if spec is None or spec.dtype not in FORMAT_OF_DTYPE or len(spec.shape) != 2:
        return None
    shape = spec.shape[::-1] if is_transposed else spec.shape
    form = FORMAT_OF_DTYPE[spec.dtype]
    if not holds_matrix(record, name, form, shape):
        return None
    return described_matrix(form, shape, places, name, bias_dtype, is_transposed)
