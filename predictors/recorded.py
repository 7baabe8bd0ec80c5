"""Predictor from the lookahead that a trace recorded: ranks of experts, turned into probabilities."""

import numpy as np

_PRIOR_TRIALS = 8.0  # of each rank, before the first
_DECAY = 0.999  # of trials and hits, a layer


class RecordedLookahead:
    """Predicts from the expert ids a trace holds for the coming layers, likeliest first.

    It learns a rank's probability while the trace is replayed: for each distance and rank, the share of its experts
    that were then demanded; experts that are not listed share one such rate.

    Args:
        num_layers: L.
        num_experts: E.
        top_k: K.
        reach: D, layers ahead that the trace holds.
        num_ranks: M, experts of each.
    """

    name = "lookahead"
    signal = "recorded"

    def __init__(self, num_layers: int, num_experts: int, top_k: int, reach: int, num_ranks: int) -> None:
        self.num_layers, self.num_experts, self.reach = num_layers, num_experts, reach
        first = np.where(np.arange(num_ranks) < top_k, 0.7, 0.1)
        unlisted = max(top_k - first.sum(), 0.0) / max(num_experts - num_ranks, 1)
        self._trials = np.full((reach, num_ranks + 1), _PRIOR_TRIALS)  # the last column: experts that are not listed
        self._hits = self._trials * np.append(first, np.clip(unlisted, 0.001, 0.5))
        self.begin(1)

    def begin(self, num_sequences: int) -> None:
        self._listed: dict[int, list[tuple[int, np.ndarray]]] = {}  # layer -> predictions of it: (distance, [B, M])
        self._sequences = np.arange(num_sequences)[:, None]

    def prefill(self, token_ids: np.ndarray, experts: np.ndarray, weights: np.ndarray | None) -> None:
        pass

    def step(self, token_ids: np.ndarray) -> None:
        self._listed.clear()

    def observe(
        self, layer: int, experts: np.ndarray, weights: np.ndarray | None, signal: np.ndarray | None = None
    ) -> np.ndarray | None:
        self._learn(layer, experts)
        known = min(self.reach, self.num_layers - 1 - layer)
        if signal is None or not known:
            return None
        unsaid = (signal[:, :known] >= self.num_experts).all(2)
        if unsaid.all():
            return None
        rates = (self._hits / self._trials).astype(np.float32)
        num_ranks = rates.shape[1] - 1
        shape = (len(experts), known, self.num_experts + 1)
        answer = np.broadcast_to(rates[:known, -1:], shape).copy()
        listed = np.minimum(signal[:, :known, :num_ranks], self.num_experts)
        distances = np.arange(known)[None, :, None]
        answer[self._sequences[:, :, None], distances, listed] = rates[None, :known, : listed.shape[2]]
        for distance in range(known):
            self._listed.setdefault(layer + 1 + distance, []).append((distance, listed[:, distance]))
        answer[unsaid] = np.nan
        return answer[:, :, :-1]

    def later(self) -> None:
        return None

    def _learn(self, layer: int, experts: np.ndarray) -> None:
        demanded = np.zeros((len(experts), self.num_experts + 1), bool)
        demanded[self._sequences, np.minimum(experts, self.num_experts)] = True
        demanded[:, -1] = False
        took_part = np.any(demanded, axis=1)
        for distance, listed in self._listed.pop(layer, ()):
            said = (listed < self.num_experts) & took_part[:, None]
            hits = np.where(said, demanded[self._sequences, listed], False)
            trials, successes = self._trials[distance], self._hits[distance]
            trials *= _DECAY
            successes *= _DECAY
            ranks = listed.shape[1]
            trials[:ranks] += said.sum(0)
            successes[:ranks] += hits.sum(0)
            spoke = said.any(1)
            trials[-1] += (self.num_experts - said[spoke].sum(1)).sum()
            successes[-1] += (demanded[spoke].sum(1) - hits[spoke].sum(1)).sum()
