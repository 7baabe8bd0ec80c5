"""Counters of the bytes that ranks sent each other, taken from the sizes the exchanges were made with."""

import numpy as np
import torch

from moeflow.expert_parallel.ranks import RankGroup


class Traffic:
    """Counters of [L] layers and [G, G] pairs of ranks; the diagonal counts traffic within a rank.

    Between `gather`s a rank knows only its own traffic.

    Args:
        num_layers: L.
        num_ranks: G.
    """

    def __init__(self, num_layers: int, num_ranks: int) -> None:
        shape = num_layers, num_ranks, num_ranks
        self.assignments = np.zeros(shape, np.int64)
        """[L, G, G], from the token's rank to the expert's."""
        self.dispatch_bytes = np.zeros(shape, np.int64)
        """[L, G, G], hidden states, from the token's rank to the expert's."""
        self.combine_bytes = np.zeros(shape, np.int64)
        """[L, G, G], outputs, from the expert's rank to the token's."""
        self.metadata_bytes = np.zeros(shape[1:], np.int64)
        """[G, G], headers (counts of each expert) and marks of success, from row to column."""
        self.rounds = 0
        """Number of rounds; the same on all ranks."""

    def gather(self, group: RankGroup) -> "Traffic":
        """Return the traffic of all ranks, by their own counters. All ranks must call it."""
        whole = Traffic(len(self.assignments), group.world_size)
        for name in ("assignments", "dispatch_bytes", "combine_bytes", "metadata_bytes"):
            counted = group.gather(torch.from_numpy(getattr(self, name)))
            setattr(whole, name, counted.sum(dim=0).numpy())
        whole.rounds = self.rounds
        return whole

    def as_dict(self) -> dict:
        """Return the sums over the layers, as lists that JSON takes: [G][G] from row to column."""
        return {
            "assignments": self.assignments.sum(axis=0).tolist(),
            "dispatch_bytes": self.dispatch_bytes.sum(axis=0).tolist(),
            "combine_bytes": self.combine_bytes.sum(axis=0).tolist(),
            "metadata_bytes": self.metadata_bytes.tolist(),
            "rounds": self.rounds,
        }
