"""The compiled CPU kernels: routed experts, linears and norms straight from memory, called by ctypes.

Every result has the same bits for any number of threads and for any way of sharing experts out over calls: an output is
one sum in float32 in an order that depends on format, in features, instruction set, and whether its expert has few or
many tokens. Knows tensors and records. Knows nothing of caches or models.
"""

import ctypes
import threading
import time
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import lru_cache

import numpy as np
import torch

from moeflow.core import RecordLayout
from moeflow.errors import ConfigError
from moeflow.kernels.activations import ACTIVATIONS, Activation
from moeflow.kernels.cpu_library import library
from moeflow.kernels.formats import FORMAT_OF_DTYPE, WeightFormat, find_format

# In the order of the enums in _cpu.h.
_FORMATS = ("float32", "bfloat16", "float16", "int8", "uint4", "uint3", "uint2", "sign1", "mxfp4", "fp8")
_KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
_GATES = ("none", "concatenated", "interleaved")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of activations, by number."""


class _Matrix(ctypes.Structure):
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
            "reserved",
        )
    ]


class _Activation(ctypes.Structure):
    _fields_ = [("kind", c_int32), ("gate", c_int32)] + [
        (name, c_float) for name in ("alpha", "gate_limit", "activated_limit", "up_limit", "up_offset")
    ] + [("reserved", c_int32)]  # fmt: skip


class _Expert(ctypes.Structure):
    _fields_ = [("first", _Matrix), ("down", _Matrix), ("activation", _Activation)]


class ExpertKernel:
    """How one layout of record is computed from. Immutable; `build` makes one.

    Args:
        expert: the C description.
        num_features: H.
        intermediate_features: I.
    """

    def __init__(self, expert: _Expert, num_features: int, intermediate_features: int):
        self._expert = expert
        self.pointer = ctypes.addressof(expert)
        self.num_features = num_features
        self.intermediate_features = intermediate_features

    @classmethod
    def build(cls, record: RecordLayout, activation: Activation, *, is_transposed: bool) -> "ExpertKernel | None":
        """Describe a record: "gate_up_proj" or "up_proj", "down_proj", and biases under their names with "_bias".

        Args:
            record: what is stored.
            activation: between the matrices.
            is_transposed: whether float matrices that are plain tensors lie [in, out].

        Returns:
            The kernel; None where there is none for such a record.
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


def run_experts(
    hidden_states: torch.Tensor,
    kernels: list[ExpertKernel],
    addresses: list[int],
    starts: list[int],
    tokens: list[int],
    places: list[int],
    outputs: torch.Tensor,
    *,
    activation_bits: int = 0,
) -> None:
    """Run experts on the tokens routed to them.

    Args:
        hidden_states: [T, H], float32, bfloat16 or float16.
        kernels: [E], how each expert's record is computed from; all of the same H and I.
        addresses: [E], where each record starts in memory.
        starts: [E + 1], where each expert's part of `tokens` and `places` starts.
        tokens: [n], rows of hidden_states.
        places: [n], rows of `outputs`, no two the same.
        outputs: [places, H] float32, contiguous; only `places` are written.
        activation_bits: 0: exact. 16: where an expert has few tokens, activations are rounded to int16 in blocks of 128
            before they meet matrices of integer codes, which is nearly twice as fast; what that costs is far below
            the rounding of bfloat16.

    Raises:
        MemoryError: no memory for the activations.
    """
    hidden_states = hidden_states.contiguous()
    num_experts = len(kernels)
    rows = np.array((tokens, places), dtype=np.int64)
    failed = library().free.moeflow_cpu_experts(
        (c_void_p * num_experts)(*[kernel.pointer for kernel in kernels]),
        (c_void_p * num_experts)(*addresses),
        (c_int64 * (num_experts + 1))(*starts),
        num_experts,
        rows[0].ctypes.data,
        rows[1].ctypes.data,
        hidden_states.data_ptr(),
        DTYPES[hidden_states.dtype],
        outputs.data_ptr(),
        activation_bits,
        torch.get_num_threads(),
    )
    _check(failed, f"{len(tokens)} rows of experts")


