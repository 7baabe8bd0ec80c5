"""The compiled CPU kernels: routed experts, linears and norms straight from memory, called by ctypes.

Every result has the same bits for any number of threads and for any way of sharing experts out over calls: an output is
one sum in float32 in an order that depends on format, in features, instruction set, and whether its expert has few or
many tokens. Knows tensors and descriptions. Knows nothing of caches or models.
"""

import ctypes
import threading
import time
from ctypes import c_int64, c_void_p

import numpy as np
import torch

from moeflow.errors import ConfigError
from moeflow.kernels.cpu import checks
from moeflow.kernels.cpu.library import library, loaded
from moeflow.kernels.cpu.structs import DTYPES, ExpertKernel, described_matrix, float_matrix
from moeflow.kernels.quantization.formats import WeightFormat

# Floats in the vectors of torch's sums: those of AVX2 everywhere, since torch registers no AVX-512 kernel for sums.
_SUM_LANES = 8

MAX_TOKEN_EXPERTS = 64
"""Most experts of one token in one call of `run_token`; TOKEN_EXPERTS of _cpu.h."""

_NO_MEMORY = 1  # of the library's answers: 0 is done, all others are counts, sizes or addresses that cannot be


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
        kernels: [E], the kernel of each expert's record; all of the same H and I.
        addresses: [E], where each record starts in memory: all of it stays there until the call returns.
        starts: [E + 1], where each expert's part of `tokens` and `places` starts.
        tokens: [n], rows of hidden_states.
        places: [n], rows of `outputs`, no two the same.
        outputs: [places, H] float32, contiguous; only `places` are written.
        activation_bits: 0: exact. 16: where an expert has few tokens, activations are rounded to int16 in blocks of 128
            before they meet matrices of integer codes, which is nearly twice as fast; the error is far below
            the rounding of bfloat16.

    Raises:
        ConfigError: a tensor, count, row or place that does not fit the others.
        MemoryError: no memory for the activations.
    """
    if not checks.takes_experts(hidden_states, outputs):
        raise checks.refusal("experts", "tokens [T, H] and float32 outputs [places, H]", hidden_states, outputs)
    num_experts = len(kernels)
    if len(addresses) != num_experts or len(starts) != num_experts + 1 or len(places) != len(tokens):
        raise ConfigError(
            f"{num_experts} kernels, {len(addresses)} addresses, {len(starts)} starts, {len(tokens)} tokens and "
            f"{len(places)} places. Give an address for each kernel, one start more, and a place for each token."
        )
    hidden_states = hidden_states.contiguous()
    rows = np.array((tokens, places), dtype=np.int64)
    failed = loaded().free.moeflow_cpu_experts(
        (c_void_p * num_experts)(*[kernel.pointer for kernel in kernels]),
        (c_void_p * num_experts)(*addresses),
        (c_int64 * (num_experts + 1))(*starts),
        num_experts,
        rows[0].ctypes.data,
        rows[1].ctypes.data,
        len(tokens),
        hidden_states.data_ptr(),
        DTYPES[hidden_states.dtype],
        *hidden_states.shape,
        outputs.data_ptr(),
        len(outputs),
        activation_bits,
        torch.get_num_threads(),
    )
    if failed:
        raise failure(failed, f"{len(tokens)} rows of {num_experts} experts")


def run_token(
    hidden_states: torch.Tensor,
    kernels: list[ExpertKernel],
    addresses: list[int],
    top_k_weights: torch.Tensor,
    *,
    activation_bits: int = 0,
) -> torch.Tensor:
    """Run one token's experts and sum them: the bits of `run_experts` and `combine`, in one call.

    Args:
        hidden_states: [1, H], contiguous.
        kernels: [K], 1 to `MAX_TOKEN_EXPERTS`.
        addresses: [K].
        top_k_weights: [1, K], contiguous.
        activation_bits: as `run_experts` has it.

    Returns:
        [1, H], of the dtype of hidden_states.

    Raises:
        ConfigError: a tensor or count that does not fit the others.
        MemoryError: no memory for the activations.
    """
    num_experts = len(kernels)
    if not checks.takes_token(hidden_states, top_k_weights, num_experts):
        wanted = f"a token [1, H] and weights [1, K] of its experts, here {num_experts}"
        raise checks.refusal("one token's experts", wanted, hidden_states, top_k_weights)
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    arrays = _arrays(num_experts)
    arrays[0][:] = [kernel.pointer for kernel in kernels]
    arrays[1][:] = addresses
    failed = loaded().held.moeflow_cpu_token(
        arrays[0],
        arrays[1],
        num_experts,
        hidden_states.data_ptr(),
        hidden_states.numel(),
        top_k_weights.data_ptr(),
        DTYPES[top_k_weights.dtype],
        out.data_ptr(),
        DTYPES[out.dtype],
        activation_bits,
        torch.get_num_threads(),
    )
    if failed:
        raise failure(failed, f"{num_experts} experts of one token (1 to {MAX_TOKEN_EXPERTS})")
    return out


def combine(outputs: torch.Tensor, top_k_weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum each token's outputs by router weight, in float32 and in the order of K, and round once.

    Args:
        outputs: [T * K, H] float32, contiguous.
        top_k_weights: [T, K].
        dtype: of the result.

    Returns:
        [T, H]; zeros where K is 0.

    Raises:
        ConfigError: a tensor that does not fit the others.
        MemoryError: no memory for the weights.
    """
    if not checks.takes_outputs(outputs, top_k_weights, dtype):
        raise checks.refusal(
            f"a sum in {dtype}", "float32 outputs [T * K, H] and weights [T, K]", outputs, top_k_weights
        )
    (num_tokens, top_k), num_features = top_k_weights.shape, outputs.shape[1]
    if top_k == 0:
        return outputs.new_zeros(num_tokens, num_features, dtype=dtype)
    out = outputs.new_empty(num_tokens, num_features, dtype=dtype)
    weights = top_k_weights.contiguous()
    failed = loaded().held.moeflow_cpu_combine(
        outputs.data_ptr(), weights.data_ptr(), DTYPES[weights.dtype], num_tokens, top_k, num_features,
        out.data_ptr(), DTYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise failure(failed, f"the sum of {top_k} experts of {num_tokens} tokens")
    return out


class LinearKernel:
    """A matrix [N, K] in memory, kept alive by this object, ready to be multiplied with.

    Args:
        tensors: the stored tensors of the matrix by name, with "<name>_bias" where there is one.
        name: of the matrix.
        spec: its format.
        shape: [N, K].

    Raises:
        ConfigError: there is no kernel for the format, or a tensor has not its dtype and shape in memory.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], name: str, spec: WeightFormat, shape: tuple[int, int]) -> None:
        checks.check_matrix(tensors, name, spec, shape)
        bias = tensors.get(f"{name}_bias")
        places = {part: tensor.data_ptr() for part, tensor in tensors.items()}
        matrix = described_matrix(spec, shape, places, name, None if bias is None else bias.dtype)
        if matrix is None:
            raise ConfigError(f"there is no CPU kernel for a matrix in {spec.name}. Allowed: all formats but float64.")
        self._tensors = dict(tensors)
        self._shape = shape
        self._matrix = matrix
        self._pointer = ctypes.addressof(matrix)

    def __call__(self, x: torch.Tensor, out: torch.Tensor, *, activation_bits: int = 0) -> None:
        """Multiply.

        Args:
            x: [..., K].
            out: [..., N], contiguous, of the dtype of x: summed in float32 and rounded once.
            activation_bits: as `run_experts` has it.

        Raises:
            ConfigError: a tensor that does not fit the matrix.
            MemoryError: no memory for the activations.
        """
        if not checks.takes_product(x, out, self._shape):
            raise checks.refusal("a product", f"x [..., {self._shape[1]}] and out [..., {self._shape[0]}]", x, out)
        multiply(self._pointer, x, out, activation_bits)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """Multiply with a float matrix where it lies.

    Args:
        x: [..., K].
        weight: [N, K], contiguous.
        bias: [N] or None.

    Returns:
        [..., N], contiguous, of the dtype of x: summed in float32 and rounded once. None, and torch computes, where
        `takes_linear` says no: the weights were moved, cast or replaced.

    Raises:
        MemoryError: no memory for the activations.
    """
    if not checks.takes_linear(x, weight, bias):
        return None
    bias_at, bias_format = (-1, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
    matrix = float_matrix(weight.data_ptr(), bias_at, DTYPES[weight.dtype], bias_format, *weight.shape)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    multiply(ctypes.addressof(matrix), x, out, 0)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """Normalise rows as transformers' RMSNorm does, in torch's own order of summation.

    Args:
        x: [..., H].
        weight: [H], of the dtype of x.
        eps: added to the mean square.

    Returns:
        [..., H], contiguous, of the dtype of x. None, and torch computes, where `takes_norm` says no.

    Raises:
        MemoryError: no memory for a row.
    """
    if not checks.takes_norm(x, weight):
        return None
    x = x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    num_features = x.shape[-1]
    failed = loaded().held.moeflow_cpu_rms_norm(
        x.data_ptr(), num_features * x.element_size(), weight.data_ptr(), eps, x.numel() // num_features,
        num_features, out.data_ptr(), DTYPES[x.dtype], _SUM_LANES,
    )  # fmt: skip
    if failed:
        raise failure(failed, f"a norm of {num_features} features")
    return out


def read(block: torch.Tensor) -> int:
    """Read the whole pieces of 1 MiB of a contiguous block of memory and return the exclusive or of their words.

    Raises:
        ConfigError: the block lies elsewhere, or not in order.
    """
    if not checks.is_plain(block):
        raise ConfigError(f"a block on {block.device} cannot be read. Give a contiguous tensor on the CPU.")
    return loaded().free.moeflow_cpu_read(
        block.data_ptr(), block.numel() * block.element_size(), torch.get_num_threads()
    )


def read_bandwidth(num_bytes: int = 1 << 29, repeats: int = 7) -> float:
    """Measure the most that torch's threads read from memory that no cache holds: the ceiling of every kernel here.

    Without the compiled library torch's own sum reads, which may take several times as long.

    Args:
        num_bytes: of the block that is read; a multiple of the last-level cache.
        repeats: number of readings; the fastest counts.

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


def multiply(pointer: int, x: torch.Tensor, out: torch.Tensor, activation_bits: int) -> None:
    """Multiply with the matrix that is described at an address; who calls has checked that x and out fit it."""
    x, in_features = x.contiguous(), x.shape[-1]
    failed = loaded().held.moeflow_cpu_linear(
        pointer, None, x.data_ptr(), DTYPES[x.dtype], in_features * x.element_size(), x.numel() // in_features,
        out.data_ptr(), activation_bits, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise failure(failed, f"x {list(x.shape)} of a linear")


def failure(answer: int, what: str) -> Exception:
    """Return the error of a call that the library gave up, or did not begin.

    Args:
        answer: of the library.
        what: was asked for.
    """
    if answer == _NO_MEMORY:
        return MemoryError(f"no memory for {what}")
    return ConfigError(
        f"{what}: a count, a row or an address is out of range, or experts differ in size. Allowed: rows, places and "
        "counts within the tensors given, weights in memory, experts of one layer, activations of 0 or 16 bits."
    )


_cached = threading.local()


def _arrays(num_experts) -> tuple[ctypes.Array, ctypes.Array]:
    """Return two arrays of pointers, this thread's own."""
    arrays = _cached.__dict__.get(num_experts)
    if arrays is None:
        arrays = _cached.__dict__[num_experts] = ((c_void_p * num_experts)(), (c_void_p * num_experts)())
    return arrays
