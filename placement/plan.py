"""A plan: the GPUs that hold each expert, and the replica that serves each token.

Replicas of an expert share its tokens equally: the i-th (token, expert) assignment that comes from GPU h goes to
replica (h + i) mod r of its r. The same rule counts bytes here and routes tokens in
`moeflow.expert_parallel.expert_parallel`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeflow.errors import PlacementError


@dataclass(frozen=True)
class Plan:
    """The GPUs of every expert of every layer.

    Args:
        num_gpus: G.
        experts: [L][E], the GPUs that hold each expert: one or more, distinct, ascending.

    Raises:
        PlacementError: an expert on no GPU, twice on one, or on one that does not exist; layers of unequal length.
    """

    num_gpus: int
    experts: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        if not self.experts or not self.experts[0]:
            raise PlacementError("a plan without experts. Give one list of GPUs for each expert of each layer.")
        for layer, experts in enumerate(self.experts):
            if len(experts) != self.num_experts:
                raise PlacementError(
                    f"the plan has {len(experts)} experts in layer {layer} and {self.num_experts} in layer 0. "
                    "All layers have the same number."
                )
            for expert, gpus in enumerate(experts):
                if not gpus or len(set(gpus)) != len(gpus) or not all(0 <= gpu < self.num_gpus for gpu in gpus):
                    raise PlacementError(
                        f"the plan puts expert {expert} of layer {layer} on GPUs {list(gpus)}. Each expert is on one "
                        f"or more distinct GPUs from 0 to {self.num_gpus - 1}."
                    )
        ordered = tuple(tuple(tuple(sorted(map(int, gpus))) for gpus in experts) for experts in self.experts)
        object.__setattr__(self, "experts", ordered)

    @classmethod
    def of_gpus(cls, num_gpus: int, gpus: np.ndarray) -> "Plan":
        """Make a plan without replicas.

        Args:
            num_gpus: G.
            gpus: [L, E] whole numbers, the GPU of each expert.
        """
        return cls(num_gpus, tuple(tuple((gpu,) for gpu in row) for row in np.asarray(gpus).tolist()))

    @classmethod
    def of_mask(cls, mask: np.ndarray) -> "Plan":
        """Make a plan of [L, E, G] bool, whether each GPU holds each expert."""
        return cls(mask.shape[2], tuple(tuple(tuple(np.flatnonzero(row).tolist()) for row in layer) for layer in mask))

    @property
    def num_layers(self) -> int:
        return len(self.experts)

    @property
    def num_experts(self) -> int:
        return len(self.experts[0])

    @property
    def num_replicas(self) -> np.ndarray:
        """[L, E], how many GPUs hold each expert."""
        return np.array([[len(gpus) for gpus in layer] for layer in self.experts])

    def mask(self) -> np.ndarray:
        """Return [L, E, G] bool, whether each GPU holds each expert."""
        mask = np.zeros((self.num_layers, self.num_experts, self.num_gpus), bool)
        for layer, experts in enumerate(self.experts):
            for expert, gpus in enumerate(experts):
                mask[layer, expert, list(gpus)] = True
        return mask

    def shares(self) -> np.ndarray:
        """Return [L, E, G], the share of an expert's tokens that each GPU serves; each expert's sum to 1."""
        mask = self.mask()
        return mask / mask.sum(axis=2, keepdims=True)

    def copies(self) -> np.ndarray:
        """Return [L, G], how many experts each GPU holds of each layer."""
        return self.mask().sum(axis=1)

    def experts_of(self, layer: int, gpu: int) -> list[int]:
        """Return the experts of a layer that a GPU holds, ascending."""
        return [expert for expert, gpus in enumerate(self.experts[layer]) if gpu in gpus]

    def assignments(self, counts: np.ndarray) -> np.ndarray:
        """Count the assignments that go from each GPU's tokens to each GPU, exactly.

        Args:
            counts: [G, L, E] whole numbers, (token, expert) assignments of the tokens that live on each GPU.

        Returns:
            [L, G, G] int64, from the token's GPU to the expert's.
        """
        counts = np.asarray(counts)
        out = np.zeros((self.num_layers, self.num_gpus, self.num_gpus), np.int64)
        for home in range(self.num_gpus):
            for layer, experts in enumerate(self.experts):
                for expert, gpus in enumerate(experts):
                    count = int(counts[home, layer, expert])
                    for number, gpu in enumerate(gpus):
                        first = (number - home) % len(gpus)  # the first i with (home + i) mod r == number
                        out[layer, home, gpu] += max(-(-(count - first) // len(gpus)), 0)
        return out


def replica_of(gpus: Sequence[int], home: int, index: int) -> int:
    """Return the GPU that serves the index-th assignment of an expert that comes from GPU `home`."""
    return gpus[(home + index) % len(gpus)]
