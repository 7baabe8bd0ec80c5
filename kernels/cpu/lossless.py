"""Stores bfloat16 matrices without loss, and reads them back: by the compiled library, else by the oracle in torch.

Knows matrices and the format. Knows nothing of files or models.
"""

import ctypes

import torch

from moeflow.errors import CheckpointError, ConfigError
from moeflow.kernels.cpu.checks import is_plain, refusal
from moeflow.kernels.cpu.library import library
from moeflow.kernels.cpu.ops import multiply
from moeflow.kernels.cpu.structs import DTYPES, lossless_matrix
from moeflow.kernels.quantization.formats import LOSSLESS_BLOCK, MOST_LOSSLESS_VALUES, WeightFormat, lossless_format
from moeflow.kernels.quantization.lossless import decode_lossless, encode_lossless

_FAULTS = (
    "escapes out of order or outside of the matrix", "escapes at other values than the codes say",
    "rows that hide their escapes", "tops that are no exponents", "codes that name no value",
)  # fmt: skip


def count_escapes(weight: torch.Tensor) -> int:
    """Return how many values of a matrix need an escape.

    Args:
        weight: [N, K], bfloat16, contiguous.

    Raises:
        ConfigError: the weight is no such matrix, or too large.
    """
    _check_weight(weight)
    found = library()
    if found is None:
        return len(encode_lossless(weight)[2]) // 5
    return found.free.moeflow_lossless_encode(weight.data_ptr(), *weight.shape, None, None, None, 0)


def encode(weight: torch.Tensor, codes: torch.Tensor, tops: torch.Tensor, escapes: torch.Tensor) -> None:
    """Store a matrix.

    Args:
        weight: [N, K], bfloat16, contiguous.
        codes: uint8 [N, Kp / 64 * 96], written.
        tops: uint16 [N], written.
        escapes: uint8 [5 E], written.

    Raises:
        ConfigError: a tensor does not fit the others, or there are more escapes than E.
    """
    _check_weight(weight)
    room = escapes.numel() // 5
    _check_parts(codes, tops, escapes, lossless_format(room), (weight.shape[0], weight.shape[1]))
    library_ = library()
    if library_ is None:
        found = len(encode_lossless(weight)[2]) // 5
        if found <= room:
            for part, value in zip((codes, tops, escapes), encode_lossless(weight, room), strict=True):
                part.copy_(value)
    else:
        found = library_.free.moeflow_lossless_encode(
            weight.data_ptr(), *weight.shape, codes.data_ptr(), tops.data_ptr(), escapes.data_ptr(), room
        )
    if found > room:
        raise ConfigError(f"a matrix {list(weight.shape)} has {found} escapes, and room for {room}. Give room for all.")


