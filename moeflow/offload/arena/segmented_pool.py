"""A device's slots in segments: allocations of their own, so that a part of the memory can be given back.

Knows where a slot's bytes lie, and which slots have memory. Knows nothing of which expert sits in a slot.
"""

from itertools import pairwise

import numpy as np
import torch

from moeflow.offload.slot_pool import LOCATION_BYTES, SlotPool, slot_bytes

SEGMENT_BYTES = 256 << 20
"""About so much memory a segment has: whole slots, one at least."""

_MOST = 2**31 - 1  # of a location


class SegmentedPool(SlotPool):
    """`num_slots` equal slots, of which some have memory.

    Kernels see addresses that count from the first byte of one segment, the base, which is never given back.

    Args:
        num_slots: how many at most.
        record_bytes: the largest record.
        device: where the memory lies.
        num_open: so many have memory at first; all when None.
        segment_bytes: of a segment, at most.

    Attributes:
        in_segment: slots of a segment; some have fewer.

    Raises:
        BudgetError: the memory could not be allocated.
    """

    def __init__(
        self,
        num_slots: int,
        record_bytes: int,
        device: torch.device,
        *,
        num_open: int | None = None,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        first = num_slots if num_open is None else num_open
        self.in_segment = step = max(1, segment_bytes // slot_bytes(record_bytes))
        begins = [*range(0, first, step), *range(first, num_slots, step), num_slots]
        self._slots_of = [range(begin, end) for begin, end in pairwise(begins)]
        self._segment_of = [number for number, slots in enumerate(self._slots_of) for _ in slots]
        self._segments: list[torch.Tensor | None] = [None] * len(self._slots_of)
        self._locations = [0] * len(self._slots_of)  # of their first slots
        self._num_first = -(-first // step)  # segments with memory at first
        super().__init__(num_slots, record_bytes, device)

    @property
    def num_open(self) -> int:
        """How many slots have memory."""
        return sum(len(self._slots_of[segment]) for segment in self.segments(is_open=True))

    @property
    def num_open_bytes(self) -> int:
        """How much memory the slots have."""
        return self.num_open * self.stride

    def segments(self, *, is_open: bool) -> list[int]:
        """List the segments with memory, or without."""
        return [number for number, memory in enumerate(self._segments) if (memory is not None) == is_open]

    def segments_to_spare(self) -> list[int]:
        """List the segments that can be given back."""
        return [number for number in self.segments(is_open=True) if self._segments[number] is not self.base]

    def slots_of(self, segment: int) -> range:
        """Return the slots of a segment."""
        return self._slots_of[segment]

    def closed_slots(self) -> list[int]:
        return [slot for segment in self.segments(is_open=False) for slot in self._slots_of[segment]]

    def take(self, segment: int) -> bool:
        """Allocate a segment's memory in the caller's stream; return whether there was enough, near the base."""
        try:
            memory = self._memory_for(segment)
        except torch.OutOfMemoryError:  # torch has cleared the device's error
            return False
        location = (memory.data_ptr() - self.address) // LOCATION_BYTES
        if not self._can_reach(location, segment):
            return False
        self._locations[segment] = location
        self._segments[segment] = memory
        return True

    def give_back(self, segments: list[int]) -> None:
        """Give the memory of segments back to the system. Nothing uses it any more, on the device neither."""
        gone = set(segments)
        for key in [key for key in self._views if self._segment_of[key[0]] in gone]:
            del self._views[key]
        for segment in segments:
            self._release(segment)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.empty_cache()

    def record(self, slot: int, num_bytes: int) -> torch.Tensor:
        segment = self._segment_of[slot]
        memory = self._segments[segment]
        assert memory is not None, f"slot {slot} has no memory"
        return memory[slot - self._slots_of[segment][0], :num_bytes]

    def address_of(self, slot: int) -> int:
        return self.address + self.location(slot) * LOCATION_BYTES

    def location(self, slot: int) -> int:
        segment = self._segment_of[slot]
        row = slot - self._slots_of[segment][0]
        return self._locations[segment] + row * (self.stride // LOCATION_BYTES)

    def close(self) -> None:
        self._segments = [None] * len(self._segments)
        super().close()

    def _allocate(self) -> torch.Tensor:
        self.bytes = np.empty((0, 0), np.uint8)  # none that the CPU can address
        memories = [self._memory_for(segment) for segment in range(self._num_first)]
        base = sorted(memories, key=torch.Tensor.data_ptr)[len(memories) // 2]  # in the middle: it reaches both ways
        for segment, memory in enumerate(memories):
            self._locations[segment] = (memory.data_ptr() - base.data_ptr()) // LOCATION_BYTES
            if not self._can_reach(self._locations[segment], segment):
                raise ValueError(f"kernels reach {_MOST * LOCATION_BYTES:,} bytes around one address, no more")
        self._segments[: len(memories)] = memories
        return base

    def _memory_for(self, segment: int) -> torch.Tensor:
        shape = len(self._slots_of[segment]), self.stride
        memory = torch.empty(shape, dtype=torch.uint8, device=self.device)
        assert memory.data_ptr() % LOCATION_BYTES == 0, "torch's allocator aligns to 64 bytes and more"
        return memory

    def _can_reach(self, location: int, segment: int) -> bool:
        return -_MOST <= location <= _MOST - len(self._slots_of[segment]) * (self.stride // LOCATION_BYTES)

    def _release(self, segment: int) -> None:
        self._segments[segment] = None
