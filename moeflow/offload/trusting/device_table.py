"""Where every resident expert lies, as a table on the device that kernels read themselves.

The host writes what has changed before a launch; kernels that were launched before keep what they saw, since a slot is
not written while they may read it (`Residency.end_use_of_all`). Knows slots. Knows nothing of kernels.
"""

import numpy as np
import torch

from moeflow.offload.slot_pool import SlotPool
from moeflow.policy.cache import ExpertCache

_ABSENT = -1


class DeviceTable:
    """The table of one model's experts.

    Args:
        cache: which expert sits in which slot.
        pool: the slots.
        experts_per_layer: [num_layers] numbers of experts.

    Attributes:
        arena: the pool's base, from which locations count.
        missed: int32 [num_layers], on the device: what a kernel sets to 1 where its layer wants an absent expert.
    """

    def __init__(self, cache: ExpertCache, pool: SlotPool, experts_per_layer: list[int]) -> None:
        shape, device = (len(experts_per_layer), max(experts_per_layer)), pool.base.device
        self.arena = pool.base
        self._cache = cache
        self._pool = pool
        self._slots = np.full(shape, _ABSENT, np.int32)  # that the table shows
        self._on_host = self._slots.copy()  # of the table
        self._locations = torch.full(shape, _ABSENT, dtype=torch.int32, device=device)
        self._rows = [
            self._locations.select(0, layer).narrow(0, 0, count) for layer, count in enumerate(experts_per_layer)
        ]
        self._stale: set[int] = set()  # layers whose row on the device is not the one of the host
        self.missed = torch.zeros(shape[0], dtype=torch.int32, device=device)

    def row(self, layer: int) -> torch.Tensor:
        """Return the location of each expert of a layer, -1 where it is absent: int32 [E] on the device."""
        return self._rows[layer]

    def shown(self, layer: int) -> np.ndarray:
        """Return the slot of each expert as of the last `refresh`, -1 where it is absent: int32 [E] in host memory."""
        return self._slots[layer, : len(self._rows[layer])]

    def refresh(self) -> None:
        """Write the rows that have changed, in the caller's stream. An interrupt leaves the rest to the next call."""
        cache, pool = self._cache, self._pool
        for key in list(cache.moved):
            self._stale.add(key.layer)
            slot = cache.lookup(key)
            self._slots[key] = _ABSENT if slot is None else slot
            self._on_host[key] = _ABSENT if slot is None else pool.location(slot)
            cache.moved.discard(key)
        for layer in list(self._stale):
            # From pageable memory, which the driver copies before it returns: the host's may change at once.
            self._locations.select(0, layer).copy_(torch.from_numpy(self._on_host[layer]), non_blocking=True)
            self._stale.discard(layer)
