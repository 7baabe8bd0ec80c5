"""A device's slots in segments of two, whose memory had an owner before and gets one afterwards."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from helpers.queued_device import GARBAGE, pages
from moeflow.core import PAGE_BYTES
from moeflow.offload.arena.segmented_pool import SegmentedPool


class WatchedPool(SegmentedPool):
    """Tells a run's device of the other owners, and is refused memory at times.

    Args:
        run: a `DeviceRun`.
        num_slots: how many at most; some of them have memory at first.
        record_bytes: the largest record.
        device: where the memory lies.
    """

    def __init__(self, run, num_slots, record_bytes, device):
        self._run, self._is_whole = run, False
        num_open = run.random.randint(2, num_slots)
        super().__init__(num_slots, record_bytes, device, num_open=num_open, segment_bytes=2 * PAGE_BYTES)
        self._is_whole = True

    def _memory_for(self, segment):
        run = self._run
        if self._is_whole and run.random.random() < 0.2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        shape = len(self._slots_of[segment]), self.stride
        whole = torch.empty(shape[0] * shape[1] + PAGE_BYTES, dtype=torch.uint8)
        begin = -whole.data_ptr() % PAGE_BYTES  # no page is of two segments
        memory = whole[begin : begin + shape[0] * shape[1]].view(shape)
        steps = [lambda: memory.numpy().fill(GARBAGE)]
        run.device.launch("the owner before", steps, writes=self._pages(memory))
        return memory

    def _release(self, segment):
        memory = self._segments[segment]
        self._run.device.host_access("the next owner", writes=self._pages(memory))
        memory.fill_(GARBAGE)
        self._run.given_back.append(StorageWeakRef(memory.untyped_storage()))
        super()._release(segment)

    def _pages(self, memory):
        return set().union(*(pages(row.data_ptr(), self.stride) for row in memory))
