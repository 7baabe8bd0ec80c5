"""The lossless format in registers: bfloat16 values put together from rests, codes and tops, escapes looked up.

The values are those of the bfloat16 matrix, and the blocks too: sums have the same bits. Capitals are compile-time
constants of the matrix (`MatrixPlan.constants`).
"""

import triton
import triton.language as tl
from moeflow.kernels.triton.dequantize import typed


@triton.jit
def load_tops(record, rows, N: tl.constexpr, AT: tl.constexpr):
    """Load the tops of some rows, with the bit that says whether a row has escapes. Returns [R] int32."""
    return tl.load(typed(record + AT, "U16") + rows, mask=rows < N, other=0).to(tl.int32)


@triton.jit
def load_lossless(
    record,
    rows,
    blocks,
    tops,
    N: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    CODES_AT: tl.constexpr,
    ESCAPES_AT: tl.constexpr,
    NUM_ESCAPES: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
):
    """Load the values of some blocks.

    Args:
        record: pointer to an expert's bytes.
        rows: [R], rows of the matrix; those from N on are zeros.
        blocks: [B], numbers of blocks of 32, which are halves of a stored block; likewise.
        tops: [R], from `load_tops`.

    Returns:
        [R, B, 32] float32.
    """
    row, block = rows[:, None, None], blocks[None, :, None]
    value = tl.arange(0, 32)[None, None, :]
    column = block * 32 + value
    here = (row < N) & (column < K)
    part, lane = value // 16, value % 16
    place = 16 * (lane // 4) + 8 * (block % 2) + 2 * (lane % 4) + part
    first = record + CODES_AT + row * (PADDED_K // 64 * 96) + block // 2 * 96
    rests = tl.load(first + place, mask=here, other=0).to(tl.uint32)
    pairs = tl.load(first + 64 + place % 32, mask=here, other=0).to(tl.int32)
    codes = (pairs >> (place // 32 * 4)) & 15
    exponents = tl.where(codes == 15, 0, (tops & 255)[:, None, None] - codes)
    if tl.max(tops, 0) >= 256:  # else no row of this tile has one
        is_escape = here & (codes == 15)
        position = row.to(tl.uint32) * K + column.to(tl.uint32)
        escapes = record + ESCAPES_AT
        count = codes * 0  # of the escapes up to this position
        last = position * 0
        for step in tl.static_range(SEARCH_STEPS):
            further = count + (1 << (SEARCH_STEPS - 1 - step))
            is_stored = is_escape & (further <= NUM_ESCAPES)
            found = tl.load(typed(escapes, "U32") + (further - 1), mask=is_stored, other=0)
            is_here = is_stored & (found <= position)
            count, last = tl.where(is_here, further, count), tl.where(is_here, found, last)
        is_listed = is_escape & (count > 0) & (last == position)
        stored = tl.load(escapes + 4 * NUM_ESCAPES + (count - 1), mask=is_listed, other=0)
        exponents = tl.where(is_listed, stored.to(tl.int32), exponents)
    bits = ((rests & 128) << 24) | (exponents.to(tl.uint32) << 23) | ((rests & 127) << 16)
    return tl.where(here, bits.to(tl.float32, bitcast=True), 0.0)
