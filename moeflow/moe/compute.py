"""Protocol of the arithmetic behind one layer's experts.

Every implementation computes a token's output of an expert from that token and that expert alone, in an order that
depends on how many tokens go to the expert, on the `path` of the whole call and on nothing else, so that the bits do
not depend on residency.
"""

from typing import Protocol

import torch

from moeflow.moe.dispatch import Dispatch
from moeflow.offload.slot_pool import Resident


class ExpertCompute(Protocol):
    """Runs experts of one layer. `allocate_outputs`, then `run` for every part of the experts, then `combine`."""

    def path(self, call_tokens: int) -> int:
        """Return the number of the way that a whole call of so many tokens is computed: others have other last bits."""

    def allocate_outputs(self, hidden_states: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """Return memory for the outputs of every place: [T * K, H], zero where no expert writes."""

    def run(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, outputs: torch.Tensor
    ) -> None:
        """Write the outputs of these experts to their places."""

    def run_token(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run all K experts of a single token and sum them, with the bits of the other three: [1, H]."""

    def combine(self, hidden_states: torch.Tensor, outputs: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Sum each token's outputs by router weight, in float32 and in the order of K: [T, H]."""


def run_apart(
    compute: ExpertCompute,
    hidden_states: torch.Tensor,
    residents: list[Resident],
    dispatch: Dispatch,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run all K experts of a single token through `allocate_outputs`, `run` and `combine`: [1, H]."""
    outputs = compute.allocate_outputs(hidden_states, dispatch)
    compute.run(hidden_states, residents, dispatch, outputs)
    return compute.combine(hidden_states, outputs, top_k_weights)
