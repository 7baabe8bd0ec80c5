"""Counts of the experts that each token took in training, with a row for the tokens that never occurred."""

import numpy as np

from moeflow.predictors.odds import MIN_PROBABILITY, multi_hot
from moeflow.predictors.routes import Routes

PRIOR_TOKENS = 2.0  # the weight of the general popularity against a token's own counts
_MAX_ENTRIES = 32_000_000
_MAX_COUNT = 60_000  # files keep counts in 16 bits


class TokenTable:
    """Counts by token, which predictors shrink towards the popularity of all tokens together.

    Args:
        known_ids: [V] int32, ascending.
        num_seen: [V + 1], how often each was fed; row 0 stands for all other tokens and is zero.
        counts: [V + 1, L, E], how often each expert served it.
        popularity: [L, E], probability that any token demands an expert.
    """

    def __init__(self, known_ids: np.ndarray, num_seen: np.ndarray, counts: np.ndarray, popularity: np.ndarray) -> None:
        self.known_ids = known_ids
        self.num_seen = num_seen
        self.counts = counts
        self.popularity = popularity

    @classmethod
    def count(cls, routes: Routes) -> "TokenTable":
        """Count training routes; a table that would grow too large leaves out the rarest tokens."""
        ids = np.concatenate(routes.token_ids)
        known, times = np.unique(ids[ids >= 0], return_counts=True)
        room = _MAX_ENTRIES // (routes.num_layers * routes.num_experts)
        known = np.sort(known[np.argsort(-times, kind="stable")[:room]]).astype(np.int32)
        table = cls(
            known,
            np.zeros(len(known) + 1, np.float32),
            np.zeros((len(known) + 1, routes.num_layers, routes.num_experts), np.float32),
            np.zeros((routes.num_layers, routes.num_experts), np.float32),
        )
        for token_ids, experts in zip(routes.token_ids, routes.experts, strict=True):
            hot, rows = multi_hot(experts, routes.num_experts), table.rows(token_ids)
            np.add.at(table.counts, rows, hot)
            np.add.at(table.num_seen, rows, 1.0)
            table.popularity += hot.sum(0)
        table.popularity /= max(routes.num_tokens, 1)
        np.clip(table.popularity, MIN_PROBABILITY, 1 - MIN_PROBABILITY, out=table.popularity)
        scale = np.minimum(1.0, _MAX_COUNT / np.maximum(table.num_seen, 1.0))
        table.counts, table.num_seen = table.counts * scale[:, None, None], table.num_seen * scale
        table.counts[0], table.num_seen[0] = 0.0, 0.0
        return table

    def rows(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the row of each token, 0 for those that never occurred."""
        if not len(self.known_ids):
            return np.zeros(np.shape(token_ids), np.int64)
        places = np.searchsorted(self.known_ids, token_ids).clip(max=len(self.known_ids) - 1)
        return np.where(self.known_ids[places] == token_ids, places + 1, 0)
