"""Codes packed in blocks of 32 neighbours of a row, as `kernels/quantization/formats.py` lays them out.

Knows codes, unsigned and one a byte. Knows nothing of a code's value.
"""

import torch

from moeflow.kernels.quantization.formats import BLOCK


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes of one byte each.

    Args:
        codes: [N, Kp], uint8, each below 2^bits; Kp a multiple of 32. Eight bits are two's complement bytes.
        bits: 1, 2, 3, 4 or 8.

    Returns:
        [N, Kp / 32 * 4 * bits], uint8.
    """
    assert codes.dtype == torch.uint8, f"codes of {codes.dtype}"
    assert codes.shape[1] % BLOCK == 0, f"rows of {codes.shape[1]} codes"
    if bits == 8:
        return codes.contiguous()
    return _pack_blocks(codes.reshape(codes.shape[0], -1, BLOCK), bits).flatten(1)


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes that `pack_codes` packed.

    Args:
        packed: [N, Kp / 32 * 4 * bits], uint8.
        bits: 1, 2, 3, 4 or 8.

    Returns:
        [N, Kp], uint8.
    """
    assert packed.dtype == torch.uint8, f"packed codes of {packed.dtype}"
    assert packed.shape[1] % (4 * bits) == 0, f"rows of {packed.shape[1]} bytes"
    if bits == 8:
        return packed.contiguous()
    return _unpack_blocks(packed.reshape(packed.shape[0], -1, 4 * bits), bits).flatten(1)


def _pack_blocks(codes, bits) -> torch.Tensor:
    """Pack [N, blocks, 32] to [N, blocks, 4 * bits]."""
    if bits == 3:
        return torch.cat((_pack_blocks(codes & 3, 2), _pack_blocks(codes >> 2, 1)), dim=-1)
    if bits == 1:  # byte j of the word has v_(8j) .. v_(8j + 7)
        parts = codes.unflatten(-1, (4, 8)).unbind(-1)
    else:  # byte j has every (4 * bits)-th value from v_j on
        parts = codes.unflatten(-1, (8 // bits, 4 * bits)).unbind(-2)
    packed = parts[0].clone()
    for place, part in enumerate(parts[1:], 1):
        packed |= part << (bits * place)
    return packed


def _unpack_blocks(packed, bits) -> torch.Tensor:
    """Unpack [N, blocks, 4 * bits] to [N, blocks, 32]."""
    if bits == 3:
        return _unpack_blocks(packed[..., :8], 2) | (_unpack_blocks(packed[..., 8:], 1) << 2)
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1 if bits == 1 else -2).flatten(-2)
