"""Popularity, the simplest baseline: experts that were demanded often will be demanded again."""

import numpy as np

from moeflow.predictors.odds import multi_hot
from moeflow.predictors.routes import Routes

_PRIOR_STEPS = 16.0  # the weight of the popularity known from training


class Popularity:
    """Predicts by counts, from training and online, the recent past counting more.

    Args:
        num_layers: L.
        num_experts: E.
        popularity: [L, E], probability known from training; None when nothing is known.
        half_life: steps after which a step of this sequence counts half.
    """

    name = "popularity"
    signal = "none"
    reach = 0

    def __init__(
        self, num_layers: int, num_experts: int, popularity: np.ndarray | None = None, half_life: float = 512
    ) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.popularity = None if popularity is None else np.asarray(popularity, np.float32)
        self._decay = np.float32(2 ** (-1 / half_life))
        self.begin(1)

    @classmethod
    def train(cls, routes: Routes) -> "Popularity":
        """Count how often each expert was demanded."""
        counts = sum(multi_hot(experts, routes.num_experts).sum(0) for experts in routes.experts)
        return cls(routes.num_layers, routes.num_experts, counts / routes.num_tokens)

    def begin(self, num_sequences: int) -> None:
        self._counts = np.zeros((num_sequences, self.num_layers, self.num_experts), np.float32)
        self._steps = np.zeros((num_sequences, 1, 1), np.float32)

    def prefill(self, token_ids: np.ndarray, experts: np.ndarray, weights: np.ndarray | None) -> None:
        fed = (experts[:, :, :1, :1] < self.num_experts).astype(np.float32)  # [B, T, 1, 1]
        later = fed.sum(1, keepdims=True) - np.cumsum(fed, 1)  # steps that came after each
        weight = self._decay**later * fed
        self._counts += (multi_hot(experts, self.num_experts) * weight).sum(1)
        self._steps += weight.sum(1)

    def step(self, token_ids: np.ndarray) -> np.ndarray | None:
        self._counts *= self._decay
        self._steps *= self._decay
        if self.popularity is None:
            self._probability = self._counts / np.maximum(self._steps, 1.0)
            known = self._steps > 0
            return np.where(known, self._probability, np.float32(np.nan)) if known.any() else None
        return (self._counts + _PRIOR_STEPS * self.popularity) / (self._steps + _PRIOR_STEPS)

    def observe(
        self, layer: int, experts: np.ndarray, weights: np.ndarray | None, signal: np.ndarray | None = None
    ) -> None:
        self._counts[:, layer] += multi_hot(experts, self.num_experts)
        if layer == self.num_layers - 1:
            self._steps += (experts[:, :1, None] < self.num_experts).astype(np.float32)

    def later(self) -> None:
        return None
