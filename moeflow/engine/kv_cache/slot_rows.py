"""Rows of slots as a native step reads them.

Knows slots, shapes and addresses. Knows nothing of budgets, sequences or models.
"""

import numpy as np

from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.hf.passes.caches.growing_cache import KeptShape


class SlotRows:
    """Keys and values of some sequences, each in a slot of its own, as a native step reads them.

    Args:
        slots: [rows].
        lengths: [rows], positions that each has.
    """

    def __init__(self, slots: list[KeyValueSlot], lengths: list[int]) -> None:
        self.lengths = np.array(lengths)
        self._slots = slots

    def fits(self, layers: dict[int, KeptShape], num_rows: int) -> bool:
        """Whether these layers, by their numbers, are kept of so many sequences in these shapes."""
        layout = self._slots[0].layout  # all have one
        if len(self._slots) != num_rows or layers.keys() != layout.keys():
            return False
        return all(
            KeptShape(own.key[0], own.key[1], own.value[1], own.dtype) == shape
            and (own.device.type, own.value[0]) == ("cpu", own.key[0])
            for own, shape in ((layout[layer], layers[layer]) for layer in layers)
        )

    @property
    def record_format(self) -> int:
        """The number of the records' format in the library; 0 where keys and values are kept as they are."""
        form = next(iter(self._slots[0].layout.values())).form  # one for all layers
        return 0 if form is None else form.number

    def table(self, layers: dict[int, KeptShape]) -> np.ndarray:
        """Return where keys and values lie.

        Returns:
            [layers, rows, 3] int64: addresses of position 0 of keys and of values, and the positions from one head to
            the next.
        """
        return np.stack([slot.addresses(tuple(layers)) for slot in self._slots], 1)

    def advance(self, layers: dict[int, KeptShape]) -> None:
        """Nothing: sequences count their positions themselves."""
