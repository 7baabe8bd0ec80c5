"""Protocol of predictors, in replay and live: routes in, probabilities out. No caches, no devices, no models.

The calls of a predictor: `begin`, perhaps `prefill`, and then for every decode step `step` before the first layer runs
and `observe` after each layer's router has chosen, in the order of the layers. A probability of NaN means that
nothing is known; an answer that is NaN throughout, or outside 0 to 1, counts as a failure. Expert numbers of
num_experts or more, as padding has them, stand for none.
"""

from typing import Any, Protocol

import numpy as np


class Predictor(Protocol):
    """Predicts which experts the coming layers will demand, for B sequences at once.

    Args:
        name: its name in reports.
        num_layers: L, MoE layers.
        num_experts: E, the largest number of experts in a layer.
        reach: D, how many layers ahead `observe` refines; 0 where it never does.
        signal: input of `observe` besides the routes: "none", "residual" (the residual stream at this layer's router,
            before its norm: tensor [B, H]) or "recorded" (the lookahead of a trace: expert ids, array [B, D, M]).

    One whose signal is the residual stream may have a method `ask(layer, residual)`. Where the stream lies on a GPU,
    `ask` starts there what `observe` needs of it, and returns a tensor of any shape, or None; it comes down together
    with the routes, and `observe` gets it as its signal: a float32 array. Without `ask` the residual stream itself
    comes down, as a float32 tensor.
    """

    name: str
    num_layers: int
    num_experts: int
    reach: int
    signal: str

    def begin(self, num_sequences: int) -> None:
        """Forget the past: B = num_sequences new sequences start."""

    def prefill(self, token_ids: np.ndarray, experts: np.ndarray, weights: np.ndarray | None) -> None:
        """Learn the routes of a prompt: token_ids [B, T], experts and weights [B, T, L, K]."""

    def step(self, token_ids: np.ndarray) -> np.ndarray | None:
        """Predict the step that feeds token_ids [B]: probability that it demands each expert, float32 [B, L, E].

        None where nothing is known yet.
        """

    def observe(
        self, layer: int, experts: np.ndarray, weights: np.ndarray | None, signal: Any = None
    ) -> np.ndarray | None:
        """Take in the experts that a layer's router chose and refine the layers above it.

        Args:
            layer: the layer of the router; the last layer ends the step.
            experts: [B, K], by falling weight.
            weights: [B, K], or None where they are not known.
            signal: see the class.

        Returns:
            Probabilities of layers layer + 1 to layer + n, n = min(reach, layers left): float32 [B, n, E]; None
            where nothing is refined.
        """

    def later(self) -> np.ndarray | None:
        """Predict the steps after the coming one: float32 [B, steps, L, E]; None where nothing is known of them.

        Asked after `step`; index 0 is the step that follows the one `step` predicted.
        """
