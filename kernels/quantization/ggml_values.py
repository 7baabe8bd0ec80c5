"""Values of GGML's blocks, in plain torch: the bits of `gguf.quants.dequantize`.

A block of `quantization/ggml.py` is codes with one scale in half precision (d), and one minimum (m) in some. Codes of 4
bits and fewer lie in planes: a byte has one code each of neighbouring stretches, from its low bits up. Blocks of 256
values have a small whole scale (s) and minimum for every 16 or 32 of them:

| types | a value |
|---|---|
| q8_0, q4_0, q5_0; tq1_0, tq2_0 | d * code, codes with a sign |
| q4_1, q5_1 | d * code + m |
| q2_k, q4_k, q5_k | d * s * code - m * s' |
| q3_k, q6_k | d * s * code, codes with a sign |
| iq4_nl, iq4_xs | d * s * one of 16 whole numbers |
| iq1, iq2 and iq3 | d * s * an entry of a grid of 4 or 8 values, with signs or a shift |
| ggml_mxfp4, ggml_nvfp4 | E2M1 times a power of two, or times E4M3 |

The grids are read from the package gguf. Knows bytes. Knows nothing of matrices or files.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from moeflow.kernels.quantization.formats import find_format

_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_SHIFT_OF_GRID = 0.125  # iq1


def block_values(blocks: torch.Tensor, format: str) -> torch.Tensor:
    """Return the values of blocks.

    Args:
        blocks: uint8 [..., bytes], whole blocks.
        format: a weight format of kind "ggml".

    Returns:
        [..., values], float32.
    """
    spec = find_format(format)
    assert spec.kind == "ggml", f"{format} has no blocks"
    assert blocks.dtype == torch.uint8, f"blocks of {blocks.dtype}"
    assert blocks.shape[-1] % spec.block_bytes == 0, f"{blocks.shape[-1]} bytes of {format}"
    values = _VALUES[format](blocks.reshape(-1, spec.block_bytes))
    return values.reshape(*blocks.shape[:-1], blocks.shape[-1] // spec.block_bytes * spec.group_size)


def _halves(blocks, at) -> torch.Tensor:
    """Return the half at a byte of every block, [n, 1] in float32."""
    return blocks[:, at : at + 2].clone().view(torch.float16).float()


def _words(part, dtype) -> torch.Tensor:
    """Return bytes [n, count] as whole numbers of 2 or 4 bytes, int64, none below zero."""
    found = part.clone(memory_format=torch.contiguous_format).view(dtype).long()
    return found & (2 ** (8 * dtype.itemsize) - 1)


def _shifted(part, shifts) -> torch.Tensor:
    """Return [n, ...] shifted right by each of some numbers of bits, [n, ..., shifts]."""
    return part.unsqueeze(-1) >> torch.tensor(tuple(shifts), dtype=part.dtype, device=part.device)


def _planes(part, width, bits) -> torch.Tensor:
    """Return the codes of bytes [n, count], of which every `width` have a plane of so many bits after the other."""
    stretches = part.unflatten(1, (-1, 1, width))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=part.device).view(-1, 1)
    return ((stretches >> shifts) & (2**bits - 1)).flatten(1)


def _bits(part) -> torch.Tensor:
    """Return the bits of bytes [n, count], from the low ones up: [n, 8 * count]."""
    return (_shifted(part, range(8)) & 1).flatten(1)


def _chosen(table, codes) -> torch.Tensor:
    """Return table[codes] in float32."""
    return torch.tensor(table, dtype=torch.float32, device=codes.device)[codes.int()]


def _scaled(codes, scales) -> torch.Tensor:
    """Multiply codes [n, values] with the scales [n, parts] of their parts."""
    return (codes.float().unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).flatten(1)


def _less(values, minima) -> torch.Tensor:
    return (values.unflatten(1, (minima.shape[1], -1)) - minima.unsqueeze(-1)).flatten(1)


def _q4_0(b) -> torch.Tensor:
    return _halves(b, 0) * (_planes(b[:, 2:], 16, 4).float() - 8)


def _q4_1(b) -> torch.Tensor:
    return _halves(b, 0) * _planes(b[:, 4:], 16, 4) + _halves(b, 2)


def _five_bits(b, at) -> torch.Tensor:
    return _planes(b[:, at + 4 :], 16, 4) | (_bits(b[:, at : at + 4]) << 4)


def _q5_0(b) -> torch.Tensor:
    return _halves(b, 0) * (_five_bits(b, 2).float() - 16)


def _q5_1(b) -> torch.Tensor:
    return _halves(b, 0) * _five_bits(b, 4) + _halves(b, 2)


def _q8_0(b) -> torch.Tensor:
    return _halves(b, 0) * b[:, 2:].view(torch.int8)


def _q2_k(b) -> torch.Tensor:
    scales = b[:, :16]
    values = _scaled(_planes(b[:, 16:80], 32, 2), _halves(b, 80) * (scales & 15))
    return _less(values, _halves(b, 82) * (scales >> 4))


def _q3_k(b) -> torch.Tensor:
    codes = _planes(b[:, 32:96], 32, 2).float() - 4 * (1 - _planes(b[:, :32], 32, 1).float())
    scales = _planes(b[:, 96:104], 8, 4) | (_planes(b[:, 104:108], 4, 2) << 4)
    return _scaled(codes, _halves(b, 108) * (scales.float() - 32))


def _scales_and_minima(b) -> tuple[torch.Tensor, torch.Tensor]:
    """Return d * s and m * s' of q4_k and q5_k, [n, 8]."""
    low, middle, both = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat((low & 63, (both & 15) | ((low >> 2) & 48)), dim=1)
    minima = torch.cat((middle & 63, (both >> 4) | ((middle >> 2) & 48)), dim=1)
    return _halves(b, 0) * scales, _halves(b, 2) * minima


