"""Routed experts on a GPU: kernels in Triton that read packed records where they lie in the device's slots.

Every call is a `torch.library` op (`triton/ops.py`). Under `TRITON_INTERPRET=1` the same
kernels run on CPU tensors, slowly: that is how they are tested. Knows nothing of caches, files or models.
"""

import importlib.util
import os
from functools import cache

import torch

from moeflow.core import RecordLayout
from moeflow.kernels.activations import ACTIVATIONS, Activation
from moeflow.kernels.triton.matrix import MatrixPlan
from moeflow.kernels.triton.ops import BUILT, ExpertPlan

_PARTS = ("", "_scale", "_zero", "_bias", "_top", "_escapes")


def available() -> bool:
    """Tell whether the kernels can run here: Triton is installed, and there is a GPU or the interpreter is on."""
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def find_plan(record: RecordLayout, activation: Activation, *, is_transposed: bool = False) -> ExpertPlan | None:
    """Return what the kernels know of a record layout, or None where they cannot read it; needs Triton, no GPU.

    Args:
        record: layout of every expert of a call.
        activation: the one between the two matrices.
        is_transposed: whether the module stores matrices [in, out].
    """
    from moeflow.kernels.triton.activation import constants

    if activation.kind not in ACTIVATIONS:
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
    return ExpertPlan(first, down, constants(activation), record.num_bytes)


class TritonExperts:
    """The kernels for one record layout and activation. Make it with `build`.

    Decode (`decode`, `pairs`): everything in float32 from the values as stored to the combined sum; only the result is
    rounded, to the dtype of `hidden_states`. Prefill: weights and hidden activations are rounded to
    that dtype, which tensor cores take; sums are float32.

    A location says where an expert's record begins: int32, in units of 64 bytes from the first byte of `arena`. Records
    may lie in other allocations too, up to 137 GB behind it or before it; -1 means none.

    Args:
        plan: what the kernels know of the layout.
    """

    def __init__(self, plan: ExpertPlan) -> None:
        self.plan = plan
        self.number = len(BUILT)
        BUILT.append(plan)

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
        plan = find_plan(record, activation, is_transposed=is_transposed) if available() else None
        return None if plan is None else cls(plan)

    def decode(
        self, hidden_states: torch.Tensor, arena: torch.Tensor, locations: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the routed experts of few tokens. The same bits as `pairs` and `combine` in any number of calls.

        Args:
            hidden_states: [T, H].
            arena: uint8 [num_slots, slot_bytes], rows at multiples of 64 bytes.
            locations: int32 [T, K], on the device, where each chosen expert lies; -1 adds nothing.
            top_k_weights: [T, K].

        Returns:
            [T, H] in the dtype of `hidden_states`.
        """
        return torch.ops.moeflow.triton_experts_decode.default(
            hidden_states, arena, locations, top_k_weights, self.number
        )

    def lookup(
        self,
        hidden_states: torch.Tensor,
        arena: torch.Tensor,
        top_k_index: torch.Tensor,
        table_row: torch.Tensor,
        missed: torch.Tensor,
        layer: int,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Run the routed experts of few tokens, whose locations the kernels look up; nothing waits for the host.

        The same bits as `decode` with the same locations.

        Args:
            hidden_states: [T, H].
            arena: uint8 [num_slots, slot_bytes], rows at multiples of 64 bytes.
            top_k_index: int64 or int32 [T, K], expert numbers; one outside 0 .. E - 1 means none.
            table_row: int32 [E], the location of each expert of this layer, -1 where it is absent: that adds nothing.
            missed: int32 [num_layers], on the device, or pinned in host memory; 1 is written at `layer` where a chosen
                expert is absent, nothing where none is.
            layer: of this call, see `missed`.
            top_k_weights: [T, K].

        Returns:
            [T, H] in the dtype of `hidden_states`.
        """
        return torch.ops.moeflow.triton_experts_lookup.default(
            hidden_states, arena, top_k_index, table_row, missed, layer, top_k_weights, self.number
        )

    def pairs(
        self, hidden_states: torch.Tensor, arena: torch.Tensor, tokens: torch.Tensor, locations: torch.Tensor
    ) -> torch.Tensor:
        """Run experts on tokens, pair by pair: for experts that arrive later than others.

        Args:
            hidden_states: [T, H].
            arena: uint8 [num_slots, slot_bytes].
            tokens: int32 [P], the token of each pair.
            locations: int32 [P], where its expert lies; -1 gives zeros.

        Returns:
            [P, H] float32, not yet weighted.
        """
        return torch.ops.moeflow.triton_experts_pairs.default(hidden_states, arena, tokens, locations, self.number)

    def prefill(
        self,
        hidden_states: torch.Tensor,
        arena: torch.Tensor,
        locations: torch.Tensor,
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
            locations: int32 [E'], where each expert lies; -1 leaves its outputs as they are.
            tokens: int32 [S], the token of each entry, sorted by expert.
            offsets: int32 [E' + 1], where each expert's entries begin.
            places: int32 [S], row of `outputs` of each entry.
            outputs: [T * K, H] float32, written at `places`; sum it with `combine`.
            call_tokens: tokens of the whole call, on which bits depend, where `hidden_states` has others; T if None.
        """
        torch.ops.moeflow.triton_experts_prefill.default(
            hidden_states, arena, locations, tokens, offsets, places, outputs, self.number,
            call_tokens or len(hidden_states),
        )  # fmt: skip

    @staticmethod
    def combine(outputs: torch.Tensor, top_k_weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Sum each token's outputs, [T * K, H] float32, by router weight, in the order of K. Returns [T, H]."""
        return torch.ops.moeflow.triton_experts_combine.default(outputs, top_k_weights, dtype)