def run_token(
    hidden_states: torch.Tensor,
    kernels: list[ExpertKernel],
    addresses: list[int],
    top_k_weights: torch.Tensor,
    out: torch.Tensor,
    *,
    activation_bits: int = 0,
) -> None:
    """Run one token's experts and sum them: the bits of `run_experts` and `combine`, in one call.

    Args:
        hidden_states: [1, H], contiguous.
        kernels: [K].
        addresses: [K].
        top_k_weights: [1, K], contiguous.
        out: [1, H], contiguous, of the dtype of hidden_states.
        activation_bits: as `run_experts` has it.
    """
    num_experts = len(kernels)
    arrays = _arrays(num_experts)
    arrays[0][:] = [kernel.pointer for kernel in kernels]
    arrays[1][:] = addresses
    failed = library().held.moeflow_cpu_token(
        arrays[0],
        arrays[1],
        num_experts,
        hidden_states.data_ptr(),
        top_k_weights.data_ptr(),
        DTYPES[top_k_weights.dtype],
        out.data_ptr(),
        DTYPES[out.dtype],
        activation_bits,
        torch.get_num_threads(),
    )
    _check(failed, f"{num_experts} experts of one token (at most 64)")


def combine(outputs: torch.Tensor, top_k_weights: torch.Tensor, out: torch.Tensor) -> None:
    """Sum each token's outputs by router weight, in float32 and in the order of K, and round once.

    Args:
        outputs: [T * K, H] float32, contiguous.
        top_k_weights: [T, K].
        out: [T, H], contiguous.
    """
    num_tokens, top_k = top_k_weights.shape
    weights = top_k_weights.contiguous()
    failed = library().held.moeflow_cpu_combine(
        outputs.data_ptr(), weights.data_ptr(), DTYPES[weights.dtype], num_tokens, top_k, out.shape[-1],
        out.data_ptr(), DTYPES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip
    _check(failed, f"{num_tokens} tokens")


class LinearKernel:
    """A matrix [N, K] in memory, kept alive by this object, ready to be multiplied with.

    Args:
        tensors: the stored tensors of the matrix by name, with "<name>_bias" where there is one.
        name: of the matrix.
        spec: its format.
        shape: [N, K].
    """

    def __init__(self, tensors: dict[str, torch.Tensor], name: str, spec: WeightFormat, shape: tuple[int, int]):
        places = {part: tensors[part].data_ptr() for part in (name, *_parts(name)) if part in tensors}
        bias = tensors.get(f"{name}_bias")
        matrix = _described(spec, shape, places, name, None if bias is None else bias.dtype)
        if matrix is None:
            raise ConfigError(f"there is no CPU kernel for a matrix in {spec.name}. Allowed: all formats but float64.")
        self._tensors = tensors
        self._matrix = matrix
        self._pointer = ctypes.addressof(matrix)

    def __call__(self, x: torch.Tensor, out: torch.Tensor, *, activation_bits: int = 0) -> None:
        """Multiply.

        Args:
            x: [..., K].
            out: [..., N], contiguous, of the dtype of x: summed in float32 and rounded once.
            activation_bits: as `run_experts` has it.
        """
        _multiply(self._pointer, x, out, activation_bits)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Multiply with a float matrix where it lies.

    Args:
        x: [..., K].
        weight: [N, K], contiguous.
        bias: [N] or None.
        out: [..., N], contiguous, of the dtype of x.
    """
    bias_at, bias_format = (-1, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
    matrix = _float_matrix(weight.data_ptr(), bias_at, DTYPES[weight.dtype], bias_format, *weight.shape)
    _multiply(ctypes.addressof(matrix), x, out, 0)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Normalise rows as transformers' RMSNorm does, in torch's own order of summation.

    Args:
        x: [..., H].
        weight: [H], of the dtype of x.
        eps: added to the mean square.
        out: [..., H], contiguous, of the dtype of x.
    """
    x = x.contiguous()
    num_features = x.shape[-1]
    failed = library().held.moeflow_cpu_rms_norm(
        x.data_ptr(), num_features * x.element_size(), weight.data_ptr(), eps, x.numel() // num_features,
        num_features, out.data_ptr(), DTYPES[x.dtype], library().sum_lanes,
    )  # fmt: skip
    _check(failed, f"a norm of {num_features} features")


def read(block: torch.Tensor) -> int:
    """Read a contiguous block of memory, whole pieces of 1 MiB of it, and return the exclusive or of its words."""
    return library().free.moeflow_cpu_read(
        block.data_ptr(), block.numel() * block.element_size(), torch.get_num_threads()
    )


def read_bandwidth(num_bytes: int = 1 << 29, repeats: int = 7) -> float:
    """Measure what torch's threads read at most of memory that no cache holds: the ceiling of every kernel here.

    Without the compiled library torch's own sum reads, which may take several times as long.

    Args:
        num_bytes: of the block that is read; a multiple of the last-level cache.
        repeats: readings, of which the fastest counts.

    Returns:
        Bytes a second.
    """
    block, best = torch.ones(num_bytes // 8, dtype=torch.int64), float("inf")
    scan = torch.sum if library() is None else read
    for _ in range(repeats):
        begin = time.perf_counter()
        scan(block)
        best = min(best, time.perf_counter() - begin)
    return num_bytes / best


@lru_cache(maxsize=8192)
def _float_matrix(address, bias, format, bias_format, num_rows, in_features) -> _Matrix:
    """Describe a matrix of floats. It is known by all that the description says, so none is ever out of date."""
    return _Matrix(
        address, -1, -1, bias, format, bias_format, num_rows, in_features, in_features, in_features
    )  # fmt: skip


def _multiply(pointer, x, out, activation_bits):
    x, in_features = x.contiguous(), x.shape[-1]
    failed = library().held.moeflow_cpu_linear(
        pointer, None, x.data_ptr(), DTYPES[x.dtype], in_features * x.element_size(), x.numel() // in_features,
        out.data_ptr(), activation_bits, torch.get_num_threads(),
    )  # fmt: skip
    _check(failed, f"{list(x.shape)} of a linear")


def _check(failed, what):
    if failed:
        raise MemoryError(f"no memory for {what}")


_cached = threading.local()


def _arrays(num_experts):
    """Return two arrays of pointers, this thread's own."""
    arrays = _cached.__dict__.get(num_experts)
    if arrays is None:
        arrays = _cached.__dict__[num_experts] = ((c_void_p * num_experts)(), (c_void_p * num_experts)())
    return arrays


def _parts(name):
    return f"{name}_scale", f"{name}_zero", f"{name}_bias"


_BIAS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _matrix(record, name, is_transposed):
    """Describe one matrix of a record; None where it is not there or no kernel knows it."""
    tensors = {spec.name: spec for spec in record.tensors}
    places = {part: tensors[part].offset for part in (name, *_parts(name)) if part in tensors}
    bias = tensors.get(f"{name}_bias")
    bias_dtype = None if bias is None else _BIAS_DTYPES.get(bias.dtype, torch.float64)
    for matrix in record.matrices:
        if matrix.name == name:
            return _described(find_format(matrix.format), matrix.shape, places, name, bias_dtype)
    spec = tensors.get(name)
    if spec is None or spec.dtype not in FORMAT_OF_DTYPE or len(spec.shape) != 2:
        return None
    shape = spec.shape[::-1] if is_transposed else spec.shape
    return _described(FORMAT_OF_DTYPE[spec.dtype], shape, places, name, bias_dtype, is_transposed)


def _described(spec, shape, places, name, bias_dtype, is_transposed=False):
    """Fill in the C description of a matrix whose tensors lie at `places`; None where no kernel knows it."""
    kind = {"int": "int8", "uint": f"uint{spec.bits}", "sign": "sign1"}.get(spec.kind, spec.name)
    if kind not in _FORMATS or (bias_dtype is not None and bias_dtype not in DTYPES):
        return None
    num_rows, in_features = shape
    padded = spec.padded(in_features)
    scale, zero, bias = (places.get(part, -1) for part in _parts(name))
    return _Matrix(
        places[name], scale, zero, bias, _FORMATS.index(kind), DTYPES.get(bias_dtype, 0), num_rows, in_features,
        spec.group_size or padded, padded, is_transposed,
    )  # fmt: skip