def _q4_k(b) -> torch.Tensor:
    scales, minima = _scales_and_minima(b)
    return _less(_scaled(_planes(b[:, 16:], 32, 4), scales), minima)


def _q5_k(b) -> torch.Tensor:
    scales, minima = _scales_and_minima(b)
    codes = _planes(b[:, 48:], 32, 4) | (_planes(b[:, 16:48], 32, 1) << 4)
    return _less(_scaled(codes, scales), minima)


def _q6_k(b) -> torch.Tensor:
    codes = _planes(b[:, :128], 64, 4) | (_planes(b[:, 128:192], 32, 2) << 4)
    return _scaled(codes.float() - 32, _halves(b, 208) * b[:, 192:208].view(torch.int8))


def _tq1_0(b) -> torch.Tensor:
    parts = []
    for part, width, count in ((b[:, :32], 32, 5), (b[:, 32:48], 16, 5), (b[:, 48:52], 4, 4)):
        powers = torch.tensor([3**i for i in range(count)], dtype=torch.uint8, device=b.device).view(-1, 1)
        parts.append((part.unflatten(1, (-1, 1, width)) * powers).flatten(1))
    return _halves(b, 52) * (((torch.cat(parts, dim=1).int() * 3) >> 8) - 1)


def _tq2_0(b) -> torch.Tensor:
    return _halves(b, 64) * (_planes(b[:, :64], 32, 2).float() - 1)


def _iq4_nl(b) -> torch.Tensor:
    return _halves(b, 0) * _chosen(_IQ4, _planes(b[:, 2:], 16, 4))


def _iq4_xs(b) -> torch.Tensor:
    low = (_shifted(b[:, 4:8], (0, 4)) & 15).flatten(1)
    high = (_shifted(_words(b[:, 2:4], torch.int16), range(0, 16, 2)) & 3).flatten(1)
    scales = (low | (high << 4)).float() - 32
    return _scaled(_chosen(_IQ4, _planes(b[:, 8:], 16, 4)), _halves(b, 0) * scales)


def _mxfp4(b) -> torch.Tensor:
    exponents = b[:, :1].int()
    bits = torch.where(exponents < 2, 0x200000 << exponents, (exponents - 1) << 23)
    return bits.view(torch.float32) * _chosen(_E2M1, _planes(b[:, 1:], 16, 4))


def _nvfp4(b) -> torch.Tensor:
    stored = b[:, :4]
    exponents, mantissas = ((stored >> 3) & 15).float(), (stored & 7).float()
    normal = (1 + mantissas / 8) * torch.exp2(exponents - 7)
    scales = torch.where(exponents == 0, mantissas * 2**-9, normal) * 0.5
    return _scaled(_chosen(_E2M1, _planes(b[:, 4:], 8, 4)), scales.masked_fill(stored == 127, 0))


@lru_cache
def _quants(name) -> Any:
    """Return gguf's class of a type, with its grid."""
    from gguf import quants  # where it is needed: most models have no such type

    found = getattr(quants, name)
    found.init_grid()
    return found


def _entries(name, places) -> torch.Tensor:
    """Return entries [n, places, 4 or 8] of a type's grid."""
    grid = torch.from_numpy(_quants(name).grid.reshape(_quants(name).grid_shape))
    return grid.to(places.device)[places.long()]


