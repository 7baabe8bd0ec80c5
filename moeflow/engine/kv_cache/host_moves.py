"""Keys and values of sequences that gave way, moved to host memory, and back when they run again.

Knows slots and measured speeds. Knows nothing of budgets or of who gives way.
"""

import time

import torch

from moeflow.engine.kv_cache.preemption import MeasuredSpeeds
from moeflow.engine.kv_cache.slot_sizes import SlotSizes
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.sequence import Sequence
from moeflow.hardware import available_memory_bytes


class HostMoves:
    """What lies in host memory, by sequence.

    Args:
        sizes: of slots.
        allowed: whether anything moves at all; None: where keys lie on a GPU.

    Attributes:
        speeds: by which moving is weighed against computing again.
    """

    def __init__(self, sizes: SlotSizes, allowed: bool | None) -> None:
        on_gpu = any(shape.device.type != "cpu" for shape in sizes.layout.values())
        self.allowed = on_gpu if allowed is None else allowed
        self.speeds = MeasuredSpeeds()
        self._sizes = sizes
        self._slots: dict[str, KeyValueSlot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def ids(self) -> set[str]:
        """Return the sequences of which something lies in host memory."""
        return set(self._slots)

    def take(self, sequence: Sequence, slot: KeyValueSlot) -> bool:
        """Copy what a sequence has computed to host memory, where that pays; return whether it did."""
        count = sequence.num_computed
        num_bytes = self._sizes.bytes_of(count)
        if not self.allowed or not self.speeds.favour_copy(count, num_bytes, available_memory_bytes() // 2):
            return False
        layout = self._sizes.layout
        try:
            host = {layer: shape._replace(device=torch.device("cpu")) for layer, shape in layout.items()}
            moved = KeyValueSlot.empty(host, count)
        except RuntimeError:
            return False
        self._copy_timed(moved, slot)
        self._slots[sequence.id] = moved
        return True

    def bring_back(self, sequence: Sequence, slot: KeyValueSlot) -> None:
        """Copy what lies there of a sequence into its new slot."""
        moved = self._slots.pop(sequence.id, None)
        if moved is not None:
            self._copy_timed(slot, moved)
            sequence.num_computed = moved.num_positions

    def forget(self, id: str) -> None:
        """Release what lies there of a sequence."""
        self._slots.pop(id, None)

    def clear(self) -> None:
        """Release everything."""
        self._slots.clear()

    def _copy_timed(self, target: KeyValueSlot, source: KeyValueSlot) -> None:
        begin, count = time.perf_counter(), min(target.num_positions, source.num_positions)
        target.copy_from(source, count)
        target.place_window(source.window_parts(count), count)
        for device in {tensor.device for tensor in target.keys.values() if tensor.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        self.speeds.saw_copy(self._sizes.bytes_of(count), time.perf_counter() - begin)
