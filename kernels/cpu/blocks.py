"""Dense matrices in the block formats of GGML, where they lie: products by the compiled library, and single rows.

Knows matrices and formats. Knows nothing of files or models.
"""

import ctypes

import torch

from moeflow.errors import ConfigError
from moeflow.kernels.cpu.checks import is_plain, refusal
from moeflow.kernels.cpu.library import library
from moeflow.kernels.cpu.ops import failure, multiply
from moeflow.kernels.cpu.structs import DTYPES, block_matrix
from moeflow.kernels.quantization.formats import FORMATS, find_format
from moeflow.kernels.quantization.ggml_values import block_values

_NO_ROW = -1  # of the library's answers


def block_linear(
    x: torch.Tensor, blocks: torch.Tensor, format: str, bias: torch.Tensor | None, activation_bits: int | None = None
) -> torch.Tensor | None:
    """Multiply with a stored matrix.

    Args:
        x: [..., K], float32, bfloat16 or float16.
        blocks: uint8 [N, bytes of a row].
        format: of the blocks.
        bias: [N] or None.
        activation_bits: as `run_experts` has it; None: 16 where x is of half precision, as for experts, else 0.

    Returns:
        [..., N], contiguous, of the dtype of x: summed in float32 and rounded once. None where no kernel takes these
        tensors.

    Raises:
        MemoryError: no memory for the activations.
    """
    spec = FORMATS.get(format)
    if spec is None or spec.kind != "ggml" or not (x.is_cpu and x.dtype in DTYPES and x.dim() and x.numel()):
        return None
    num_rows, in_features = len(blocks) if blocks.dim() else 0, x.shape[-1]
    if not num_rows or in_features % spec.group_size:
        return None
    if not _is_matrix(blocks, spec.tensors("", (num_rows, in_features))):
        return None
    if bias is not None and not (is_plain(bias) and bias.dtype in DTYPES and bias.shape == (num_rows,)):
        return None
    if library() is None:
        return None
    bias_at, bias_format = (-1, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
    matrix = block_matrix(blocks.data_ptr(), bias_at, format, bias_format, num_rows, in_features)
    if matrix is None:
        return None
    out = x.new_empty(*x.shape[:-1], num_rows)
    if activation_bits is None:
        activation_bits = 0 if x.dtype is torch.float32 else 16
    multiply(ctypes.addressof(matrix), x, out, activation_bits)
    return out


def block_rows(
    ids: torch.Tensor, blocks: torch.Tensor, format: str, in_features: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return rows of a stored matrix [N, K], rounded once.

    Args:
        ids: [...], whole numbers.
        blocks: uint8 [N, bytes of a row].
        format: of the blocks.
        in_features: K.
        dtype: of the result.

    Returns:
        [..., K].

    Raises:
        ConfigError: the format has no blocks, or the tensor is no such matrix.
        IndexError: there is no such row.
    """
    spec, num_rows = find_format(format), len(blocks) if blocks.dim() else 0
    if spec.kind != "ggml":
        raise ConfigError(f"{format} has no blocks. Allowed: the block formats of GGML, such as q8_0.")
    ((_, _, size),) = parts = spec.tensors("", (num_rows, in_features))
    if not _is_matrix(blocks, parts):
        raise refusal(f"rows in {format}", f"uint8 {list(size)}", blocks)
    rows = ids.long().reshape(-1).contiguous()
    matrix = block_matrix(blocks.data_ptr(), -1, format, 0, num_rows, in_features) if num_rows and in_features else None
    found = library()
    if found is None or matrix is None or dtype not in DTYPES or not rows.is_cpu:
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < num_rows:
            raise _no_row(rows, num_rows)
        return block_values(blocks[rows], format).to(dtype).view(*ids.shape, in_features)
    out = torch.empty(*ids.shape, in_features, dtype=dtype)
    answer = found.free.moeflow_cpu_block_rows(
        ctypes.addressof(matrix), rows.data_ptr(), len(rows), out.data_ptr(), DTYPES[dtype]
    )
    if answer == _NO_ROW:
        raise _no_row(rows, num_rows)
    if answer:
        raise failure(answer, f"{len(rows)} rows in {format}")
    return out


def _is_matrix(blocks, parts) -> bool:
    """Whether a tensor is the one that a matrix is stored in."""
    ((_, _, size),) = parts
    return is_plain(blocks) and blocks.dtype == torch.uint8 and blocks.shape == size


def _no_row(rows, num_rows) -> IndexError:
    return IndexError(f"rows {int(rows.min())} to {int(rows.max())} of a matrix with {num_rows}: no such row")