def _negated(entries, is_negative) -> torch.Tensor:
    """Change the signs of entries [n, places, width] where bits [n, values] say so."""
    return entries.flatten(1) * (1 - 2 * is_negative.float())


def _signs(places) -> torch.Tensor:
    """Return the signs, as bits, at places [n, count] of the table of 128: [n, 8 * count]."""
    table = torch.from_numpy(np.frombuffer(_quants("IQ2_XXS").ksigns, dtype=np.uint8).copy())
    return _bits(table.to(places.device)[places])


def _half_steps(b, scales, unit) -> torch.Tensor:
    """Return d * (s + a half) * a unit."""
    return _halves(b, 0) * (0.5 + scales.float()) * unit


def _iq2_xxs(b) -> torch.Tensor:
    pairs = b[:, 2:].unflatten(1, (8, 8))  # four places and a word of every 32 values
    words = _words(pairs[..., 4:], torch.int32).flatten(1)
    signs = _signs((_shifted(words, (0, 7, 14, 21)) & 127).flatten(1))
    values = _negated(_entries("IQ2_XXS", pairs[..., :4].flatten(1)), signs)
    return _scaled(values, _half_steps(b, words >> 28, 0.25))


def _iq2_xs(b) -> torch.Tensor:
    words = _words(b[:, 2:66], torch.int16)
    values = _negated(_entries("IQ2_XS", words & 511), _signs(words >> 9))
    return _scaled(values, _half_steps(b, (_shifted(b[:, 66:], (0, 4)) & 15).flatten(1), 0.25))


def _iq2_s(b) -> torch.Tensor:
    places = b[:, 2:34].int() | ((_shifted(b[:, 66:74], (0, 2, 4, 6)) & 3).flatten(1).int() << 8)
    values = _negated(_entries("IQ2_S", places), _bits(b[:, 34:66]))
    return _scaled(values, _half_steps(b, (_shifted(b[:, 74:], (0, 4)) & 15).flatten(1), 0.25))


def _iq3_xxs(b) -> torch.Tensor:
    words = _words(b[:, 66:], torch.int32)
    signs = _signs((_shifted(words, (0, 7, 14, 21)) & 127).flatten(1))
    return _scaled(_negated(_entries("IQ3_XXS", b[:, 2:66]), signs), _half_steps(b, words >> 28, 0.5))


def _iq3_s(b) -> torch.Tensor:
    places = b[:, 2:66].int() | (_bits(b[:, 66:74]).int() << 8)
    scales = 1 + 2 * (_shifted(b[:, 106:], (0, 4)) & 15).flatten(1)
    return _scaled(_negated(_entries("IQ3_S", places), _bits(b[:, 74:106])), _halves(b, 0) * scales)


def _shifts(is_negative) -> torch.Tensor:
    return _SHIFT_OF_GRID * (1 - 2 * is_negative.float())


def _iq1_s(b) -> torch.Tensor:
    words = _words(b[:, 34:], torch.int16)
    places = b[:, 2:34].int() | ((_shifted(words, (0, 3, 6, 9)) & 7).flatten(1) << 8)
    values = _less(_entries("IQ1_S", places).flatten(1), -_shifts(words >> 15))
    return _scaled(values, _halves(b, 0) * (2 * ((words >> 12) & 7) + 1))


def _iq1_m(b) -> torch.Tensor:
    words = _words(b[:, 48:], torch.int16)  # [n, 4], of which the upper bits are a half
    parts = words >> 12
    half = parts[:, 0] | parts[:, 1] << 4 | parts[:, 2] << 8 | parts[:, 3] << 12
    scale = (half - ((half >> 15) << 16)).to(torch.int16).view(torch.float16).float().unsqueeze(1)
    nibbles = (_shifted(b[:, 32:48], (0, 4)) & 15).flatten(1)
    places = b[:, :32].int() | ((nibbles & 7).int() << 8)
    values = _less(_entries("IQ1_M", places).flatten(1), -_shifts(nibbles >> 3))
    return _scaled(values, scale * (2 * (_shifted(words, (0, 3, 6, 9)) & 7).flatten(1) + 1))


_VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "q8_0": _q8_0, "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q2_k": _q2_k, "q3_k": _q3_k,
    "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k, "tq1_0": _tq1_0, "tq2_0": _tq2_0, "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs, "iq1_s": _iq1_s, "iq1_m": _iq1_m, "iq2_xxs": _iq2_xxs, "iq2_xs": _iq2_xs, "iq2_s": _iq2_s,
    "iq3_xxs": _iq3_xxs, "iq3_s": _iq3_s, "ggml_mxfp4": _mxfp4, "ggml_nvfp4": _nvfp4,
}  # fmt: skip
