"""KV cache: one slot of keys and values a sequence, sized for all positions that it may reach.

Knows shapes, and bytes against a budget. Knows nothing of schedulers or models.
"""

from typing import NamedTuple

import numpy as np
import torch

from moeflow.errors import BudgetError
from moeflow.hf.passes.growing_cache import KeptShape
from moeflow.memory_size import MemorySize, parse_kv_memory

_AUTO_BYTES = 2 << 30  # kv_memory="auto" takes no more where nothing was planned


def kv_budget(kv_memory: MemorySize, planned_bytes: int | None) -> int:
    """Return the bytes that all keys and values may take.

    Args:
        kv_memory: the option.
        planned_bytes: what was kept for them when the model was loaded; None where nothing was.

    Raises:
        ConfigError: it is no size.
    """
    if kv_memory == "auto":
        return _AUTO_BYTES if planned_bytes is None else planned_bytes
    return parse_kv_memory(kv_memory)


class LayerShape(NamedTuple):
    """Shape of the keys and values that one layer keeps of one position.

    Args:
        key: [heads, features].
        value: [heads, features].
        dtype: of both.
        device: of both.
    """

    key: tuple[int, int]
    value: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def position_bytes(self) -> int:
        """Bytes of one position."""
        return (self.key[0] * self.key[1] + self.value[0] * self.value[1]) * self.dtype.itemsize


class KeyValueSlot:
    """The keys and values of one sequence.

    Args:
        layout: the layers that keep any, by their number.
        num_positions: room for so many.
    """

    def __init__(self, layout: dict[int, LayerShape], num_positions: int) -> None:
        self.num_positions = num_positions
        # Of each layer, [1, heads, num_positions, features].
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        for layer, shape in layout.items():
            for kept, (heads, features) in ((self.keys, shape.key), (self.values, shape.value)):
                kept[layer] = torch.empty(1, heads, num_positions, features, dtype=shape.dtype, device=shape.device)
        self._addresses: dict[tuple[int, ...], np.ndarray] = {}

    def write(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put keys and values, [1, heads, positions, features], from position `start` on."""
        end = start + keys.shape[2]
        assert end <= self.num_positions, f"position {end - 1} of a slot of {self.num_positions}"
        self.keys[layer][:, :, start:end] = keys
        self.values[layer][:, :, start:end] = values

    def read(self, layer: int, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of the first positions' keys and values, [1, heads, num_positions, features]."""
        return self.keys[layer][:, :, :num_positions], self.values[layer][:, :, :num_positions]

    def addresses(self, layers: tuple[int, ...]) -> np.ndarray:
        """Return addresses of keys and of values, and `num_positions`, of each of these layers: [layers, 3] int64."""
        if layers not in self._addresses:
            rows = [(self.keys[n].data_ptr(), self.values[n].data_ptr(), self.num_positions) for n in layers]
            self._addresses[layers] = np.array(rows, np.int64)
        return self._addresses[layers]

    def copy_from(self, other: "KeyValueSlot", num_positions: int) -> None:
        """Copy the first positions of another sequence."""
        for layer in self.keys:
            self.write(layer, 0, *other.read(layer, num_positions))


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
        slot = self._slots[0]  # all have one layout
        if len(self._slots) != num_rows or layers.keys() != slot.keys.keys():
            return False
        return all(
            KeptShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype) == shape
            and (keys.device.type, values.dtype, values.shape[1]) == ("cpu", keys.dtype, keys.shape[1])
            for keys, values, shape in ((slot.keys[layer], slot.values[layer], layers[layer]) for layer in layers)
        )

    def table(self, layers: dict[int, KeptShape]) -> np.ndarray:
        """Return where keys and values lie.

        Returns:
            [layers, rows, 3] int64: addresses of keys and of values, and the positions that there is room for.
        """
        return np.stack([slot.addresses(tuple(layers)) for slot in self._slots], 1)

    def advance(self, layers: dict[int, KeptShape]) -> None:
        """Nothing: sequences count their positions themselves."""


class KeyValueSlots:
    """The slots of all sequences, inside one budget.

    Args:
        layout: the layers that keep keys and values, by their number.
        budget_bytes: most bytes of all slots together.
        max_positions: most positions of all slots together, beyond which a budget is of no use; None for no limit.
    """

    def __init__(self, layout: dict[int, LayerShape], budget_bytes: int, max_positions: int | None = None) -> None:
        self.layout = layout
        self.position_bytes = sum(shape.position_bytes for shape in layout.values())
        if max_positions is not None:
            budget_bytes = min(budget_bytes, max_positions * self.position_bytes)
        self.budget_bytes = budget_bytes
        self.used_bytes = self.peak_bytes = 0
        self._slots: dict[str, KeyValueSlot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, id: str) -> KeyValueSlot:
        return self._slots[id]

    def check_possible(self, num_positions: int) -> None:
        """Refuse a sequence that is larger than the whole budget.

        Raises:
            BudgetError: so many positions are more than the whole budget.
        """
        needed = num_positions * self.position_bytes
        if needed > self.budget_bytes:
            raise BudgetError(
                f"the keys and values of {num_positions:,} positions (prompt and new tokens) take {needed:,} bytes, "
                f"and kv_memory is {self.budget_bytes:,} bytes. Give more, or ask for fewer new tokens."
            )

    def allocate(self, id: str, num_positions: int) -> bool:
        """Give a sequence its slot, and return whether the budget has room for it.

        Raises:
            BudgetError: the budget has, and the machine has not.
        """
        assert id not in self._slots, f"{id} has a slot"
        needed = num_positions * self.position_bytes
        if self.used_bytes + needed > self.budget_bytes:
            return False
        try:
            self._slots[id] = KeyValueSlot(self.layout, num_positions)
        except RuntimeError as error:
            told = str(error).partition("\n")[0]
            raise BudgetError(
                f"there is no memory for keys and values of {needed:,} bytes ({told}), though kv_memory allows "
                f"{self.budget_bytes:,} in all and {self.used_bytes:,} are used. Give less, or free memory."
            ) from None
        self.used_bytes += needed
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return True

    def free(self, id: str) -> None:
        """Release a sequence's slot."""
        self.used_bytes -= self._slots.pop(id).num_positions * self.position_bytes

    def clear(self) -> None:
        """Release every slot."""
        self._slots.clear()
        self.used_bytes = 0

    def check_integrity(self) -> None:
        """Assert that the counted bytes are those of the slots' tensors, and inside the budget."""
        found = sum(
            tensor.nbytes
            for slot in self._slots.values()
            for tensors in (slot.keys, slot.values)
            for tensor in tensors.values()
        )
        assert found == self.used_bytes, f"slots of {found} bytes are counted as {self.used_bytes}"
        assert self.used_bytes <= self.budget_bytes, "slots are beyond their budget"
