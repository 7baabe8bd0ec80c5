"""GGML's blocks in registers: the values of `moeflow.kernels.quantization.ggml_values`, bit for bit.

A product of scales and a code has at most 24 bits, so that float32 holds it exactly: a compiler may join it with the
subtraction of a minimum, or not.

Rows of most types begin at even addresses and no better ones. Codes are loaded as bytes, which Triton joins where the
constants of a matrix prove more: 16 at once of q4_k and q5_k, 8 of iq4_xs and q5_1, 4 of q2_k and q4_1, 1 of
ggml_mxfp4, 2 of the others. Halves and words lie at multiples of their size.

Capitals are compile-time constants (`MatrixPlan.constants`); `at` are the pointers to blocks [R, B], `here` tells which
of them are there, `part` [1, B] which 32 of a block's 256 values are meant.
"""

import triton
import triton.language as tl
from moeflow.kernels.triton.dequantize import typed


def _words(values) -> tl.constexpr:
    """Return 16 small numbers as the bytes of four int32."""
    raw = bytes(value & 255 for value in values)
    return tl.constexpr(tuple(int.from_bytes(raw[at : at + 4], "little", signed=True) for at in range(0, 16, 4)))


_E2M1 = _words((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))  # doubled
_IQ4 = _words((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))


@triton.jit
def load_blocks(
    record,
    rows,
    blocks,
    N: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    CODES_AT: tl.constexpr,
):
    """Load the values of some runs of 32 in features.

    Args:
        record: pointer to an expert's bytes.
        rows: [R], rows of the matrix; those from N on are zeros.
        blocks: [B], numbers of runs of 32, each a block or an eighth of one; likewise.

    Returns:
        [R, B, 32] float32.
    """
    here = (rows < N)[:, None] & (blocks * 32 < K)[None, :]
    first = rows[:, None] * (K // GROUP * BLOCK_BYTES) + (blocks // (GROUP // 32) * BLOCK_BYTES)[None, :]
    at = record + CODES_AT + first
    part = (blocks % (GROUP // 32))[None, :]
    if KIND == "q8_0":
        codes = _bytes(at, here, 2 + _places()).to(tl.int8).to(tl.float32)
        values = _halves(at, here)[:, :, None] * codes
    elif KIND == "q4_0":
        values = _halves(at, here)[:, :, None] * (_nibbles(at + 2, here) - 8).to(tl.float32)
    elif KIND == "q4_1":
        values = _halves(at, here)[:, :, None] * _nibbles(at + 4, here).to(tl.float32)
        values += _halves(at + 2, here)[:, :, None]
    elif KIND == "q5_0":
        codes = _nibbles(at + 6, here) | _fifth_bits(at + 2, here)
        values = _halves(at, here)[:, :, None] * (codes - 16).to(tl.float32)
    elif KIND == "q5_1":
        codes = _nibbles(at + 8, here) | _fifth_bits(at + 4, here)
        values = _halves(at, here)[:, :, None] * codes.to(tl.float32)
        values += _halves(at + 2, here)[:, :, None]
    elif KIND == "q2_k":
        values = _q2_k(at, here, part)
    elif KIND == "q3_k":
        values = _q3_k(at, here, part)
    elif KIND == "q4_k":
        scales, minima = _scales_and_minima(at, here, part)
        values = _q4_k_codes(at + 16, here, part).to(tl.float32) * scales[:, :, None] - minima[:, :, None]
    elif KIND == "q5_k":
        scales, minima = _scales_and_minima(at, here, part)
        fifth = ((_bytes(at, here, 16 + _places()) >> part[:, :, None]) & 1) << 4
        codes = _q4_k_codes(at + 48, here, part) | fifth
        values = codes.to(tl.float32) * scales[:, :, None] - minima[:, :, None]
    elif KIND == "q6_k":
        values = _q6_k(at, here, part)
    elif KIND == "iq4_nl":
        values = _halves(at, here)[:, :, None] * _chosen(_nibbles(at + 2, here), _IQ4)
    elif KIND == "iq4_xs":
        values = _iq4_xs(at, here, part)
    else:
        tl.static_assert(KIND == "ggml_mxfp4")
        exponents = tl.load(at, mask=here, other=0).to(tl.uint32)
        bits = tl.where(exponents < 2, 0x200000 << exponents, (exponents - 1) << 23)  # half of 2^(exponent - 127)
        scales = bits.to(tl.uint32).to(tl.float32, bitcast=True)
        values = scales[:, :, None] * _chosen(_nibbles(at + 1, here), _E2M1)
    return values


@triton.jit
def _places():
    return tl.arange(0, 32)[None, None, :]


@triton.jit
def _bytes(at, here, places):
    """Load bytes at `places` [1, B or 1, V] of blocks. Returns [R, B, V] int32."""
    return tl.load(at[:, :, None] + places, mask=here[:, :, None], other=0).to(tl.int32)


@triton.jit
def _halves(at, here):
    """Load the half at each of some pointers [R, B] as float32."""
    return tl.load(typed(at, "F16"), mask=here, other=0.0).to(tl.float32)


@triton.jit
def _nibbles(at, here):
    """Load 16 bytes with two codes each: the first 16 values in the low halves. Returns [R, B, 32] int32."""
    return (_bytes(at, here, _places() % 16) >> (_places() // 16 * 4)) & 15


@triton.jit
def _fifth_bits(at, here):
    """Load 32 bits, each of which is a code's fifth. Returns [R, B, 32] int32."""
    low = tl.load(typed(at, "U16"), mask=here, other=0).to(tl.int32)
    high = tl.load(typed(at + 2, "U16"), mask=here, other=0).to(tl.int32)
    return (((low | (high << 16))[:, :, None] >> _places()) & 1) << 4


@triton.jit
def _chosen(codes, WORDS: tl.constexpr):
    """Return the entries at codes [..] of a table (`_words`) as float32."""
    low = tl.where(codes < 4, WORDS[0], WORDS[1])
    high = tl.where(codes < 12, WORDS[2], WORDS[3])
    words = tl.where(codes < 8, low, high)
    return ((words << (24 - 8 * (codes & 3))) >> 24).to(tl.float32)


@triton.jit
def _scaled(codes, scales):
    """Multiply codes [R, B, 32] with the scales [R, B, 2] of their halves."""
    halves = tl.reshape(codes, [codes.shape[0], codes.shape[1], 2, 16]) * scales[:, :, :, None]
    return tl.reshape(halves, [codes.shape[0], codes.shape[1], 32])


@triton.jit
def _halves_of(part):
    """Return the numbers [1, B, 2] of a block's stretches of 16 values."""
    return part[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]


@triton.jit
def _two_bits(at, here, part):
    """Load codes of two bits, 128 values in 32 bytes. Returns [R, B, 32] int32."""
    places = (part // 4 * 32)[:, :, None] + _places()
    return (_bytes(at, here, places) >> (part % 4 * 2)[:, :, None]) & 3


@triton.jit
def _q2_k(at, here, part):
    packed = _bytes(at, here, _halves_of(part))
    scales = _halves(at + 80, here)[:, :, None] * (packed & 15).to(tl.float32)
    minima = _halves(at + 82, here)[:, :, None] * (packed >> 4).to(tl.float32)
    codes = _two_bits(at + 16, here, part).to(tl.float32)
    halves = tl.reshape(codes, [codes.shape[0], codes.shape[1], 2, 16])
    halves = halves * scales[:, :, :, None] - minima[:, :, :, None]
    return tl.reshape(halves, [codes.shape[0], codes.shape[1], 32])


@triton.jit
def _q3_k(at, here, part):
    number = _halves_of(part)
    low = (_bytes(at, here, 96 + number % 8) >> (number // 8 * 4)) & 15
    high = (_bytes(at, here, 104 + number % 4) >> (number // 4 * 2)) & 3
    scales = _halves(at + 108, here)[:, :, None] * ((low | (high << 4)) - 32).to(tl.float32)
    is_third = (_bytes(at, here, _places()) >> part[:, :, None]) & 1
    return _scaled((_two_bits(at + 32, here, part) + 4 * is_third - 4).to(tl.float32), scales)


@triton.jit
def _scales_and_minima(at, here, part):
    """Return d * s and m * s' of q4_k and q5_k, [R, B] float32."""
    words, shift = typed(at, "U32"), part % 4 * 8
    low = tl.load(words + 1, mask=here, other=0).to(tl.int32) >> shift
    middle = tl.load(words + 2, mask=here, other=0).to(tl.int32) >> shift
    both = tl.load(words + 3, mask=here, other=0).to(tl.int32) >> shift
    scales = tl.where(part < 4, low & 63, (both & 15) | ((low >> 2) & 48))
    minima = tl.where(part < 4, middle & 63, ((both >> 4) & 15) | ((middle >> 2) & 48))
    return _halves(at, here) * scales.to(tl.float32), _halves(at + 2, here) * minima.to(tl.float32)


@triton.jit
def _q4_k_codes(at, here, part):
    """Load codes of four bits, 64 values in 32 bytes. Returns [R, B, 32] int32."""
    return (_bytes(at, here, (part // 2 * 32)[:, :, None] + _places()) >> (part % 2 * 4)[:, :, None]) & 15


@triton.jit
def _q6_k(at, here, part):
    scales = _bytes(at, here, 192 + _halves_of(part)).to(tl.int8).to(tl.float32) * _halves(at + 208, here)[:, :, None]
    low = _bytes(at, here, (part // 4 * 64 + part % 2 * 32)[:, :, None] + _places())
    low = (low >> (part % 4 // 2 * 4)[:, :, None]) & 15
    return _scaled(((low | (_two_bits(at + 128, here, part) << 4)) - 32).to(tl.float32), scales)


@triton.jit
def _iq4_xs(at, here, part):
    low = (tl.load(at + 4 + part // 2, mask=here, other=0).to(tl.int32) >> (part % 2 * 4)) & 15
    high = (tl.load(typed(at + 2, "U16"), mask=here, other=0).to(tl.int32) >> (part * 2)) & 3
    scales = _halves(at, here) * ((low | (high << 4)) - 32).to(tl.float32)
    return scales[:, :, None] * _chosen(_nibbles(at + 8 + part * 16, here), _IQ4)
