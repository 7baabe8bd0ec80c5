"""Routed experts on a GPU: kernels in Triton that read packed records where they lie in the device's slots.

Every call is also a `torch.library` op, so that torch.compile takes a model whole. Under `TRITON_INTERPRET=1` the same
kernels run on CPU tensors, slowly: that is how they are tested. Knows nothing of caches, files or models.
"""

import importlib.util
import os
from functools import cache

import torch

from moeflow.core import RecordLayout
from moeflow.errors import ConfigError
from moeflow.kernels.activations import ACTIVATIONS, Activation
from moeflow.kernels.triton.matrix import MatrixPlan

# The ops know a TritonExperts by its row number: a graph holds numbers, no objects.
_BUILT: list["TritonExperts"] = []
# Tokens of a whole call -> tokens of a tile. Whole calls only: bits must not depend on the resident experts.
_TILE_TOKENS = ((128, 16), (512, 32), (2048, 64))
_LARGEST_TILE = 128
_PARTS = ("", "_scale", "_zero", "_bias", "_top", "_escapes")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available() -> bool:
    """Tell whether the kernels can run here: Triton is installed, and there is a GPU or the interpreter is on."""
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def prefill_tile(call_tokens: int) -> int:
    """Return how many tokens a tile of `prefill` has in a whole call of so many: bits depend on it."""
    return next((tile for most, tile in _TILE_TOKENS if call_tokens <= most), _LARGEST_TILE)


