"""Predictor of first-order tables: from one layer's experts to the next layer's, and from one token's to the next's."""

import numpy as np

from moeflow.predictors.odds import log_odds, multi_hot, sigmoid
from moeflow.predictors.routes import Routes

_PRIOR_COUNTS = 4.0  # demands: the weight of the popularity in a row of a table


class Markov:
    """Predicts a layer from the layer before it in the same step and from itself in the step before.

    A table's row says how likely each expert follows one; the rows of the K experts demanded are averaged, and the two
    tables are combined as independent evidence. Tables outlive `begin`: they describe the model, not a sequence.

    Args:
        num_layers: L.
        num_experts: E.
        learn: whether the tables go on learning while they are used.
    """

    name = "markov"
    signal = "none"
    reach = 1

    def __init__(self, num_layers: int, num_experts: int, *, learn: bool = True) -> None:
        self.num_layers, self.num_experts, self.learn = num_layers, num_experts, learn
        shape = (num_layers, num_experts + 1, num_experts)  # the last row takes in experts that stand for none
        self.by_layer = np.zeros(shape, np.float32)  # [l]: from layer l to l + 1
        self.by_token = np.zeros(shape, np.float32)  # [l]: from layer l of a step to layer l of the next
        self.popularity = np.zeros((num_layers, num_experts), np.float32)
        self.num_steps = np.zeros(1, np.float32)
        self.begin(1)

    @classmethod
    def train(cls, routes: Routes) -> "Markov":
        """Count all transitions of training routes; the tables then stay as they are."""
        markov = cls(routes.num_layers, routes.num_experts, learn=False)
        for experts in routes.experts:
            markov._count(_from_nothing(multi_hot(experts[None], routes.num_experts)))
        markov._summarise()
        return markov

    def begin(self, num_sequences: int) -> None:
        self._before = np.full((num_sequences, self.num_layers, 1), self.num_experts)
        self._now: list[np.ndarray] = []
        self._summarise()

    def prefill(self, token_ids: np.ndarray, experts: np.ndarray, weights: np.ndarray | None) -> None:
        if self.learn:
            self._count(_from_nothing(multi_hot(experts, self.num_experts)))
            self._summarise()
        self._before = np.minimum(experts[:, -1].astype(np.intp), self.num_experts)

    def step(self, token_ids: np.ndarray) -> np.ndarray | None:
        self._now = []
        if not self.num_steps[0]:
            return None
        layers = np.arange(self.num_layers)[:, None]
        self._by_step = log_odds(self._token_rows[layers, self._before].mean(2))
        return sigmoid(self._by_step)

    def observe(
        self, layer: int, experts: np.ndarray, weights: np.ndarray | None, signal: np.ndarray | None = None
    ) -> np.ndarray | None:
        chosen = np.minimum(experts, self.num_experts)
        self._now.append(chosen)
        if layer == self.num_layers - 1:
            self._finish_step()
            return None
        if not self.num_steps[0]:
            return None
        by_layer = log_odds(self._layer_rows[layer, chosen].mean(1))
        return sigmoid(by_layer + self._by_step[:, layer + 1] - self._general[layer + 1])[:, None]

    def later(self) -> None:
        return None

    def _finish_step(self) -> None:
        now = np.stack(self._now, 1)
        if self.learn:
            self._count(np.stack([multi_hot(self._before, self.num_experts), multi_hot(now, self.num_experts)], 1))
            self._summarise()
        self._before = now

    def _count(self, hot: np.ndarray) -> None:
        """Count the transitions between the steps hot [B, T, L, E], 0 or 1."""
        before, now = (part.reshape(-1, *part.shape[2:]).transpose(1, 0, 2) for part in (hot[:, :-1], hot[:, 1:]))
        self.by_token[:, :-1] += before.transpose(0, 2, 1) @ now
        self.by_layer[:-1, :-1] += now[:-1].transpose(0, 2, 1) @ now[1:]
        self.popularity += now.sum(1)
        self.num_steps += now[0].any(-1).sum()

    def _summarise(self) -> None:
        """Turn counts into probabilities."""
        popularity = self.popularity / np.maximum(self.num_steps, 1.0)
        top_k = np.maximum(popularity.sum(1, keepdims=True), 1e-6)
        self._general = log_odds(popularity)

        def rows(counts: np.ndarray, prior: np.ndarray) -> np.ndarray:
            times = counts.sum(2, keepdims=True) / top_k[:, None]
            return (counts + _PRIOR_COUNTS * prior[:, None]) / (times + _PRIOR_COUNTS)

        self._token_rows = rows(self.by_token, popularity)
        self._layer_rows = rows(self.by_layer, np.roll(popularity, -1, 0))


def _from_nothing(hot: np.ndarray) -> np.ndarray:
    """Put a step without experts before hot [B, T, L, E]."""
    return np.concatenate([np.zeros_like(hot[:, :1]), hot], 1)
