"""Products for few tokens: a token's row times an expert's matrix, read once from its slot, dequantised in registers.

Locations of experts are given, or looked up on the device from expert numbers, so nothing waits for the host. Sums are
float32 and always in the same order: a pair's result has the same bits whatever other pairs are in the call.
"""

from typing import NamedTuple

import torch

import triton
import triton.language as tl
from moeflow.kernels.triton.activation import activate, rows_of_features
from moeflow.kernels.triton.block_values import load_blocks
from moeflow.kernels.triton.dequantize import (
    load_bias,
    load_codes,
    load_scales,
    run_values,
)
from moeflow.kernels.triton.launch import launch
from moeflow.kernels.triton.lossless_values import load_lossless, load_tops
from moeflow.kernels.triton.matrix import MatrixPlan

# Arguments whose value or alignment must not make another kernel: a model would compile one for each it meets.
PLAIN_NUMBERS = ("chosen_step", "num_experts", "layer", "pairs_per_row")
PLAIN_POINTERS = ("chosen", "table", "missed", "tokens", "weights")


class Chosen(NamedTuple):
    """Which expert each pair has: locations, or expert numbers and the table in which the kernel looks those up.

    Args:
        numbers: int32 [P], locations, -1 for none; with a table int32 or int64 [P], expert numbers.
        table: int32 [E], location of each expert, -1 where it is absent; numbers outside 0 .. E - 1 mean no expert.
        missed: int32 [num_layers]; 1 is written at `layer` where an expert is absent.
        layer: see `missed`.
    """

    numbers: torch.Tensor
    table: torch.Tensor | None = None
    missed: torch.Tensor | None = None
    layer: int = 0

    def words(self) -> torch.Tensor:
        """Return the numbers as int32; of int64 the low half, which comes first, counts."""
        return self.numbers.view(torch.int32)

    def arguments(self) -> tuple:
        """Return what `find_location` takes: chosen, chosen_step, table, num_experts."""
        words, step = self.words(), self.numbers.element_size() // 4
        return (words, step, words, -1) if self.table is None else (words, step, self.table, self.table.numel())


def multiply_pairs(
    inputs: torch.Tensor,
    arena: torch.Tensor,
    chosen: Chosen,
    plan: MatrixPlan,
    step: dict,
    blocks: tuple[int, int],
    *,
    tokens: torch.Tensor | None = None,
    pairs_per_row: int = 1,
) -> torch.Tensor:
    """Multiply a matrix of each pair's expert with its row, add the bias, apply the activation.

    Args:
        inputs: [rows, K], contiguous.
        arena: uint8 [num_slots, slot_bytes], from which locations count.
        chosen: each pair's expert; without one it gives zeros.
        plan: the matrix.
        step: constants of the activation (`triton.activation.constants`).
        blocks: rows and blocks of 32 in features of a step (`MatrixPlan.decode_blocks`, `MatrixPlan.down_blocks`).
        tokens: int32 [P], row of each pair; without it pair p has row p // pairs_per_row.
        pairs_per_row: see `tokens`.

    Returns:
        [P, N] float32, [P, N / 2] with a gate.
    """
    num_pairs, width = chosen.numbers.numel(), plan.num_rows // (1 if step["GATE"] == "none" else 2)
    outputs = torch.empty(num_pairs, width, dtype=torch.float32, device=inputs.device)
    if num_pairs == 0:
        return outputs
    numbers = chosen.arguments()
    launch(
        _multiply_pairs,
        (num_pairs, triton.cdiv(plan.num_rows, blocks[0])),
        (
            inputs,
            outputs,
            arena,
            *numbers,
            numbers[0] if chosen.missed is None else chosen.missed,
            chosen.layer,
            numbers[0] if tokens is None else tokens,
            pairs_per_row if tokens is None else 0,
        ),
        (plan, id(step), blocks, inputs.dtype),
        lambda: {"BLOCK_ROWS": blocks[0], "BLOCKS": blocks[1], **plan.constants(), **step},
        aligned=(inputs, outputs, arena),
    )
    return outputs


@triton.jit
def find_location(chosen, pair, chosen_step, table, num_experts):
    """Return a pair's location, -1 without one, and whether that is since its expert is absent from `table`."""
    number = tl.load(chosen + pair * chosen_step)
    is_expert = (number >= 0) & (number < num_experts)  # none where num_experts is -1: numbers are locations
    looked_up = tl.load(table + number, mask=is_expert, other=-1)
    return tl.where(num_experts < 0, number, looked_up), is_expert & (looked_up == -1)


@triton.jit
def record_at(arena, location):
    """Return the pointer to the record at a location: units of 64 bytes from the arena's base, either way."""
    return arena + location.to(tl.int64) * 64


@triton.jit
def multiply_row(
    record,
    x,
    rows,
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
    BLOCK_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Multiply some rows of a matrix with one vector and add the bias.

    Args:
        record: pointer to an expert's bytes.
        x: pointer to the vector, K floats.
        rows: [BLOCK_ROWS], rows of the matrix; those from N on give zeros.

    Returns:
        [BLOCK_ROWS] float32.
    """
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
        elif BLOCK_BYTES > 0:
            codes = load_blocks(record, rows, blocks, N, K, KIND, GROUP, BLOCK_BYTES, CODES_AT)
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
    return sums


@triton.jit(do_not_specialize=PLAIN_NUMBERS, do_not_specialize_on_alignment=PLAIN_POINTERS)
def _multiply_pairs(
    inputs,
    outputs,
    arena,
    chosen,
    chosen_step,
    table,
    num_experts,
    missed,
    layer,
    tokens,
    pairs_per_row,
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
    BLOCK_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    pair = tl.program_id(0)
    features = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows = rows_of_features(features, N, GATE)
    location, is_absent = find_location(chosen, pair, chosen_step, table, num_experts)
    tl.store(missed + layer, 1, mask=is_absent & (tl.program_id(1) == 0))
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    if location != -1:
        row = tl.load(tokens + pair, mask=pairs_per_row == 0, other=0)
        if pairs_per_row > 0:
            row = pair // pairs_per_row
        sums = multiply_row(
            record_at(arena, location), inputs + row.to(tl.int64) * K, rows,
            N, K, PADDED_K, KIND, BITS, GROUP, BLOCK_BYTES, PLANES, DTYPE, IS_TRANSPOSED, CODES_AT, SCALE_AT, ZERO_AT,
            BIAS_AT, BIAS_DTYPE, TOP_AT, ESCAPES_AT, NUM_ESCAPES, SEARCH_STEPS, BLOCK_ROWS, BLOCKS,
        )  # fmt: skip
    if GATE == "none":
        result = activate(sums, sums, ACT, GATE, ALPHA, GATE_LIMIT, ACTIVATED_LIMIT, UP_LIMIT, UP_OFFSET)
        tl.store(outputs + pair.to(tl.int64) * N + features, result, mask=features < N)
    else:
        gate, up = tl.split(tl.reshape(sums, [BLOCK_ROWS // 2, 2]))
        result = activate(gate, up, ACT, GATE, ALPHA, GATE_LIMIT, ACTIVATED_LIMIT, UP_LIMIT, UP_OFFSET)
        first_feature = tl.program_id(1) * (BLOCK_ROWS // 2)
        features = first_feature + tl.arange(0, BLOCK_ROWS // 2)
        tl.store(outputs + pair.to(tl.int64) * (N // 2) + features, result, mask=features < N // 2)
