"""The rank that serves each (token, expert) assignment of one layer: a plan's rule, for a whole call at once.

The rule is `placement.plan.replica_of`'s. Knows expert numbers. Knows nothing of processes or hidden states.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Assignments(NamedTuple):
    """The assignments of one call, in the order in which they are sent: by rank, expert, place.

    Args:
        places: [n], token * K + k of each.
        counts: [G, E], how many go to each rank for each expert.
    """

    places: torch.Tensor
    counts: torch.Tensor


class ReplicaTable:
    """The ranks that hold each expert of one layer, ready to be looked up.

    Args:
        gpus: [E], the ranks that hold each expert, as a plan has them.
        home: the rank that the tokens live on.
        num_gpus: G.
    """

    def __init__(self, gpus: Sequence[Sequence[int]], home: int, num_gpus: int) -> None:
        self._home = home
        self._num_gpus = num_gpus
        self._num_replicas = torch.tensor([len(holders) for holders in gpus])
        most = int(self._num_replicas.max())
        self._gpus = torch.tensor([[*holders] + [0] * (most - len(holders)) for holders in gpus])  # [E, most]

    def assign(self, top_k_index: torch.Tensor) -> Assignments:
        """Return a call's assignments with their ranks.

        Args:
            top_k_index: [T, K], expert numbers; num_experts or more means none.
        """
        flat, num_experts = top_k_index.reshape(-1).cpu(), len(self._gpus)
        order = flat.argsort(stable=True)
        experts = flat[order]
        experts = experts[experts < num_experts]
        order = order[: len(experts)]
        starts = torch.bincount(experts, minlength=num_experts).cumsum(0).roll(1)
        starts[0] = 0
        index = torch.arange(len(experts)) - starts[experts]  # of each assignment among its expert's
        gpus = self._gpus[experts, (self._home + index) % self._num_replicas[experts]]
        counts = torch.bincount(gpus * num_experts + experts, minlength=self._num_gpus * num_experts)
        return Assignments(order[gpus.argsort(stable=True)], counts.view(self._num_gpus, num_experts))
