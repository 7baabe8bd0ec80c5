"""Which experts a sequence is likely to take next: those that its next token took before, and that its last ones took.

The token to be fed is known before its pass, and says most of its route in every layer, in whatever sequence it was fed
before; the rest is what the sequence is about. Nothing is trained: every pass adds to the memory.

Knows routes and token ids. Knows nothing of models or schedules. scripts/bench_scheduler.py shows what such routes are
worth to a regrouping, beside true ones.
"""

import numpy as np

_DECAY = 0.9  # of a sequence's uses, a token later
_SPAN = 4  # uses of a token that its mean route goes back, about
_DOUBT = 0.5  # uses that a token's mean is short of: one use alone counts for 2/3
_MEMORY_BYTES = 64 << 20  # of tokens' routes; those fed longest ago go first


class LikelyRoutes:
    """What was seen of tokens and of sequences.

    Args:
        num_layers: L.
        num_experts: E, the largest number of experts in a layer.
        top_k: K, the most experts that a token takes in a layer.
        memory_bytes: what routes of tokens may take, for at least one token.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int, *, memory_bytes: int = _MEMORY_BYTES):
        self._shape = num_layers, num_experts
        self._top_k = min(max(top_k, 1), num_experts)
        self._most_tokens = max(memory_bytes // (2 * num_layers * num_experts), 1)
        self._tokens: dict[int, tuple[np.ndarray, int]] = {}  # the mean of their routes, float16, and their uses
        self._recent: dict[str, np.ndarray] = {}  # decayed mean of a sequence's routes

    def __len__(self) -> int:
        return len(self._recent)

    def observe(self, sequence: str, tokens: list[int], routes: np.ndarray) -> None:
        """Take in what a sequence's next tokens took.

        Args:
            sequence: its id.
            tokens: their ids, in their order.
            routes: [tokens, L, E] bool.
        """
        for token, route in zip(tokens, routes, strict=True):
            mean, uses = self._tokens.pop(token, (np.zeros(self._shape, np.float16), 0))
            self._tokens[token] = mean + (route - mean) / np.float16(min(uses + 1, _SPAN)), uses + 1
        while len(self._tokens) > self._most_tokens:
            del self._tokens[next(iter(self._tokens))]
        left = _DECAY ** np.arange(len(routes) - 1, -1, -1, dtype=np.float32)
        recent = np.tensordot((1 - _DECAY) * left, routes.astype(np.float32), axes=1)
        if sequence in self._recent:
            recent += np.float32(_DECAY ** len(routes)) * self._recent[sequence]
        self._recent[sequence] = recent

    def forget(self, sequence: str) -> None:
        """Drop a sequence; one that is not known is no error. What its tokens took stays known."""
        self._recent.pop(sequence, None)

    def likely(self, sequences: list[str], tokens: list[int | None]) -> np.ndarray:
        """Return [sequences, L, E] bool: what each one's next token may take; none where nothing is known.

        Args:
            sequences: their ids.
            tokens: the token that each will be fed; None where that is not known yet.
        """
        scores = np.zeros((len(sequences), *self._shape), np.float32)
        for score, sequence, token in zip(scores, sequences, tokens, strict=True):
            if token in self._tokens:
                mean, uses = self._tokens[token]
                score += mean * np.float16(uses / (uses + _DOUBT))
            if sequence in self._recent:
                score += self._recent[sequence]
        best = np.argpartition(-scores, self._top_k - 1, axis=2)[:, :, : self._top_k]
        chosen = np.zeros(scores.shape, bool)
        np.put_along_axis(chosen, best, True, axis=2)
        return chosen & (scores > 0)
