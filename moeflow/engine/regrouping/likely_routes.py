"""Prediction of a sequence's next experts from its next token's past routes and its own last routes.

The token to be fed is known before its pass, and its past routes in any sequence predict most of its route in every
layer; the sequence's subject predicts the rest. Nothing is trained: every pass adds to the memory.

Knows routes and token ids. Knows nothing of models or schedules. scripts/bench_scheduler.py compares
regrouping by such routes with regrouping by true ones.
"""

import numpy as np

_DECAY_PER_TOKEN = 0.9  # of a sequence's uses
_MAX_AGE_TOKENS = 64  # older uses have decayed to nothing
_TOKEN_ROUTES = 4  # last uses of a token that are remembered
_PRIOR_COUNT = 0.5  # additive smoothing: of one use alone, each expert counts for 2/3
_MEMORY_BYTES = 64 << 20  # of tokens' routes; those fed longest ago are dropped first


class LikelyRoutes:
    """Memory of the routes of tokens and of sequences.

    Args:
        num_layers: L.
        num_experts: E, the largest number of experts in a layer.
        top_k: K, the most experts that a token takes in a layer.
        memory_bytes: for routes of tokens, of at least one token.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int, *, memory_bytes: int = _MEMORY_BYTES):
        self._num_experts, self._top_k = num_experts, min(max(top_k, 1), num_experts)
        self._kind = np.uint8 if num_experts < 256 else np.uint16
        self._shape = num_layers, num_experts + 1  # the last column collects ids that stand for none
        self._layers = np.arange(num_layers)[:, None]
        self._most_tokens = max(memory_bytes // (_TOKEN_ROUTES * num_layers * top_k * np.dtype(self._kind).itemsize), 1)
        self._tokens: dict[int, list[np.ndarray]] = {}  # their last routes, [L, K] each, by when they were fed last
        self._recent: dict[str, np.ndarray] = {}  # decayed mean of a sequence's routes, [L, E + 1]

    def __len__(self) -> int:
        return len(self._recent)

    def observe(self, sequence: str, tokens: list[int], chosen: np.ndarray) -> None:
        """Record the experts that a sequence's next tokens took.

        Args:
            sequence: its id.
            tokens: their ids, in their order.
            chosen: [tokens, L, K] ids of experts; E or more stands for none.
        """
        chosen = np.minimum(chosen, self._num_experts)
        for token, route in zip(tokens, chosen.astype(self._kind), strict=True):
            self._tokens[token] = [*self._tokens.pop(token, ())[1 - _TOKEN_ROUTES :], route]
        while len(self._tokens) > self._most_tokens:
            del self._tokens[next(iter(self._tokens))]
        recent = self._recent.get(sequence)
        if recent is None:
            recent = self._recent[sequence] = np.zeros(self._shape, np.float32)
        recent *= _DECAY_PER_TOKEN ** len(chosen)
        for age, route in enumerate(chosen[: -_MAX_AGE_TOKENS - 1 : -1]):
            recent[self._layers, route] += (1 - _DECAY_PER_TOKEN) * _DECAY_PER_TOKEN**age

    def forget(self, sequence: str) -> None:
        """Drop a sequence; an unknown one is no error. The routes of its tokens stay known."""
        self._recent.pop(sequence, None)

    def likely(self, sequences: list[str], tokens: list[int | None]) -> np.ndarray:
        """Return [sequences, L, E] bool: the experts that each one's next token may take; none where nothing is known.

        Args:
            sequences: their ids.
            tokens: the token that each will be fed; None where that is not known yet.
        """
        scores = np.zeros((len(sequences), *self._shape), np.float32)
        for score, sequence, token in zip(scores, sequences, tokens, strict=True):
            if sequence in self._recent:
                score += self._recent[sequence]
            routes = self._tokens.get(token, ())
            for route in routes:
                score[self._layers, route] += 1 / (len(routes) + _PRIOR_COUNT)
        scores = scores[:, :, :-1]
        best = np.argpartition(-scores, self._top_k - 1, axis=2)[:, :, : self._top_k]
        chosen = np.zeros(scores.shape, bool)
        np.put_along_axis(chosen, best, True, axis=2)
        return chosen & (scores > 0)
