"""Which experts a sequence is likely to take next, by those that its last tokens took.

Knows routes. Knows nothing of models or schedules. Where a token's routes are not known before it runs, this is what a
regrouping goes by: half of what true routes would gain (scripts/bench_scheduler.py).
"""

import numpy as np

_DECAY = 0.9  # of a use, a token later
_LIKELY = 1.5  # as many experts are taken for likely as a token takes


class RecentRoutes:
    """Decayed uses of every sequence's experts.

    Args:
        num_layers: L.
        num_experts: E, the largest number of experts in a layer.
        top_k: K, the most experts that a token takes in a layer.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int):
        self._shape = num_layers, num_experts
        self._likely = min(max(round(_LIKELY * top_k), 1), num_experts)
        self._uses: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._uses)

    def observe(self, sequence: str, routes: np.ndarray) -> None:
        """Take in what a sequence's next tokens took.

        Args:
            sequence: its id.
            routes: [tokens, L, E] bool, in their order.
        """
        uses = self._uses.setdefault(sequence, np.zeros(self._shape, np.float32))
        age = np.arange(len(routes) - 1, -1, -1)
        uses *= _DECAY ** len(routes)
        uses += np.tensordot((_DECAY**age).astype(np.float32), routes.astype(np.float32), axes=1)

    def forget(self, sequence: str) -> None:
        """Drop a sequence; one that is not known is no error."""
        self._uses.pop(sequence, None)

    def likely(self, sequences: list[str]) -> np.ndarray:
        """Return [sequences, L, E] bool: what each one's next token may take; none where nothing is known."""
        out = np.zeros((len(sequences), *self._shape), bool)
        known = [place for place, sequence in enumerate(sequences) if sequence in self._uses]
        if known:
            uses = np.stack([self._uses[sequences[place]] for place in known])
            best = np.argpartition(-uses, self._likely - 1, axis=2)[:, :, : self._likely]
            chosen = np.zeros(uses.shape, bool)
            np.put_along_axis(chosen, best, True, axis=2)
            out[known] = chosen & (uses > 0)
        return out
