"""The host tier: pinned slots between disk and device, with a cache of their own."""

from moeflow.offload.slot_pool import SlotPool
from moeflow.policy.cache import ExpertCache


class HostTier:
    """Pinned slots and the cache that fills them.

    Args:
        pool: pinned host memory.
        cache: which expert sits in which of its slots.
    """

    def __init__(self, pool: SlotPool, cache: ExpertCache) -> None:
        self.pool = pool
        self.cache = cache
        # The end of the last copy out of each slot: the slot may not be overwritten before it.
        self.last_copy: list[object] = [None] * pool.num_slots