class TritonExperts:
    """The kernels for one record layout and activation. Make it with `build`.

    Decode (`decode`, `pairs`): everything in float32 from the values as stored to the combined sum; only the result is
    rounded, to the dtype of `hidden_states`. Prefill: weights and hidden activations are rounded to
    that dtype, which tensor cores take; sums are float32.

    Args:
        first: the gate and up matrix, or the up matrix.
        down: the down matrix.
        activation: the one between them.
        record_bytes: of the record that they lie in.
    """

    def __init__(self, first: MatrixPlan, down: MatrixPlan, activation: Activation, record_bytes: int) -> None:
        from moeflow.kernels.triton.activation import constants

        self.first, self.down, self.step = first, down, constants(activation)
        self.record_bytes = record_bytes
        self.number = len(_BUILT)
        _BUILT.append(self)

    @classmethod
    @cache
    def build(
        cls, record: RecordLayout, activation: Activation, *, is_transposed: bool = False
    ) -> "TritonExperts | None":
        """Return the kernels for a record layout; the same object for the same arguments.

        Args:
            record: layout of every expert of a call.
            activation: the one between the two matrices.
            is_transposed: whether the module stores matrices [in, out].

        Returns:
            The kernels, or None without Triton or for an unknown dtype, activation or tensor.
        """
        if not available() or activation.kind not in ACTIVATIONS:
            return None
        names = {tensor.name for tensor in record.tensors}
        first_name = "up_proj" if activation.gate == "none" else "gate_up_proj"
        first = MatrixPlan.find(record, first_name, is_transposed=is_transposed)
        down = MatrixPlan.find(record, "down_proj", is_transposed=is_transposed)
        known = {f"{name}{part}" for name in (first_name, "down_proj") for part in _PARTS}
        if first is None or down is None or not names <= known:
            return None
        if first.num_rows != down.in_features * (1 if activation.gate == "none" else 2):
            return None
        if down.num_rows != first.in_features:
            return None
        return cls(first, down, activation, record.num_bytes)

    def decode(
        self, hidden_states: torch.Tensor, arena: torch.Tensor, slots: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the routed experts of few tokens. The same bits as `pairs` and `combine` in any number of calls.

        Args:
            hidden_states: [T, H].
            arena: uint8 [num_slots, slot_bytes], rows at multiples of 64 bytes.
            slots: int32 [T, K], on the device, where each chosen expert lies; -1 adds nothing.
            top_k_weights: [T, K].

        Returns:
            [T, H] in the dtype of `hidden_states`.
        """
        run = torch.ops.moeflow.triton_experts_decode if torch.compiler.is_compiling() else _decode
        return run(hidden_states, arena, slots, top_k_weights, self.number)

    def pairs(
        self, hidden_states: torch.Tensor, arena: torch.Tensor, tokens: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Run experts on tokens, pair by pair: for experts that arrive later than others.

        Args:
            hidden_states: [T, H].
            arena: uint8 [num_slots, slot_bytes].
            tokens: int32 [P], the token of each pair.
            slots: int32 [P], where its expert lies; -1 gives zeros.

        Returns:
            [P, H] float32, not yet weighted.
        """
        run = torch.ops.moeflow.triton_experts_pairs if torch.compiler.is_compiling() else _pairs
        return run(hidden_states, arena, tokens, slots, self.number)

    def prefill(
        self,
        hidden_states: torch.Tensor,
        arena: torch.Tensor,
        slots: torch.Tensor,
        tokens: torch.Tensor,
        offsets: torch.Tensor,
        places: torch.Tensor,
        outputs: torch.Tensor,
        *,
        call_tokens: int | None = None,
    ) -> None:
        """Run some experts on all their tokens; a row's bits do not depend on which other experts are in the call.

        Args:
            hidden_states: [T, H].
            arena: uint8 [num_slots, slot_bytes].
            slots: int32 [E'], where each expert lies; -1 leaves its outputs as they are.
            tokens: int32 [S], the token of each entry, sorted by expert.
            offsets: int32 [E' + 1], where each expert's entries begin.
            places: int32 [S], row of `outputs` of each entry.
            outputs: [T * K, H] float32, written at `places`; sum it with `combine`.
            call_tokens: tokens of the whole call, on which bits depend, where `hidden_states` has others; T if None.
        """
        run = torch.ops.moeflow.triton_experts_prefill if torch.compiler.is_compiling() else _prefill
        call_tokens = call_tokens or len(hidden_states)
        run(hidden_states, arena, slots, tokens, offsets, places, outputs, self.number, call_tokens)

    @staticmethod
    def combine(outputs: torch.Tensor, top_k_weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Sum each token's outputs, [T * K, H] float32, by router weight, in the order of K. Returns [T, H]."""
        run = torch.ops.moeflow.triton_experts_combine if torch.compiler.is_compiling() else _combine
        return run(outputs, top_k_weights, dtype)


def _decode(
    hidden_states: torch.Tensor, arena: torch.Tensor, slots: torch.Tensor, top_k_weights: torch.Tensor, number: int
) -> torch.Tensor:
    _check_numbers(hidden_states, slots)
    if slots.shape != (*hidden_states.shape[:1], slots.shape[-1]):
        raise ConfigError(f"slots are {list(slots.shape)}. Give [T, K] for {len(hidden_states)} tokens.")
    flat = slots.reshape(-1)
    outputs = _run_pairs(_BUILT[number], hidden_states, arena, flat, pairs_per_row=slots.shape[1])
    return _combine(outputs, top_k_weights, hidden_states.dtype)


def _pairs(
    hidden_states: torch.Tensor, arena: torch.Tensor, tokens: torch.Tensor, slots: torch.Tensor, number: int
) -> torch.Tensor:
    _check_numbers(hidden_states, slots, tokens)
    if slots.dim() != 1 or slots.shape != tokens.shape:
        raise ConfigError(f"slots are {list(slots.shape)}, tokens {list(tokens.shape)}. Give one of each for a pair.")
    return _run_pairs(_BUILT[number], hidden_states, arena, slots.contiguous(), tokens=tokens.contiguous())


def _run_pairs(experts, hidden_states, arena, slots, **rows) -> torch.Tensor:
    from moeflow.kernels.triton.activation import LINEAR
    from moeflow.kernels.triton.decode import multiply_pairs

    _check(experts, hidden_states, arena)
    inner = multiply_pairs(hidden_states.contiguous(), arena, slots, experts.first, experts.step, **rows)
    return multiply_pairs(inner, arena, slots, experts.down, LINEAR)


def _prefill(
    hidden_states: torch.Tensor,
    arena: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    places: torch.Tensor,
    outputs: torch.Tensor,
    number: int,
    call_tokens: int,
) -> None:
    from moeflow.kernels.triton.activation import LINEAR
    from moeflow.kernels.triton.prefill import multiply_groups

    experts = _BUILT[number]
    _check(experts, hidden_states, arena)
    _check_numbers(hidden_states, slots, tokens, offsets, places)
    if tokens.shape != places.shape or offsets.numel() != slots.numel() + 1:
        raise ConfigError(
            f"{tokens.numel()} tokens, {places.numel()} places and {offsets.numel()} offsets of {slots.numel()} "
            "experts. Give as many places as tokens, and one offset more than experts."
        )
    _check_sums(outputs, hidden_states.device, hidden_states.shape[1])
    num_entries, tile = tokens.numel(), prefill_tile(call_tokens)
    inner = hidden_states.new_empty(num_entries, experts.down.in_features)
    slots, offsets = slots.contiguous(), offsets.contiguous()
    multiply_groups(
        hidden_states.contiguous(), inner, arena, slots, offsets, experts.first, experts.step,
        num_entries=num_entries, block_tokens=tile, sources=tokens.contiguous(),
    )  # fmt: skip
    multiply_groups(
        inner, outputs, arena, slots, offsets, experts.down, LINEAR,
        num_entries=num_entries, block_tokens=tile, places=places.contiguous(),
    )  # fmt: skip


def _combine(outputs: torch.Tensor, top_k_weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from moeflow.kernels.triton.combine import combine_pairs

    _check_sums(outputs, top_k_weights.device, outputs.shape[-1])
    if top_k_weights.dim() != 2 or top_k_weights.numel() != len(outputs) or not top_k_weights.is_floating_point():
        raise ConfigError(
            f"router weights are {top_k_weights.dtype} {list(top_k_weights.shape)} for {len(outputs)} outputs. Give "
            "floats [T, K] for outputs [T * K, H]."
        )
    return combine_pairs(outputs, top_k_weights, dtype)


def _check(experts, hidden_states, arena) -> None:
    """Refuse activations and slots that the kernels would read past or misread; they see addresses alone."""
    if hidden_states.dtype not in _DTYPES or hidden_states.shape[1:] != (experts.first.in_features,):
        raise ConfigError(
            f"hidden states are {hidden_states.dtype} {list(hidden_states.shape)}. Allowed: float32, bfloat16 or "
            f"float16 [T, {experts.first.in_features}]."
        )
    if arena.dtype != torch.uint8 or arena.dim() != 2 or arena.stride(1) != 1 or arena.stride(0) % 64:
        raise ConfigError(
            f"slots are {arena.dtype} {list(arena.shape)} in steps of {arena.stride()}. Allowed: uint8 [num_slots, "
            "slot_bytes], each at a multiple of 64 bytes."
        )
    if arena.device != hidden_states.device or arena.shape[1] < experts.record_bytes:
        raise ConfigError(
            f"slots of {arena.shape[1]} bytes are on {arena.device}, hidden states on {hidden_states.device}. Give "
            f"slots of {experts.record_bytes} bytes or more on the same device."
        )


def _check_numbers(hidden_states, *numbers) -> None:
    for tensor in numbers:
        if tensor.dtype != torch.int32 or tensor.device != hidden_states.device:
            raise ConfigError(
                f"slots, tokens, offsets and places are {tensor.dtype} on {tensor.device}. Give int32 on "
                f"{hidden_states.device}, where the hidden states are."
            )


def _check_sums(outputs, device, num_features) -> None:
    is_table = outputs.dim() == 2 and outputs.shape[1] == num_features
    if outputs.dtype != torch.float32 or outputs.device != device or not is_table or not outputs.is_contiguous():
        raise ConfigError(
            f"outputs are {outputs.dtype} {list(outputs.shape)} on {outputs.device}. Give contiguous float32 "
            f"[T * K, {num_features}] on {device}."
        )


def _register(name, function, fake, mutates_args=()) -> None:
    torch.library.custom_op(f"moeflow::{name}", function, mutates_args=mutates_args).register_fake(fake)


_register("triton_experts_decode", _decode, lambda hidden_states, *_: torch.empty_like(hidden_states))
_register(
    "triton_experts_pairs",
    _pairs,
    lambda hidden_states, arena, tokens, slots, number: hidden_states.new_empty(
        slots.shape[0], hidden_states.shape[1], dtype=torch.float32
    ),
)
_register("triton_experts_prefill", _prefill, lambda *_: None, mutates_args=("outputs",))
_register(
    "triton_experts_combine",
    _combine,
    lambda outputs, top_k_weights, dtype: outputs.new_empty(top_k_weights.shape[0], outputs.shape[1], dtype=dtype),
)
