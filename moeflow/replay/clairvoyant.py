"""Predictor without error, from the future of a trace: a bound for prefetchers.

Knows a trace's routes. Knows nothing of caches or links.
"""

from typing import Any

import numpy as np

from moeflow.predictors.odds import multi_hot

NUM_STEPS = 30  # seen after the coming one


class Clairvoyant:
    """Predicts exactly the experts that the coming steps demand.

    Args:
        sequences: experts [T, L, K] of each sequence, in the order in which they are replayed; the n-th `begin` starts
            the n-th.
        num_experts: E; numbers of E or more stand for none.
        num_steps: how many steps after the coming one it sees.
    """

    name = "clairvoyant"
    signal = "none"
    reach = 0

    def __init__(self, sequences: list[np.ndarray], num_experts: int, num_steps: int = NUM_STEPS) -> None:
        self.num_layers, self.num_experts = sequences[0].shape[1], num_experts
        self.num_steps = num_steps
        self._sequences = sequences
        self._place = -1

    def begin(self, num_sequences: int) -> None:
        """Go on to the next sequence."""
        assert num_sequences == 1, "a clairvoyant follows one sequence at a time"
        self._place = (self._place + 1) % len(self._sequences)
        routes = multi_hot(self._sequences[self._place], self.num_experts)
        self._routes = np.pad(routes, ((0, self.num_steps + 1), (0, 0), (0, 0)))  # nothing is demanded after the end
        self._row = -1

    def prefill(self, token_ids: np.ndarray, experts: np.ndarray, weights: np.ndarray | None) -> None:
        """Ignore the prompt: a sequence's decode steps are known already."""

    def step(self, token_ids: np.ndarray) -> np.ndarray:
        """Look up the coming step: [1, L, E]."""
        self._row += 1
        return self._routes[None, self._row]

    def observe(self, layer: int, experts: np.ndarray, weights: np.ndarray | None, signal: Any = None) -> None:
        """Ignore the routes: they are known already."""

    def later(self) -> np.ndarray:
        """Look up the steps after it: [1, steps, L, E]."""
        return self._routes[None, self._row + 1 : self._row + 1 + self.num_steps]
