"""Slots: keys and values of positions of one sequence, and rows of them as a native step reads them.

Knows shapes and tensors. Knows nothing of budgets, sequences or models.
"""

from typing import NamedTuple

import numpy as np
import torch

from moeflow.hf.passes.caches.growing_cache import KeptShape


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
    """Keys and values of one sequence's positions.

    Args:
        keys: of each layer that keeps any, [1, heads, positions, features].
        values: likewise.
        num_positions: room for so many in each layer.
    """

    def __init__(self, keys: dict[int, torch.Tensor], values: dict[int, torch.Tensor], num_positions: int) -> None:
        self.keys, self.values, self.num_positions = keys, values, num_positions
        self._addresses: dict[tuple[int, ...], np.ndarray] = {}

    @classmethod
    def empty(cls, layout: dict[int, LayerShape], num_positions: int) -> "KeyValueSlot":
        """Make room for so many positions.

        Raises:
            RuntimeError: there is no memory.
        """

        def room(shape: LayerShape, heads: int, features: int) -> torch.Tensor:
            return torch.empty(1, heads, num_positions, features, dtype=shape.dtype, device=shape.device)

        keys = {layer: room(shape, *shape.key) for layer, shape in layout.items()}
        return cls(keys, {layer: room(shape, *shape.value) for layer, shape in layout.items()}, num_positions)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensors in (self.keys, self.values) for tensor in tensors.values())

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
        """Return addresses of keys and of values, and their positions, of each of these layers: [layers, 3] int64."""
        if layers not in self._addresses:
            rows = [(self.keys[n].data_ptr(), self.values[n].data_ptr(), self.keys[n].shape[2]) for n in layers]
            self._addresses[layers] = np.array(rows, np.int64)
        return self._addresses[layers]

    def copy_from(self, other: "KeyValueSlot", num_positions: int, start: int = 0) -> None:
        """Copy the first positions of another slot, on any device, to the positions from `start` on."""
        for layer in self.keys:
            self.write(layer, start, *other.read(layer, num_positions))

    def grow(self, num_positions: int, num_written: int) -> None:
        """Make room for more positions, and keep the first `num_written`; every address changes.

        One layer after the other, so that hardly more memory is taken than that of the larger slot.

        Raises:
            RuntimeError: there is no memory; what was written is still there.
        """
        for layer, tensors in {layer: (self.keys[layer], self.values[layer]) for layer in self.keys}.items():
            if tensors[0].shape[2] < num_positions:  # not where an attempt before ended behind this layer
                larger = [one.new_empty(*one.shape[:2], num_positions, one.shape[3]) for one in tensors]
                for new, old in zip(larger, tensors, strict=True):
                    new[:, :, :num_written] = old[:, :, :num_written]
                self._addresses.clear()
                self.keys[layer], self.values[layer] = larger
        self.num_positions = num_positions

    def part(self, begin: int, end: int) -> "KeyValueSlot":
        """Copy positions into a slot of their own.

        Raises:
            RuntimeError: there is no memory.
        """
        keys, values = (
            {layer: _cut(tensor, begin, end) for layer, tensor in tensors.items()}
            for tensors in (self.keys, self.values)
        )
        return KeyValueSlot(keys, values, end - begin)

    def give_up(self, begin: int, end: int) -> "KeyValueSlot":
        """Turn into a slot of these positions alone; this one holds nothing any more.

        One layer after the other, and without a copy where these are all positions.

        Raises:
            RuntimeError: there is no memory.
        """
        given: tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]] = {}, {}
        for own, others in zip((self.keys, self.values), given, strict=True):
            for layer in list(own):
                tensor = own.pop(layer)
                others[layer] = tensor if end - begin == tensor.shape[2] else _cut(tensor, begin, end)
        self._addresses.clear()
        return KeyValueSlot(*given, end - begin)


def _cut(tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Copy positions of a [1, heads, positions, features] tensor into one of their own."""
    return tensor[:, :, begin:end].clone(memory_format=torch.contiguous_format)


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
