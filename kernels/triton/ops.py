"""The `torch.library` ops of routed experts on a GPU: what a call checks, and the kernels that it launches.

Ops, so that torch.compile, FakeTensorMode and torch's CUDA sanitizer see every call. Knows one layout at a time, by the
number of its plan. Nothing here waits for the device.
"""

from typing import NamedTuple

import torch

from moeflow.errors import ConfigError
from moeflow.kernels.triton.matrix import MatrixPlan


class ExpertPlan(NamedTuple):
    """What the kernels know of a record layout and its activation.

    Args:
        first: the gate and up matrix, or the up matrix.
        down: the down matrix.
        step: constants of the activation between them (`triton.activation.constants`).
        record_bytes: of the record that they lie in.
    """

    first: MatrixPlan
    down: MatrixPlan
    step: dict
    record_bytes: int


# The ops know a plan by its place here: a graph holds numbers, no objects.
BUILT: list[ExpertPlan] = []
# Tokens of a whole call -> tokens of a tile. Whole calls only: bits must not depend on the resident experts.
_TILE_TOKENS = ((128, 16), (512, 32), (2048, 64))
_LARGEST_TILE = 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prefill_tile(call_tokens: int) -> int:
    """Return how many tokens a tile of `prefill` has in a whole call of so many: bits depend on it."""
    return next((tile for most, tile in _TILE_TOKENS if call_tokens <= most), _LARGEST_TILE)


def _decode(
    hidden_states: torch.Tensor, arena: torch.Tensor, locations: torch.Tensor, top_k_weights: torch.Tensor, number: int
) -> torch.Tensor:
    from moeflow.kernels.triton.decode import Chosen

    _check_decode(hidden_states, arena, locations, top_k_weights, number)
    return _run_whole(BUILT[number], hidden_states, arena, Chosen(locations.reshape(-1)), top_k_weights)


def _lookup(
    hidden_states: torch.Tensor,
    arena: torch.Tensor,
    top_k_index: torch.Tensor,
    table_row: torch.Tensor,
    missed: torch.Tensor,
    layer: int,
    top_k_weights: torch.Tensor,
    number: int,
) -> torch.Tensor:
    from moeflow.kernels.triton.decode import Chosen

    _check_lookup(hidden_states, arena, top_k_index, table_row, missed, layer, top_k_weights, number)
    chosen = Chosen(top_k_index.reshape(-1), table_row.contiguous(), missed, layer)
    return _run_whole(BUILT[number], hidden_states, arena, chosen, top_k_weights)


def _run_whole(plan, hidden_states, arena, chosen, top_k_weights) -> torch.Tensor:
    from moeflow.kernels.triton.decode import multiply_pairs
    from moeflow.kernels.triton.sum_experts import multiply_and_sum

    blocks, top_k = plan.first.decode_blocks(), top_k_weights.shape[1]
    if top_k == 0:
        return torch.zeros_like(hidden_states)
    inner = multiply_pairs(_aligned(hidden_states), arena, chosen, plan.first, plan.step, blocks, pairs_per_row=top_k)
    return multiply_and_sum(inner, arena, chosen, top_k_weights.contiguous(), plan.down, hidden_states.dtype)


def _pairs(
    hidden_states: torch.Tensor, arena: torch.Tensor, tokens: torch.Tensor, locations: torch.Tensor, number: int
) -> torch.Tensor:
    from moeflow.kernels.triton.activation import LINEAR
    from moeflow.kernels.triton.decode import Chosen, multiply_pairs

    _check_pairs(hidden_states, arena, tokens, locations, number)
    plan, chosen = BUILT[number], Chosen(locations.contiguous())
    inner = multiply_pairs(
        _aligned(hidden_states), arena, chosen, plan.first, plan.step, plan.first.decode_blocks(),
        tokens=tokens.contiguous(),
    )  # fmt: skip
    return multiply_pairs(inner, arena, chosen, plan.down, LINEAR, plan.down.down_blocks())


