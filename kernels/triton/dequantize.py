"""Dequantisation of packed blocks of 32 values in registers, shared by the Triton kernels of every format.

A tile is [R rows of a matrix, B blocks of 32 in features, J values]: the values of a block are taken in `PLANES` runs
of J = 32 / PLANES neighbours, one shift of the bytes a run (`moeflow.kernels.quantization.formats`), so every byte is
loaded once.
All is bit arithmetic on uint8 and uint32: no GPU needs to know fp8 or fp4. Capitals are compile-time constants of the
matrix (`MatrixPlan.constants`).
"""

import os

import triton
import triton.language as tl

# Triton's own switch, read when a kernel is defined: kernels run in numpy on CPU tensors.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def typed(pointer, DTYPE: tl.constexpr):
    """Return a byte pointer as one to values of a safetensors dtype."""
    if DTYPE == "F32":
        result = pointer.to(tl.pointer_type(tl.float32))
    elif DTYPE == "BF16":
        result = pointer.to(tl.pointer_type(tl.bfloat16))
    elif DTYPE == "F16":
        result = pointer.to(tl.pointer_type(tl.float16))
    elif DTYPE == "U16":
        result = pointer.to(tl.pointer_type(tl.uint16))
    else:
        tl.static_assert(DTYPE == "U32")
        result = pointer.to(tl.pointer_type(tl.uint32))
    return result


@triton.jit
def load_codes(
    record,
    rows,
    blocks,
    N: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    CODES_AT: tl.constexpr,
):
    """Load the stored codes of some blocks.

    Args:
        record: pointer to an expert's bytes.
        rows: [R], rows of the matrix; those from N on load nothing.
        blocks: [B], numbers of blocks of 32; likewise.

    Returns:
        Bytes [R, B, J] ([R, B, 16] in mxfp4; values, in a float format), and uint32 words [R, B] of those formats that
        have single bits: two times the same where there is but one of them.
    """
    codes_pointer = record + CODES_AT
    here = (rows < N)[:, None] & (blocks * 32 < K)[None, :]
    row, block = rows[:, None, None], blocks[None, :, None]
    place = tl.arange(0, 16 if KIND == "mxfp4" else 32 // PLANES)[None, None, :]
    if KIND == "float":
        column = block * 32 + place
        places = column * N + row if IS_TRANSPOSED else row * K + column
        mask = here[:, :, None] if K % 32 == 0 else here[:, :, None] & (column < K)
        codes = tl.load(typed(codes_pointer, DTYPE) + places, mask=mask, other=0.0)
        words = codes
    elif BITS == 1:
        words = tl.load(
            typed(codes_pointer, "U32") + rows[:, None] * (PADDED_K // 32) + blocks[None, :], mask=here, other=0
        )
        codes = words
    else:
        places = row * (PADDED_K * BITS // 8) + block * (4 * BITS) + place
        codes = tl.load(codes_pointer + places, mask=here[:, :, None], other=0)
        words = codes
        if BITS == 3:
            first = rows[:, None] * (PADDED_K * 3 // 32) + blocks[None, :] * 3 + 2  # in words: 12 bytes a block
            words = tl.load(typed(codes_pointer, "U32") + first, mask=here, other=0)
    return codes, words


@triton.jit
def run_values(codes, words, zeros, PLANE: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr):
    """Return one run of every loaded block as numbers, not yet scaled.

    Args:
        codes: from `load_codes`; likewise words. Floats are the numbers themselves.
        zeros: [R, B] float32, of asymmetric formats.

    Returns:
        [R, B, J] float32.
    """
    if codes.dtype.is_floating():
        values = codes.to(tl.float32)
    elif KIND == "int":
        values = codes.to(tl.int8, bitcast=True).to(tl.float32)
    elif KIND == "fp8":
        values = _e4m3(codes.to(tl.uint32))
    elif KIND == "mxfp4":
        pairs = tl.join(_e2m1(codes.to(tl.uint32)), _e2m1((codes >> 4).to(tl.uint32)))  # neighbours share a byte
        values = tl.reshape(pairs, [codes.shape[0], codes.shape[1], 32])
    elif KIND == "sign":
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :].to(tl.uint32)) & 1
        values = tl.where(bits == 1, 1.0, -1.0)
    else:
        low = (codes >> ((2 if BITS == 3 else BITS) * PLANE)) & (3 if BITS < 4 else 15)
        if BITS == 3:
            shifts = (tl.arange(0, 8) + 8 * PLANE)[None, None, :].to(tl.uint32)
            low = low.to(tl.uint32) | (((words[:, :, None] >> shifts) & 1) << 2)
        values = low.to(tl.float32) - zeros[:, :, None]
    return values


@triton.jit
def load_scales(
    record,
    rows,
    blocks,
    N: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    AT: tl.constexpr,
):
    """Load the scale (or, with AT of the zeros, the zero) of every block. Returns [R, B] float32."""
    here = (rows < N)[:, None] & (blocks * 32 < K)[None, :]
    group = (blocks * 32 // GROUP)[None, :]
    row = (rows // 128 if KIND == "fp8" else rows)[:, None]
    places = row * (PADDED_K // GROUP) + group
    if KIND == "mxfp4":
        powers = tl.load(record + AT + places, mask=here, other=0).to(tl.uint32)
        bits = tl.where(powers == 0, 1 << 22, powers << 23)  # 2^-127 is below the normal floats
        bits = tl.where(powers == 255, 0x7FC00000, bits)
        scales = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        scales = tl.load(typed(record + AT, "F32" if KIND == "fp8" else "F16") + places, mask=here, other=0.0)
    return scales.to(tl.float32)


@triton.jit
def load_bias(record, rows, N: tl.constexpr, AT: tl.constexpr, DTYPE: tl.constexpr):
    """Load the bias of some rows. Returns [R] float32."""
    return tl.load(typed(record + AT, DTYPE) + rows, mask=rows < N, other=0.0).to(tl.float32)


@triton.jit
def rounded(values, TYPE: tl.constexpr):
    """Round float32 values to the nearest of another float type; the interpreter alone would truncate to bfloat16."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = values.to(tl.uint32, bitcast=True)
        values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return values.to(TYPE)


@triton.jit
def _e4m3(codes):
    """Return fp8 E4M3 bytes (as uint32) as float32."""
    exponent_and_mantissa = codes & 0x7F
    normal = ((exponent_and_mantissa << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where(exponent_and_mantissa < 8, exponent_and_mantissa.to(tl.float32) * 0.001953125, normal)
    magnitude = tl.where(exponent_and_mantissa == 0x7F, float("nan"), magnitude)
    return tl.where(codes >= 0x80, -magnitude, magnitude)


@triton.jit
def _e2m1(codes):
    """Return fp4 E2M1 codes (the low 4 bits of uint32) as float32."""
    exponent_and_mantissa = codes & 7
    normal = ((exponent_and_mantissa << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where(exponent_and_mantissa < 2, exponent_and_mantissa.to(tl.float32) * 0.5, normal)
    return tl.where((codes & 8) != 0, -magnitude, magnitude)