def decode(
    codes: torch.Tensor, tops: torch.Tensor, escapes: torch.Tensor, shape: tuple[int, int], out: torch.Tensor | None
) -> None:
    """Look at a stored matrix, and write its values where `out` is given.

    Args:
        codes: uint8 [N, Kp / 64 * 96].
        tops: uint16 [N].
        escapes: uint8 [5 E].
        shape: [N, K].
        out: [N, K], bfloat16, contiguous.

    Raises:
        CheckpointError: escapes out of order or beyond the matrix, codes that name no value.
        ConfigError: a tensor has not the dtype and shape that the matrix asks for.
    """
    spec = lossless_format(escapes.numel() // 5)
    _check_parts(codes, tops, escapes, spec, shape)
    if out is not None and not (is_plain(out) and out.dtype == torch.bfloat16 and out.shape == shape):
        raise refusal("a lossless matrix", f"out {list(shape)} in bfloat16", out)
    found = library()
    if found is None:
        values = decode_lossless(codes, tops, escapes, spec, shape)
        if out is not None:
            out.copy_(values)
        return
    fault = found.free.moeflow_lossless_decode(
        codes.data_ptr(), tops.data_ptr(), escapes.data_ptr(), spec.num_escapes, *shape,
        None if out is None else out.data_ptr(),
    )  # fmt: skip
    _raise_fault(fault)


def _raise_fault(fault: int) -> None:
    if fault:
        raise CheckpointError(
            f"a lossless matrix has {_FAULTS[fault - 1]}. The file is damaged: fetch or pack it again."
        )


def lossless_linear(
    x: torch.Tensor, codes: torch.Tensor, tops: torch.Tensor, escapes: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Multiply with a stored matrix: the bits of `linear` with its values.

    Args:
        x: [..., K], bfloat16.
        codes: uint8 [N, Kp / 64 * 96].
        tops: uint16 [N].
        escapes: uint8 [5 E].
        bias: [N] or None.

    Returns:
        [..., N], contiguous, bfloat16; None where no kernel takes these tensors.
    """
    if not (x.dim() and tops.dim()):
        return None
    shape, room = (len(tops), x.shape[-1]), escapes.numel() // 5
    if not (x.is_cpu and x.dtype == torch.bfloat16 and x.numel() and _fits(codes, tops, escapes, shape)):
        return None
    if bias is not None and not (is_plain(bias) and bias.dtype in DTYPES and bias.shape == shape[:1]):
        return None
    bias_at, bias_format = (-1, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
    places = (codes.data_ptr(), tops.data_ptr(), escapes.data_ptr(), bias_at)
    matrix = lossless_matrix(places, bias_format, shape, room)
    out = x.new_empty(*x.shape[:-1], shape[0])
    multiply(ctypes.addressof(matrix), x, out, 0)
    return out


def lossless_rows(
    ids: torch.Tensor, codes: torch.Tensor, tops: torch.Tensor, escapes: torch.Tensor, in_features: int
) -> torch.Tensor:
    """Return rows of a stored matrix [N, K].

    Args:
        ids: [...], whole numbers.
        codes: uint8 [N, Kp / 64 * 96].
        tops: uint16 [N].
        escapes: uint8 [5 E].
        in_features: K.

    Returns:
        [..., K], bfloat16.

    Raises:
        IndexError: there is no such row.
        CheckpointError: as `decode`.
    """
    room, rows = escapes.numel() // 5, ids.long().reshape(-1).contiguous()
    spec, shape = lossless_format(room), (len(tops), in_features)
    _check_parts(codes, tops, escapes, spec, shape)
    found = library()
    if found is None:
        return decode_lossless(codes, tops, escapes, spec, shape)[ids]
    out = torch.empty(*ids.shape, in_features, dtype=torch.bfloat16)
    fault = found.free.moeflow_lossless_rows(
        codes.data_ptr(), tops.data_ptr(), escapes.data_ptr(), room, *shape, rows.data_ptr(), len(rows), out.data_ptr()
    )
    if fault < 0:
        raise IndexError(f"rows {rows.min()} to {rows.max()} of a lossless matrix with {len(tops)}: no such row")
    _raise_fault(fault)
    return out


def _check_weight(weight) -> None:
    if not (is_plain(weight) and weight.dtype == torch.bfloat16 and weight.dim() == 2 and weight.numel() > 0):
        raise refusal("a lossless matrix", "[N, K] in bfloat16", weight)
    if weight.numel() > MOST_LOSSLESS_VALUES:
        raise ConfigError(f"a matrix {list(weight.shape)} is too large to be stored without loss: at most 2^32 values.")


def _check_parts(codes, tops, escapes, spec: WeightFormat, shape) -> None:
    for part, (name, _, size) in zip((codes, tops, escapes), spec.tensors("codes", shape), strict=True):
        dtype = torch.uint16 if name.endswith("_top") else torch.uint8
        if not (is_plain(part) and part.dtype == dtype and part.shape == size):
            raise refusal(f"{name} of {list(shape)}", f"{dtype} {list(size)}", part)


def _fits(codes: torch.Tensor, tops: torch.Tensor, escapes: torch.Tensor, shape: tuple[int, int]) -> bool:
    """Whether three tensors are a matrix [N, K]."""
    return (
        all(map(is_plain, (codes, tops, escapes)))
        and (codes.dtype, tops.dtype, escapes.dtype) == (torch.uint8, torch.uint16, torch.uint8)
        and codes.shape == (shape[0], -(-shape[1] // LOSSLESS_BLOCK) * 96)
        and tops.shape == shape[:1]
        and escapes.dim() == 1
        and escapes.numel() % 5 == 0
    )
