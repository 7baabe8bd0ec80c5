"""`expert_memory="auto"` on the CPU: how many slots the process can afford, measured while it runs.

What a process needs beside its experts is not known when it loads (tokenizer, kernels' code, activations, key-value
cache), and a process that takes too much has its own libraries paged out. So the budget starts low and follows what is
really free.
"""

from moeflow import hardware

# Free memory is kept between these shares of the limit, and never below the bytes.
_KEEP_SHARE, _KEEP_BYTES = 0.05, 48 << 20
_GROW_SHARE = 0.5  # of what is free beyond that, taken at a time
_PASSES = 4  # between two measurements in decode


class MemoryGovernor:
    """Tells how many slots may be used.

    Args:
        slot_bytes: bytes of a slot.
        min_slots: never fewer.
        max_slots: never more.
    """

    def __init__(self, slot_bytes: int, min_slots: int, max_slots: int):
        self._slot_bytes = slot_bytes
        self._min_slots = min_slots
        self._max_slots = max_slots
        self._keep_bytes = max(_KEEP_BYTES, int(_KEEP_SHARE * hardware.memory_limit_bytes()))
        self._passes = 0

    def slots(self, used: int, limit: int, *, now: bool = False) -> int:
        """Return the limit from here on.

        Args:
            used: slots that hold an expert.
            limit: the present limit.
            now: measure whatever the last time was.
        """
        self._passes += 1
        if not now and self._passes % _PASSES:
            return limit
        return self.target(used, limit, hardware.available_memory_bytes())

    def target(self, used: int, limit: int, free_bytes: int) -> int:
        """Return the limit for this much free memory; slots under the limit that are still empty count as taken."""
        spare = free_bytes - self._keep_bytes - (limit - used) * self._slot_bytes
        step = spare / self._slot_bytes
        wanted = limit + int(step * _GROW_SHARE) if step > 0 else limit + int(step) - 1
        return max(self._min_slots, min(self._max_slots, wanted))
