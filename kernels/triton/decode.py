"""Product for few tokens: a token's row times an expert's matrix, read once from its slot, dequantised in registers.

Slots are looked up in a tensor on the device, so nothing waits for the host. Sums are float32 and always in the same
order: a pair's result has the same bits whatever other pairs are in the call.
"""

import torch

import triton
import triton.language as tl
from moeflow.kernels.triton.activation import activate, rows_of_features
from moeflow.kernels.triton.dequantize import (
    load_bias,
    load_codes,
    load_scales,
    run_values,
)
from moeflow.kernels.triton.lossless_values import load_lossless, load_tops
from moeflow.kernels.triton.matrix import MatrixPlan


def multiply_pairs(
    inputs: torch.Tensor,
    arena: torch.Tensor,
    slots: torch.Tensor,
    plan: MatrixPlan,
    step: dict,
    *,
    tokens: torch.Tensor | None = None,
    pairs_per_row: int = 1,
) -> torch.Tensor:
    """Multiply a matrix of each pair's expert with its row, add the bias, apply the activation.

    Args:
        inputs: [rows, K], contiguous.
        arena: uint8 [num_slots, slot_bytes].
        slots: int32 [P], slot of each pair's expert; -1 makes zeros.
        plan: the matrix.
        step: constants of the activation (`triton.activation.constants`).
        tokens: int32 [P], row of each pair; without it pair p has row p // pairs_per_row.
        pairs_per_row: see `tokens`.

    Returns:
        [P, N] float32, [P, N / 2] with a gate.
    """
    num_pairs, width = slots.numel(), plan.num_rows // (1 if step["GATE"] == "none" else 2)
    outputs = torch.empty(num_pairs, width, dtype=torch.float32, device=inputs.device)
    block_rows, blocks = plan.decode_blocks()
    if num_pairs == 0:
        return outputs
    with torch.cuda.device_of(inputs):
        _multiply_pairs[(num_pairs, triton.cdiv(plan.num_rows, block_rows))](
            inputs,
            outputs,
            arena,
            arena.stride(0),
            slots,
            slots if tokens is None else tokens,
            pairs_per_row,
            HAS_TOKENS=tokens is not None,
            BLOCK_ROWS=block_rows,
            BLOCKS=blocks,
            **plan.constants(),
            **step,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return outputs


@triton.jit
def _multiply_pairs(
    inputs,
    outputs,
    arena,
    slot_bytes,
    slots,
    tokens,
    pairs_per_row,
    N: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
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
    HAS_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    pair = tl.program_id(0)
    features = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows = rows_of_features(features, N, GATE)
    slot = tl.load(slots + pair)
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    if slot >= 0:
        record = arena + slot.to(tl.int64) * slot_bytes
        row = tl.load(tokens + pair) if HAS_TOKENS else pair // pairs_per_row
        x = inputs + row.to(tl.int64) * K
        partial = tl.zeros([BLOCK_ROWS, BLOCKS], tl.float32)
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
            else:
                codes, words = load_codes(
                    record, rows, blocks, N, K, PADDED_K, KIND, BITS, PLANES, DTYPE, IS_TRANSPOSED, CODES_AT
                )
            zeros = partial
            if ZERO_AT >= 0:
                zeros = load_scales(record, rows, blocks, N, K, PADDED_K, KIND, GROUP, ZERO_AT)
            products = tl.zeros([BLOCK_ROWS, BLOCKS], tl.float32)
            for plane in tl.static_range(PLANES):
                values = run_values(codes, words, zeros, plane, KIND, BITS, PLANES)  # [R, B, J]
                columns = blocks[:, None] * 32 + plane * (32 // PLANES) + tl.arange(0, 32 // PLANES)[None, :]
                activations = tl.load(x + columns, mask=columns < K, other=0.0).to(tl.float32)
                if K % 32 != 0:
                    values = tl.where((columns < K)[None, :, :], values, 0.0)  # padding may be NaN
                products += tl.sum(values * activations[None, :, :], 2)
            if SCALE_AT >= 0:
                products *= load_scales(record, rows, blocks, N, K, PADDED_K, KIND, GROUP, SCALE_AT)
            partial += products
        sums = tl.sum(partial, 1)
        if BIAS_AT >= 0:
            sums += load_bias(record, rows, N, BIAS_AT, BIAS_DTYPE)
    if GATE == "none":
        result = activate(sums, sums, ACT, GATE, ALPHA, GATE_LIMIT, ACTIVATED_LIMIT, UP_LIMIT, UP_OFFSET)
        tl.store(outputs + pair.to(tl.int64) * N + features, result, mask=features < N)
    else:
        gate, up = tl.split(tl.reshape(sums, [BLOCK_ROWS // 2, 2]))
        result = activate(gate, up, ACT, GATE, ALPHA, GATE_LIMIT, ACTIVATED_LIMIT, UP_LIMIT, UP_OFFSET)
        first_feature = tl.program_id(1) * (BLOCK_ROWS // 2)
        features = first_feature + tl.arange(0, BLOCK_ROWS // 2)
        tl.store(outputs + pair.to(tl.int64) * (N // 2) + features, result, mask=features < N // 2)
