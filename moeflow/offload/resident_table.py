"""Where every resident expert lies, as a table that compiled code reads, and the count of what it used.

Holds only while the runtime is held (`ExpertRuntime.holding`): residency changes between such calls alone.
"""

import numpy as np

from moeflow.core import ExpertKey
from moeflow.offload.slot_pool import SlotPool
from moeflow.offload.stats import Stats
from moeflow.policy.cache import ExpertCache


class ResidentTable:
    """The table of one model's residents.

    Args:
        cache: which expert sits in which slot.
        pool: the slots.
        stats: the counters.
        experts_per_layer: [num_layers] numbers of experts.

    Attributes:
        addresses: where each expert lies, 0 where it is not resident: [num_layers, most experts of a layer] int64. It
            stays where it is, and is right after `refresh`.
    """

    def __init__(self, cache: ExpertCache, pool: SlotPool, stats: Stats, experts_per_layer: list[int]) -> None:
        self.addresses = np.zeros((len(experts_per_layer), max(experts_per_layer)), np.int64)
        self._cache = cache
        self._pool = pool
        self._stats = stats

    def refresh(self) -> None:
        """Write the addresses that have changed. An interrupt in any line leaves the rest to the next call."""
        cache, pool = self._cache, self._pool
        for key in list(cache.moved):
            slot = cache.lookup(key)
            self.addresses[key] = 0 if slot is None else pool.address_of(slot)
            cache.moved.discard(key)

    def count(self, layers: list[int], experts: list[np.ndarray], compute_s: float) -> None:
        """Count layers that found all their experts in the table, as `ExpertRuntime.fetch` would have.

        Args:
            layers: their numbers, in their order.
            experts: of each, [T, K] expert numbers.
            compute_s: seconds in their arithmetic.
        """
        stats = self._stats.now
        of_one = _of_one_token(layers, experts)
        if of_one is not None:
            self._cache.touch_layers(np.array(layers), of_one)
            stats.hits += of_one.size
            stats.decisions.layers_ready += len(layers)
        else:
            for layer, chosen in zip(layers, experts, strict=True):
                demanded = dict.fromkeys(chosen[0].tolist()) if len(chosen) == 1 else np.unique(chosen).tolist()
                self.count_layer(layer, list(demanded), 0)
        stats.compute_s += compute_s

    def count_layer(self, layer: int, experts: list[int], compute_s: float) -> None:
        """Count one layer, as `count` does.

        Args:
            layer: its number.
            experts: distinct ones that it asked for, in the order of `ExpertRuntime.fetch`.
            compute_s: seconds in their arithmetic.
        """
        stats = self._stats.now
        self._cache.touch([ExpertKey(layer, expert) for expert in experts])
        stats.hits += len(experts)
        stats.decisions.layers_ready += 1
        stats.compute_s += compute_s


def _of_one_token(layers: list[int], experts: list[np.ndarray]) -> np.ndarray | None:
    """Return the experts [N, K] of one token in different layers; None where they are not that, or one comes twice."""
    shape = experts[0].shape
    if shape[0] != 1 or any(one.shape != shape for one in experts) or len(set(layers)) < len(layers):
        return None
    together = np.concatenate(experts)
    in_order = np.sort(together, axis=1)
    return None if (in_order[:, 1:] == in_order[:, :-1]).any() else together
