"""Slots: one arena of memory for experts of all layers, in host memory; `SegmentedPool` is a device's.

Knows where a slot's bytes lie and how to view them as tensors. Knows nothing of which expert sits in a slot.
"""

import contextlib
import mmap
from typing import NamedTuple

import numpy as np
import torch

from moeflow.core import PAGE_BYTES, TENSOR_ALIGNMENT_BYTES, RecordLayout, align_up
from moeflow.dtypes import tensors_of
from moeflow.errors import BudgetError

# The system hands out pages as experts arrive: where these differ in size, slots never take all their room.
_ARENA_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)


LOCATION_BYTES = TENSOR_ALIGNMENT_BYTES
"""The unit of a slot's location: int32 reaches 137 GB to both sides of a pool's base."""


def slot_bytes(record_bytes: int) -> int:
    """Return the bytes a slot takes for records of this size: whole pages, as direct reads need."""
    return align_up(record_bytes, PAGE_BYTES)


class SlotPool:
    """`num_slots` equal slots in one allocation.

    Args:
        num_slots: how many.
        record_bytes: the largest record.
        device: where the memory lies.

    Attributes:
        base: uint8 [slots, slot_bytes], from whose first byte locations count.

    Raises:
        BudgetError: the memory could not be allocated.
    """

    def __init__(self, num_slots: int, record_bytes: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.stride = slot_bytes(record_bytes)
        self.num_bytes = num_slots * self.stride
        self.device = torch.device(device)
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self._filled = [0] * num_slots  # bytes of each slot that may have pages
        self._arena: mmap.mmap | None = None
        self.bytes: np.ndarray
        self.tensor: torch.Tensor
        try:
            self.base = self._allocate()
        except (OSError, ValueError, MemoryError, RuntimeError) as error:
            raise BudgetError(
                f"{self.num_bytes:,} bytes for {num_slots} expert slots could not be allocated on "
                f"{self.device} ({error}). "
                "Give a smaller expert_memory or host_memory."
            ) from error
        self.address = self.base.data_ptr()

    def record(self, slot: int, num_bytes: int) -> torch.Tensor:
        """Return the first bytes of a slot: uint8 [num_bytes], without a copy."""
        return self.tensor[slot, :num_bytes]

    def address_of(self, slot: int) -> int:
        """Return the address of a slot."""
        return self.address + slot * self.stride

    def location(self, slot: int) -> int:
        """Return where a slot begins, in units of 64 bytes from the first byte of `base`; never -1."""
        return slot * (self.stride // LOCATION_BYTES)

    def views(self, slot: int, layout: RecordLayout) -> dict[str, torch.Tensor]:
        """Return the tensors of the record in `slot`, by parameter name, without a copy."""
        key = (slot, id(layout))
        found = self._views.get(key)
        if found is None:
            found = self._views[key] = tensors_of(self.record(slot, self.stride), layout)
        return found

    def fit(self, slot: int, num_bytes: int) -> None:
        """Size a slot for this many bytes: give pages beyond them back to the system; host memory only."""
        needed = slot_bytes(num_bytes)
        if self._arena is not None and self._filled[slot] > needed:
            self._arena.madvise(mmap.MADV_DONTNEED, slot * self.stride + needed, self._filled[slot] - needed)
        self._filled[slot] = needed

    def discard(self, slots: list[int]) -> None:
        """Give the pages of empty slots back to the system until they are written again; host memory only."""
        for slot in slots:
            self.fit(slot, 0)

    def closed_slots(self) -> list[int]:
        """List the slots without memory."""
        return []

    def shrink(self, num_slots: int) -> None:
        """Keep the first slots alone; none was used yet, so the others' pages were never taken."""
        self.num_slots, self.num_bytes = num_slots, num_slots * self.stride
        self.bytes, self._filled = self.bytes[:num_slots], [0] * num_slots
        self.tensor = self.base = self.tensor[:num_slots]

    def close(self) -> None:
        """Release the memory; views held elsewhere keep it alive until they go."""
        self._views.clear()
        self.bytes, self._arena = np.empty((0, 0), np.uint8), None
        self.tensor = self.base = torch.empty(0)

    def _allocate(self) -> torch.Tensor:
        """Take the memory; return `base`."""
        # mmap: page-aligned, and the system hands out pages only as experts arrive.
        arena = self._arena = mmap.mmap(-1, self.num_bytes, flags=_ARENA_FLAGS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                arena.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(arena, np.uint8).reshape(self.num_slots, self.stride)
        self.tensor = torch.from_numpy(self.bytes)
        return self.tensor


class Resident(NamedTuple):
    """An expert's weights where they lie, valid while their slot is pinned.

    `on_host`: whether the CPU computes it there, beside a device.
    """

    expert: int
    pool: SlotPool
    slot: int
    record: RecordLayout
    on_host: bool = False

    @property
    def address(self) -> int:
        """The address of its record in memory."""
        return self.pool.address_of(self.slot)

    @property
    def location(self) -> int:
        """Its record's place for kernels of a device; see `SlotPool.location`."""
        return self.pool.location(self.slot)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of its record, by name, without a copy."""
        return self.pool.views(self.slot, self.record)
