"""The pieces of a quantised matrix in the order of the weight formats, and as plain values: fp8, gptq and awq.

MXFP4 is stored by checkpoints as the weight format has it.

Knows tensors of one matrix. Knows nothing of files, models or transformers.
"""

import torch

from moeflow.checkpoint.prequantized.scheme import BLOCK, QuantizationScheme
from moeflow.core import align_up
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format

_LOW_HALVES = 0x0F0F0F0F  # of an int32's bytes
_ROWS_AT_ONCE = 1024  # a multiple of BLOCK
# The out feature, in a run of eight, of the i-th code of an AWQ int32.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def in_format(
    pieces: dict[str, torch.Tensor], scheme: QuantizationScheme, shape: tuple[int, int], name: str
) -> dict[str, torch.Tensor]:
    """Return a matrix's stored tensors in the scheme's weight format, without loss.

    Args:
        pieces: the matrix's tensors by the endings of their names.
        scheme: how they are quantised.
        shape: [N, K].
        name: of the matrix.

    Returns:
        {name, name_scale and, in int4, name_zero: tensor}.

    Raises:
        ValueError: a scale is not finite, or a group is not made of neighbours.
    """
    if scheme.method == "fp8":
        codes = pieces[""].to(torch.float8_e4m3fn)  # transformers before 5.24 may have widened them, without loss
        return {
            name: _pad(codes.view(torch.uint8), align_up(shape[1], BLOCK)),
            f"{name}_scale": _finite(pieces["_scale_inv"].float()),
        }
    return _int4(pieces, scheme, shape, name)


def values(
    pieces: dict[str, torch.Tensor], scheme: QuantizationScheme, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Return a matrix's values, [N, K] in `dtype`; arguments and errors as `in_format`."""
    stored, spec = in_format(pieces, scheme, shape, "weight"), find_format(scheme.format)
    out = torch.empty(shape, dtype=dtype, device=stored["weight"].device)
    for first in range(0, shape[0], _ROWS_AT_ONCE):  # so that no second copy in float32 arises
        part = {}
        for name, tensor in stored.items():
            rows = BLOCK if scheme.method == "fp8" and name == "weight_scale" else 1  # that share a row of the tensor
            part[name] = tensor[first // rows : (first + _ROWS_AT_ONCE) // rows]
        piece = out[first : first + _ROWS_AT_ONCE]
        piece.copy_(dequantize(part, "weight", spec, (len(piece), shape[1]), dtype))
    return out


def _int4(
    pieces: dict[str, torch.Tensor], scheme: QuantizationScheme, shape: tuple[int, int], name: str
) -> dict[str, torch.Tensor]:
    in_features = shape[1]
    group_size = in_features if scheme.group_size == -1 else scheme.group_size
    if ".g_idx" in pieces:
        groups = torch.arange(in_features, device=pieces[".g_idx"].device) // group_size
        if not torch.equal(pieces[".g_idx"].long(), groups):
            raise ValueError(
                "g_idx does not number the groups from left to right (act-order, desc_act), and moeflow reads groups "
                "of neighbours only"
            )
    stored, padded = scheme.stored_group_size, align_up(in_features, scheme.stored_group_size)
    if scheme.method == "gptq":
        codes, zeros = _gptq_codes(pieces[".qweight"], padded), _nibbles(pieces[".qzeros"])  # zeros: [groups, N]
    else:
        codes, zeros = _awq_codes(pieces[".qweight"], padded), _awq_columns(pieces[".qzeros"])
    offset = 0 if scheme.symmetric and bool((zeros == 8).all()) else scheme.zero_offset
    scales = _finite(pieces[".scales"])
    repeats, wanted = -(-group_size // stored), padded // stored

    def spread(numbers: torch.Tensor) -> torch.Tensor:
        """Turn [groups, N] of the checkpoint into [N, groups] of the format."""
        return numbers.half().repeat_interleave(repeats, dim=0)[:wanted].T.contiguous()

    return {
        name: codes,
        f"{name}_scale": spread(scales),
        f"{name}_zero": spread(zeros.half() + offset),
    }


def _gptq_codes(words: torch.Tensor, padded: int) -> torch.Tensor:
    """Bring int32 [K / 8, N] into the packed order of the format: uint8 [N, Kp / 2].

    The codes of a word are neighbours of a row; the format wants v_j and v_(j+16) in one byte, without unpacking.
    """
    words = torch.nn.functional.pad(words, (0, 0, 0, padded // 8 - words.shape[0]))
    pairs = _join(*words.unflatten(0, (-1, 2, 2)).unbind(1))  # even and odd codes, [blocks, half of the block, N]
    even, odd = (pair.permute(2, 0, 1).contiguous().view(torch.uint8) for pair in pairs)
    return torch.stack((even, odd), dim=-1).view(words.shape[1], padded // 2)


def _awq_codes(words: torch.Tensor, padded: int) -> torch.Tensor:
    """Bring int32 [K, N / 8] into the packed order of the format: uint8 [N, Kp / 2].

    The codes of a word are of eight rows: v_j and v_(j+16) of four of them are joined at once, then bytes change place.
    """
    words = torch.nn.functional.pad(words, (0, 0, 0, padded - words.shape[0]))
    pairs = _join(*words.unflatten(0, (-1, 2, 16)).unbind(1))  # even and odd codes, [blocks, 16, N / 8]
    joined = torch.stack(pairs).view(torch.uint8).view(2, padded // 2, -1, 4)  # [parity, Kp / 2, N / 8, byte]
    out = joined.new_empty(words.shape[1], 8, padded // 2)
    for place, row in enumerate(_AWQ_ORDER):
        out[:, row] = joined[place % 2, :, :, place // 2].T
    return out.flatten(0, 1)


def _join(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the codes of two int32 tensors into common bytes: those at even places, and those at odd ones."""
    return (first & _LOW_HALVES) | ((second & _LOW_HALVES) << 4), ((first >> 4) & _LOW_HALVES) | (second & ~_LOW_HALVES)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """Unpack int32 [R, C] into its codes, lowest first: uint8 [R, 8 C]."""
    halves = words.contiguous().view(torch.uint8)  # [R, 4 C], little-endian
    return torch.stack((halves & 15, halves >> 4), dim=-1).flatten(1)


def _awq_columns(words: torch.Tensor) -> torch.Tensor:
    """Unpack int32 [R, N / 8] as AWQ interleaves it: uint8 [R, N]."""
    codes = _nibbles(words).unflatten(1, (-1, 8))
    out = torch.empty_like(codes)
    out[..., list(_AWQ_ORDER)] = codes
    return out.flatten(1)


def _pad(codes: torch.Tensor, padded: int) -> torch.Tensor:
    return torch.nn.functional.pad(codes, (0, padded - codes.shape[1])) if padded > codes.shape[1] else codes


def _finite(scales: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(scales).all():
        raise ValueError("a scale is NaN or infinite")
    return scales
