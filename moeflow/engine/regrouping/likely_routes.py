"""Likely experts of a sequence's next token, from that token's earlier routes and the sequence's last ones.

The token to be fed is known before its pass, and says most of its route in every layer, in whatever sequence it was fed
before; the rest is what the sequence is about. Nothing is trained: every pass adds to the memory.

Knows routes and token ids. Knows nothing of models or schedules. scripts/bench_scheduler.py shows what such routes are
worth to a regrouping, beside true ones.
"""

import math
from collections.abc import Sequence

import numpy as np

_TOKEN_DECAY = 0.9  # weight of a sequence's uses after one more token
_MAX_AGE_TOKENS = 64  # an older use weighs nothing
_REMEMBERED_USES = 4  # of each token
_PRIOR_COUNT = 0.5  # additive smoothing: one observation weighs 1 / 1.5
_MAX_MEMORY_BYTES = 64 << 20  # of tokens' routes; the token fed longest ago is forgotten first


class LikelyRoutes:
    """Memory of the routes of tokens and of sequences.

    Args:
        num_layers: L.
        num_experts: E, the largest number of experts in a layer.
        top_k: K, the most experts that a token takes in a layer.
        memory_bytes: what routes of tokens may take, for at least one token.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int, *, memory_bytes: int = _MAX_MEMORY_BYTES) -> None:
        self._num_experts, self._top_k = num_experts, min(max(top_k, 1), num_experts)
        self._kind = np.uint8 if num_experts < 256 else np.uint16
        self._shape = num_layers, num_experts + 1  # the last column takes in what stands for none
        self._layers = np.arange(num_layers)[:, None]
        self._most_tokens = max(
            memory_bytes // (_REMEMBERED_USES * num_layers * top_k * np.dtype(self._kind).itemsize), 1
        )
        self._tokens: dict[int, list[np.ndarray]] = {}  # their last routes, [L, K] each, by when they were fed last
        self._recent: dict[str, np.ndarray] = {}  # decayed mean of a sequence's routes, [L, E + 1]

    def __len__(self) -> int:
        return len(self._recent)

    def observe(self, sequence: str, tokens: list[int], chosen: np.ndarray) -> None:
        """Take in what a sequence's next tokens took.

        Args:
            sequence: its id.
            tokens: their ids, in their order.
            chosen: [tokens, L, K] ids of experts; E or more stands for none.
        """
        chosen = np.minimum(chosen, self._num_experts)
        for token, route in zip(tokens, chosen.astype(self._kind), strict=True):
            self._tokens[token] = [*self._tokens.pop(token, ())[1 - _REMEMBERED_USES :], route]
        while len(self._tokens) > self._most_tokens:
            del self._tokens[next(iter(self._tokens))]
        recent = self._recent.get(sequence)
        if recent is None:
            recent = self._recent[sequence] = np.zeros(self._shape, np.float32)
        recent *= _TOKEN_DECAY ** len(chosen)
        for age, route in enumerate(chosen[: -_MAX_AGE_TOKENS - 1 : -1]):
            recent[self._layers, route] += (1 - _TOKEN_DECAY) * _TOKEN_DECAY**age

    def forget(self, sequence: str) -> None:
        """Drop a sequence; one that is not known is no error. What its tokens took stays known."""
        self._recent.pop(sequence, None)

    def likely(self, sequences: list[str], tokens: Sequence[int | None]) -> np.ndarray:
        """Return [sequences, L, E] bool: what each one's next token may take; none where nothing is known.

        Args:
            sequences: their ids.
            tokens: the token that each will be fed; None where that is not known yet.
        """
        scores = self._scores_of(tokens)
        for score, sequence in zip(scores, sequences, strict=True):
            if sequence in self._recent:
                score += self._recent[sequence]
        scores = scores[:, :, :-1]
        least = np.partition(scores, -self._top_k, axis=2)[:, :, -self._top_k, None]
        chosen = (scores >= least) & (scores > 0)
        tied = np.nonzero(np.count_nonzero(chosen, axis=2) > self._top_k)
        if len(tied[0]):
            best = np.argpartition(-scores[tied], self._top_k - 1, axis=1)[:, : self._top_k]
            parted = np.zeros((len(best), scores.shape[2]), bool)
            np.put_along_axis(parted, best, True, axis=1)
            chosen[tied] = parted
        return chosen

    def _scores_of(self, tokens: Sequence[int | None]) -> np.ndarray:
        """Return [tokens, L, E + 1]: how often each token took each expert, of the times that are remembered."""
        shape = len(tokens), *self._shape
        places, weights = [np.zeros(0, np.int64)], [np.zeros(0)]
        for place, token in enumerate(tokens):
            routes = [] if token is None else self._tokens.get(token, [])
            if routes:
                rows = place * shape[1] + self._layers
                places.append((rows * shape[2] + np.stack(routes)).ravel())
                weights.append(np.full(places[-1].size, 1 / (len(routes) + _PRIOR_COUNT)))
        counts = np.bincount(np.concatenate(places), np.concatenate(weights), math.prod(shape))
        return counts.astype(np.float32).reshape(shape)
