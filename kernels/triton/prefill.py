"""Product for many tokens, grouped by expert: tiles of tokens times tiles of a matrix dequantised in registers.

A tile's expert is found on the device from the offsets, so nothing waits for the host.
"""

import torch

import triton
import triton.language as tl
from moeflow.kernels.triton.activation import activate, rows_of_features
from moeflow.kernels.triton.block_values import load_blocks
from moeflow.kernels.triton.decode import record_at
from moeflow.kernels.triton.dequantize import (
    INTERPRETED,
    load_bias,
    load_codes,
    load_scales,
    rounded,
    run_values,
)
from moeflow.kernels.triton.lossless_values import load_lossless, load_tops
from moeflow.kernels.triton.matrix import EXACT_TILE_TOKENS, MatrixPlan


def multiply_groups(
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    arena: torch.Tensor,
    locations: torch.Tensor,
    offsets: torch.Tensor,
    plan: MatrixPlan,
    step: dict,
    *,
    num_entries: int,
    block_tokens: int,
    sources: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> None:
    """Multiply a matrix of each expert with its tokens, add the bias, apply the activation.

    Args:
        inputs: [rows, K], contiguous; weights are rounded to its dtype.
        outputs: [rows, N] ([rows, N / 2] with a gate), contiguous, any float dtype; written.
        arena: uint8 [num_slots, slot_bytes], from which locations count.
        locations: int32 [E], where each expert lies; -1 leaves its outputs as they are.
        offsets: int32 [E + 1], where each expert's entries begin among all.
        plan: the matrix.
        step: constants of the activation (`triton.activation.constants`).
        num_entries: S, entries in all.
        block_tokens: entries of a tile (fewer in float32); bits may depend on it.
        sources: int32 [S], row of `inputs` of each entry; its own number without it.
        places: int32 [S], row of `outputs` of each entry; its own number without it.
    """
    num_experts = locations.numel()
    if num_entries == 0 or num_experts == 0:
        return
    is_exact = inputs.dtype == torch.float32
    block_rows, blocks = plan.prefill_blocks(is_exact=is_exact)
    block_tokens = min(block_tokens, EXACT_TILE_TOKENS) if is_exact else block_tokens
    num_tiles = min(num_entries, num_entries // block_tokens + num_experts)
    with torch.cuda.device_of(inputs):
        _multiply_groups[(num_tiles, triton.cdiv(plan.num_rows, block_rows))](
            inputs,
            outputs,
            arena,
            locations,
            offsets,
            locations if sources is None else sources,
            locations if places is None else places,
            num_experts,
            HAS_SOURCES=sources is not None,
            HAS_PLACES=places is not None,
            BLOCK_TOKENS=block_tokens,
            BLOCK_ROWS=block_rows,
            BLOCKS=blocks,
            **plan.constants(),
            **step,
            num_warps=4 if block_tokens < 64 else 8,
            enable_fp_fusion=True,
        )


@triton.jit
def _find_tile(offsets, num_experts, tile, BLOCK_TOKENS: tl.constexpr, EXPERTS: tl.constexpr = 256):
    """Return (expert, first entry, end of the expert's entries); expert is -1 for a surplus tile.

    `EXPERTS` experts are looked at at once; their number is no constant, so that every call runs one compiled kernel.
    """
    number, first, end, before = 0, 0, 0, 0
    for first_expert in range(0, num_experts, EXPERTS):
        experts = first_expert + tl.arange(0, EXPERTS)
        begins = tl.load(offsets + experts, mask=experts < num_experts, other=0)
        ends = tl.load(offsets + experts + 1, mask=experts < num_experts, other=0)
        tiles = (ends - begins + BLOCK_TOKENS - 1) // BLOCK_TOKENS
        last_tiles = before + tl.cumsum(tiles, 0)
        first_tiles = last_tiles - tiles
        is_it = (first_tiles <= tile) & (tile < last_tiles)  # true of one expert at most
        number += tl.sum(tl.where(is_it, experts + 1, 0), 0)
        first += tl.sum(tl.where(is_it, begins + (tile - first_tiles) * BLOCK_TOKENS, 0), 0)
        end += tl.sum(tl.where(is_it, ends, 0), 0)
        before += tl.sum(tiles, 0)
    return number - 1, first, end


@triton.jit(
    do_not_specialize=("num_experts",), do_not_specialize_on_alignment=("locations", "offsets", "sources", "places")
)
def _multiply_groups(
    inputs,
    outputs,
    arena,
    locations,
    offsets,
    sources,
    places,
    num_experts,
    N: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    PLANES: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    CODES_AT: tl.constexpr,
    SCALE_AT: tl.constexpr,
    ZERO_AT: tl.constexpr,
    BIAS_AT: tl.constexpr,
    BIAS_DTYPE: tl.constexpr,
    TOP_AT: tl.constexpr,
    ESCAPES_AT: tl.constexpr,
    NUM_ESCAPES: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    ALPHA: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    ACTIVATED_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    HAS_SOURCES: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    expert, first_entry, end = _find_tile(offsets, num_experts, tl.program_id(0), BLOCK_TOKENS)
    if expert < 0:
        return
    location = tl.load(locations + expert)
    if location == -1:
        return
    record = record_at(arena, location)
    entries = first_entry + tl.arange(0, BLOCK_TOKENS)
    is_entry = entries < end
    source = tl.load(sources + entries, mask=is_entry, other=0) if HAS_SOURCES else entries
    x = inputs + source.to(tl.int64)[:, None] * K
    features = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows = rows_of_features(features, N, GATE)
    WIDTH: tl.constexpr = BLOCKS * (32 // PLANES)  # in features of one run
    sums = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
    tops = rows
    if KIND == "lossless":
        tops = load_tops(record, rows, N, TOP_AT)
    for first in range(0, (K + 31) // 32, BLOCKS):
        blocks = first + tl.arange(0, BLOCKS)
        if KIND == "lossless":
            codes = load_lossless(
                record, rows, blocks, tops, N, K, PADDED_K, CODES_AT, ESCAPES_AT, NUM_ESCAPES, SEARCH_STEPS
            )
            words = codes
        elif BLOCK_BYTES > 0:
            codes = load_blocks(record, rows, blocks, N, K, KIND, GROUP, BLOCK_BYTES, CODES_AT)
            words = codes
        else:
            codes, words = load_codes(
                record, rows, blocks, N, K, PADDED_K, KIND, BITS, PLANES, DTYPE, IS_TRANSPOSED, CODES_AT
            )
        zeros, scales = blocks, blocks
        if ZERO_AT >= 0:
            zeros = load_scales(record, rows, blocks, N, K, PADDED_K, KIND, GROUP, ZERO_AT)
        if SCALE_AT >= 0:
            scales = load_scales(record, rows, blocks, N, K, PADDED_K, KIND, GROUP, SCALE_AT)
        for plane in tl.static_range(PLANES):
            values = run_values(codes, words, zeros, plane, KIND, BITS, PLANES)  # [R, B, J]
            if SCALE_AT >= 0:
                values *= scales[:, :, None]
            columns = blocks[:, None] * 32 + plane * (32 // PLANES) + tl.arange(0, 32 // PLANES)[None, :]
            if K % 32 != 0:
                values = tl.where((columns < K)[None, :, :], values, 0.0)  # padding may be NaN
            columns = tl.reshape(columns, [WIDTH])
            weights = rounded(tl.reshape(values, [BLOCK_ROWS, WIDTH]), inputs.dtype.element_ty)
            tokens = tl.load(x + columns[None, :], mask=is_entry[:, None] & (columns < K)[None, :], other=0.0)
            if INTERPRETED:  # the interpreter's tl.dot takes bfloat16 for integers
                weights, tokens = weights.to(tl.float32), tokens.to(tl.float32)
            sums = tl.dot(tokens, tl.trans(weights), sums, input_precision="ieee")
    if BIAS_AT >= 0:
        sums += load_bias(record, rows, N, BIAS_AT, BIAS_DTYPE)[None, :]
    place = tl.load(places + entries, mask=is_entry, other=0) if HAS_PLACES else entries
    place = place.to(tl.int64)[:, None]
    if GATE == "none":
        result = activate(sums, sums, ACT, GATE, ALPHA, GATE_LIMIT, ACTIVATED_LIMIT, UP_LIMIT, UP_OFFSET)
        target = outputs + place * N + features[None, :]
        here = is_entry[:, None] & (features < N)[None, :]
    else:
        gate, up = tl.split(tl.reshape(sums, [BLOCK_TOKENS, BLOCK_ROWS // 2, 2]))
        result = activate(gate, up, ACT, GATE, ALPHA, GATE_LIMIT, ACTIVATED_LIMIT, UP_LIMIT, UP_OFFSET)
        features = tl.program_id(1) * (BLOCK_ROWS // 2) + tl.arange(0, BLOCK_ROWS // 2)
        target = outputs + place * (N // 2) + features[None, :]
        here = is_entry[:, None] & (features < N // 2)[None, :]
    tl.store(target, rounded(result, outputs.dtype.element_ty), mask=here)
