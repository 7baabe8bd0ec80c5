"""Number of slots that a GPU can afford while others use it too: `expert_memory="auto"` on a GPU.

Another process may take the GPU's memory after loading. Experts are the part that can be given back: whole segments go
before a pass runs out of memory, and come again, one part after another, when there is room.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from moeflow.offload.arena.governor import Governor
from moeflow.offload.arena.segmented_pool import SegmentedPool

_KEEP_SHARE = 0.75  # of what a pass may need; below, segments are given back
_GROW_SHARE = 0.5  # of the segments that there is room for, taken at a time
_PASSES_PER_MEASUREMENT = 4  # in decode
_PASSES_AFTER_REFUSAL = 64  # without asking for more, where the device refused what it seemed to have


class DeviceMemory(NamedTuple):
    """A device's memory at a moment.

    Args:
        free_bytes: that this process can take.
        key_value_bytes: that it has taken since loading, beside the experts: keys and values, mostly.
    """

    free_bytes: int
    key_value_bytes: int


class DeviceMeter:
    """Measures one GPU's memory, and touches no other. Make it when the pool is made, and nothing is loaded after that.

    Args:
        pool: the experts' memory.
    """

    def __init__(self, pool: SegmentedPool) -> None:
        self._pool = pool
        self._dense_bytes = torch.cuda.memory_allocated(pool.device) - pool.num_open_bytes

    def measure(self) -> DeviceMemory:
        """Return what there is now; waits for nothing. What torch's allocator keeps unused is free."""
        device = self._pool.device
        free, _ = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        usable = free + torch.cuda.memory_reserved(device) - allocated
        return DeviceMemory(usable, max(allocated - self._dense_bytes - self._pool.num_open_bytes, 0))


class DeviceGovernor(Governor):
    """Limits the number of slots by the memory that is free on a device.

    Args:
        pool: the slots.
        min_slots: never fewer.
        measure: returns the memory.
        pass_bytes: that a pass may need: activations, experts' outputs.
        key_value_bytes: that keys and values are to have.
    """

    def __init__(
        self,
        pool: SegmentedPool,
        min_slots: int,
        *,
        measure: Callable[[], DeviceMemory],
        pass_bytes: int,
        key_value_bytes: int,
    ) -> None:
        self._in_segment = pool.in_segment
        self._segment_bytes = pool.in_segment * pool.stride
        self._min_slots, self._max_slots = min_slots, pool.num_slots
        self._measure = measure
        self._pass_bytes = pass_bytes
        self._key_value_bytes = key_value_bytes
        self._passes, self._grows_from = 0, 0
        self._limit, self._asked = 0, 0  # at the last call: the one that was, and the one that was asked for

    def slots(self, used: int, limit: int, *, now: bool = False) -> int:
        """Return the limit from here on.

        Args:
            used: slots that hold an expert; here all have memory, whether they do or not.
            limit: the present limit.
            now: measure in this pass, however recent the last measurement.
        """
        self._passes += 1
        if limit <= self._limit < self._asked:  # the device had no memory for what was asked
            self._grows_from = self._passes + _PASSES_AFTER_REFUSAL
        self._limit = self._asked = limit
        if now or self._passes % _PASSES_PER_MEASUREMENT == 0:
            target = self.target(limit, self._measure())
            self._asked = target if self._passes >= self._grows_from else min(limit, target)
        return self._asked

    def target(self, limit: int, memory: DeviceMemory) -> int:
        """Return the limit for this memory."""
        missing = int(_KEEP_SHARE * self._pass_bytes) - memory.free_bytes
        if missing > 0:
            wanted = limit + missing // -self._segment_bytes * self._in_segment
        else:
            promised = max(self._key_value_bytes - memory.key_value_bytes, 0)
            room = max(memory.free_bytes - self._pass_bytes - promised, 0) // self._segment_bytes
            wanted = limit + math.ceil(room * _GROW_SHARE) * self._in_segment
        return max(self._min_slots, min(self._max_slots, wanted))