def _prefill(
    hidden_states: torch.Tensor,
    arena: torch.Tensor,
    locations: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    places: torch.Tensor,
    outputs: torch.Tensor,
    number: int,
    call_tokens: int,
) -> None:
    from moeflow.kernels.triton.activation import LINEAR
    from moeflow.kernels.triton.prefill import multiply_groups

    _check_prefill(hidden_states, arena, locations, tokens, offsets, places, outputs, number, call_tokens)
    experts = BUILT[number]
    num_entries, tile = tokens.numel(), prefill_tile(call_tokens)
    inner = hidden_states.new_empty(num_entries, experts.down.in_features)
    locations, offsets = locations.contiguous(), offsets.contiguous()
    multiply_groups(
        _aligned(hidden_states), inner, arena, locations, offsets, experts.first, experts.step,
        num_entries=num_entries, block_tokens=tile, sources=tokens.contiguous(),
    )  # fmt: skip
    multiply_groups(
        inner, outputs, arena, locations, offsets, experts.down, LINEAR,
        num_entries=num_entries, block_tokens=tile, places=places.contiguous(),
    )  # fmt: skip


def _combine(outputs: torch.Tensor, top_k_weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from moeflow.kernels.triton.combine import combine_pairs

    _check_combine(outputs, top_k_weights, dtype)
    return combine_pairs(outputs, top_k_weights, dtype)


def _aligned(tensor) -> torch.Tensor:
    """Return the tensor contiguous, from a multiple of 16 bytes on: other addresses would be another kernel."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _check_decode(hidden_states, arena, locations, top_k_weights, number) -> None:
    _check(BUILT[number], hidden_states, arena)
    _check_numbers(hidden_states, locations)
    if locations.shape != (*hidden_states.shape[:1], locations.shape[-1]):
        raise ConfigError(f"locations are {list(locations.shape)}. Give [T, K] for {len(hidden_states)} tokens.")
    _check_weights(hidden_states, top_k_weights, locations.shape)


def _check_lookup(hidden_states, arena, top_k_index, table_row, missed, layer, top_k_weights, number) -> None:
    _check(BUILT[number], hidden_states, arena)
    _check_numbers(hidden_states, table_row)
    if top_k_index.dtype not in (torch.int64, torch.int32) or top_k_index.device != hidden_states.device:
        raise ConfigError(
            f"expert numbers are {top_k_index.dtype} on {top_k_index.device}. Give int64 or int32 on "
            f"{hidden_states.device}, where the hidden states are."
        )
    if top_k_index.dim() != 2 or len(top_k_index) != len(hidden_states) or table_row.dim() != 1:
        raise ConfigError(
            f"expert numbers are {list(top_k_index.shape)}, locations {list(table_row.shape)}. Give [T, K] for "
            f"{len(hidden_states)} tokens, and one location for each expert."
        )
    if missed.dtype != torch.int32 or missed.dim() != 1 or not missed.is_contiguous() or not 0 <= layer < len(missed):
        raise ConfigError(
            f"flags are {missed.dtype} {list(missed.shape)}, the layer is {layer}. Give contiguous int32 [num_layers] "
            "and a layer from 0 on."
        )
    _check_weights(hidden_states, top_k_weights, top_k_index.shape)


def _check_pairs(hidden_states, arena, tokens, locations, number) -> None:
    _check(BUILT[number], hidden_states, arena)
    _check_numbers(hidden_states, locations, tokens)
    if locations.dim() != 1 or locations.shape != tokens.shape:
        raise ConfigError(
            f"locations are {list(locations.shape)}, tokens {list(tokens.shape)}. Give one of each for a pair."
        )


def _check_prefill(hidden_states, arena, locations, tokens, offsets, places, outputs, number, call_tokens) -> None:
    _check(BUILT[number], hidden_states, arena)
    _check_numbers(hidden_states, locations, tokens, offsets, places)
    if tokens.shape != places.shape or offsets.numel() != locations.numel() + 1:
        raise ConfigError(
            f"{tokens.numel()} tokens, {places.numel()} places and {offsets.numel()} offsets of {locations.numel()} "
            "experts. Give as many places as tokens, and one offset more than experts."
        )
    _check_sums(outputs, hidden_states.device, hidden_states.shape[1])


def _check_combine(outputs, top_k_weights, _) -> None:
    _check_sums(outputs, top_k_weights.device, outputs.shape[-1])
    if top_k_weights.dim() != 2 or top_k_weights.numel() != len(outputs) or not top_k_weights.is_floating_point():
        raise ConfigError(
            f"router weights are {top_k_weights.dtype} {list(top_k_weights.shape)} for {len(outputs)} outputs. Give "
            "floats [T, K] for outputs [T * K, H]."
        )


def _check_weights(hidden_states, top_k_weights, shape) -> None:
    is_right = top_k_weights.shape == shape and top_k_weights.is_floating_point()
    if not is_right or top_k_weights.device != hidden_states.device:
        raise ConfigError(
            f"router weights are {top_k_weights.dtype} {list(top_k_weights.shape)} on {top_k_weights.device}. Give "
            f"floats {list(shape)} on {hidden_states.device}."
        )


def _check(plan, hidden_states, arena) -> None:
    """Refuse activations and slots that the kernels would read past or misread; they see addresses alone."""
    if hidden_states.dtype not in _DTYPES or hidden_states.shape[1:] != (plan.first.in_features,):
        raise ConfigError(
            f"hidden states are {hidden_states.dtype} {list(hidden_states.shape)}. Allowed: float32, bfloat16 or "
            f"float16 [T, {plan.first.in_features}]."
        )
    if arena.dtype != torch.uint8 or arena.dim() != 2 or arena.stride(1) != 1 or arena.stride(0) % 64:
        raise ConfigError(
            f"slots are {arena.dtype} {list(arena.shape)} in steps of {arena.stride()}. Allowed: uint8 [num_slots, "
            "slot_bytes], each at a multiple of 64 bytes."
        )
    if arena.device != hidden_states.device or arena.shape[1] < plan.record_bytes:
        raise ConfigError(
            f"slots of {arena.shape[1]} bytes are on {arena.device}, hidden states on {hidden_states.device}. Give "
            f"slots of {plan.record_bytes} bytes or more on the same device."
        )


def _check_numbers(hidden_states, *numbers) -> None:
    for tensor in numbers:
        if tensor.dtype != torch.int32 or tensor.device != hidden_states.device:
            raise ConfigError(
                f"locations, tokens, offsets and places are {tensor.dtype} on {tensor.device}. Give int32 on "
                f"{hidden_states.device}, where the hidden states are."
            )


def _check_sums(outputs, device, num_features) -> None:
    is_table = outputs.dim() == 2 and outputs.shape[1] == num_features
    if outputs.dtype != torch.float32 or outputs.device != device or not is_table or not outputs.is_contiguous():
        raise ConfigError(
            f"outputs are {outputs.dtype} {list(outputs.shape)} on {outputs.device}. Give contiguous float32 "
            f"[T * K, {num_features}] on {device}."
        )


# By hand, since torch.library.custom_op's own Python takes longer a call than it takes to launch the kernels.
_LIBRARY = torch.library.Library("moeflow", "FRAGMENT")


def _register(schema, function, check, empty) -> None:
    def fake(*arguments) -> torch.Tensor | None:
        check(*arguments)
        return empty(*arguments)

    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moeflow::{name}", fake, lib=_LIBRARY)


_register(
    "triton_experts_decode(Tensor hidden_states, Tensor arena, Tensor locations, Tensor top_k_weights, int number) -> "
    "Tensor",
    _decode,
    _check_decode,
    lambda hidden_states, *_: torch.empty_like(hidden_states),
)
_register(
    "triton_experts_lookup(Tensor hidden_states, Tensor arena, Tensor top_k_index, Tensor table_row, "
    "Tensor(a!) missed, int layer, Tensor top_k_weights, int number) -> Tensor",
    _lookup,
    _check_lookup,
    lambda hidden_states, *_: torch.empty_like(hidden_states),
)
_register(
    "triton_experts_pairs(Tensor hidden_states, Tensor arena, Tensor tokens, Tensor locations, int number) -> Tensor",
    _pairs,
    _check_pairs,
    lambda hidden_states, arena, tokens, locations, number: hidden_states.new_empty(
        locations.shape[0], hidden_states.shape[1], dtype=torch.float32
    ),
)
_register(
    "triton_experts_prefill(Tensor hidden_states, Tensor arena, Tensor locations, Tensor tokens, Tensor offsets, "
    "Tensor places, Tensor(a!) outputs, int number, int call_tokens) -> ()",
    _prefill,
    _check_prefill,
    lambda *_: None,
)
_register(
    "triton_experts_combine(Tensor outputs, Tensor top_k_weights, ScalarType dtype) -> Tensor",
    _combine,
    _check_combine,
    lambda outputs, top_k_weights, dtype: outputs.new_empty(top_k_weights.shape[0], outputs.shape[1], dtype=dtype),
)
