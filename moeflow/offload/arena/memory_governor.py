"""Number of slots that the process can afford, measured while it runs: `expert_memory="auto"` on the CPU.

The need of a process beside its experts is not known when it loads (tokenizer, kernels' code, activations, KV cache),
and a process that takes too much has its own libraries paged out. So the budget starts low and follows the memory that
is really free.
"""

from moeflow import hardware
from moeflow.offload.arena.governor import Governor

# Free memory is kept at this share of the limit, and never below the bytes.
_KEEP_SHARE, _KEEP_BYTES = 0.05, 48 << 20
_GROW_SHARE = 0.5  # of the free memory beyond that, taken at a time
_PASSES_PER_MEASUREMENT = 4  # in decode


class MemoryGovernor(Governor):
    """Limits the number of slots in use by the memory that is free.

    Args:
        slot_bytes: bytes of a slot.
        min_slots: never fewer.
        max_slots: never more.
    """

    def __init__(self, slot_bytes: int, min_slots: int, max_slots: int) -> None:
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
            now: measure in this pass, however recent the last measurement.
        """
        self._passes += 1
        if not now and self._passes % _PASSES_PER_MEASUREMENT:
            return limit
        return self.target(used, limit, hardware.available_memory_bytes())

    def target(self, used: int, limit: int, free_bytes: int) -> int:
        """Return the limit for this much free memory; empty slots under the present limit count as taken."""
        spare = free_bytes - self._keep_bytes - (limit - used) * self._slot_bytes
        step = spare / self._slot_bytes
        wanted = limit + int(step * _GROW_SHARE) if step > 0 else limit + int(step) - 1
        return max(self._min_slots, min(self._max_slots, wanted))
