"""Protocol for observers of router output: the trace recorder and the token scheduler.

Knows passes and routes. Knows nothing of tiers.
"""

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from moeflow.hf.passes.forward import ForwardPass


class RouteObserver(Protocol):
    """Sees the routes of every layer and never changes them.

    Sits in a runtime's `observers`: a trace recorder for good, the token scheduler's for one pass. Called in the order
    of the list, by the thread that runs the pass.
    """

    def begin_pass(self, begun: "ForwardPass") -> None:
        """Take in the description of a pass, before its first layer."""

    def observe(
        self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, hidden_states: torch.Tensor
    ) -> None:
        """Take in the routes of one layer, before its experts run.

        Args:
            layer: number among the MoE layers.
            top_k_index: [T, K], expert numbers; a number of num_experts or more means none.
            top_k_weights: [T, K].
            hidden_states: [T, H], what the router saw.

        All are valid during the call only: a compiled graph reuses the memory of its tensors.
        """

    def close(self) -> None:
        """Release what the observer holds: the runtime is closed."""
