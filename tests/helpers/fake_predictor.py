"""Predictors that say what a test tells them, and routes for them to be right or wrong about."""

import numpy as np


class Foretold:
    """Says `now[row]` before the step that feeds token number `row`, and `later[row]` of the steps after it.

    Args:
        now: [T, L, E].
        later: [T, steps, L, E], or None for nothing.
    """

    name, signal, reach = "foretold", "none", 0

    def __init__(self, now, later=None):
        self._now, self._later = np.asarray(now, np.float32), later
        self.num_layers, self.num_experts = self._now.shape[1:]

    def begin(self, num_sequences):
        pass

    def prefill(self, token_ids, experts, weights):
        pass

    def step(self, token_ids):
        self._row = int(token_ids[0])
        return self._now[None, self._row]

    def observe(self, layer, experts, weights, signal=None):
        return None

    def later(self):
        return None if self._later is None else np.asarray(self._later, np.float32)[None, self._row]


def random_routes(num_tokens, num_layers, num_experts, top_k, seed, stay=0.7):
    """Experts [T, L, K], of which a token keeps most of the token before."""
    rng = np.random.default_rng(seed)
    scores, rows = rng.random((num_layers, num_experts)), []
    for _ in range(num_tokens):
        scores = stay * scores + (1 - stay) * rng.random(scores.shape)
        rows.append(np.argsort(-scores, axis=1)[:, :top_k])
    return np.array(rows)
