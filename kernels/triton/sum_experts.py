"""The second matrix of few tokens and the weighted sum over a token's experts, in one kernel.

A program takes a token and some rows, and its experts one after another in the order of K: the bits are those of
`multiply_pairs` and `combine_pairs`.
"""

import torch

import triton
import triton.language as tl
from moeflow.kernels.triton.decode import PLAIN_NUMBERS, PLAIN_POINTERS, Chosen, find_location, multiply_row, record_at
from moeflow.kernels.triton.dequantize import rounded
from moeflow.kernels.triton.launch import launch
from moeflow.kernels.triton.matrix import MatrixPlan


def multiply_and_sum(
    inputs: torch.Tensor,
    arena: torch.Tensor,
    chosen: Chosen,
    top_k_weights: torch.Tensor,
    plan: MatrixPlan,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply the down matrix of each of a token's experts with its row, weigh and sum the products.

    Args:
        inputs: [T * K, I] float32, contiguous, from `multiply_pairs`.
        arena: uint8 [num_slots, slot_bytes], from which locations count.
        chosen: [T * K], each pair's expert; without one it adds nothing.
        top_k_weights: [T, K], contiguous.
        plan: the down matrix.
        dtype: of the result.

    Returns:
        [T, H].
    """
    num_tokens, top_k = top_k_weights.shape
    sums = torch.empty(num_tokens, plan.num_rows, dtype=dtype, device=inputs.device)
    if num_tokens == 0:
        return sums
    block_rows, blocks = plan.down_blocks()
    launch(
        _multiply_and_sum,
        (num_tokens, triton.cdiv(plan.num_rows, block_rows)),
        (inputs, sums, arena, *chosen.arguments(), top_k_weights),
        (plan, top_k, block_rows, blocks, dtype, top_k_weights.dtype),
        lambda: {"TOP_K": top_k, "BLOCK_ROWS": block_rows, "BLOCKS": blocks, **plan.constants()},
        aligned=(inputs, sums, arena),
    )
    return sums


@triton.jit(do_not_specialize=PLAIN_NUMBERS, do_not_specialize_on_alignment=PLAIN_POINTERS)
def _multiply_and_sum(
    inputs,
    outputs,
    arena,
    chosen,
    chosen_step,
    table,
    num_experts,
    weights,
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
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    token = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for k in range(TOP_K):
        pair = token * TOP_K + k
        location, _ = find_location(chosen, pair, chosen_step, table, num_experts)
        if location != -1:
            sums = multiply_row(
                record_at(arena, location), inputs + pair.to(tl.int64) * K, rows,
                N, K, PADDED_K, KIND, BITS, GROUP, BLOCK_BYTES, PLANES, DTYPE, IS_TRANSPOSED, CODES_AT, SCALE_AT,
                ZERO_AT, BIAS_AT, BIAS_DTYPE, TOP_AT, ESCAPES_AT, NUM_ESCAPES, SEARCH_STEPS, BLOCK_ROWS, BLOCKS,
            )  # fmt: skip
            total += tl.load(weights + pair).to(tl.float32) * sums
    tl.store(outputs + token.to(tl.int64) * N + rows, rounded(total, outputs.dtype.element_ty), mask=rows < N)
