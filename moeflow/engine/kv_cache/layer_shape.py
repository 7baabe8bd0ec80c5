"""Shape of what one layer keeps of one position: keys, values, and what a policy keeps beside them.

Knows shapes and bytes. Knows nothing of slots.
"""

from typing import NamedTuple

import torch

from moeflow.engine.kv_cache.kv_format import KeyValueFormat


class Note(NamedTuple):
    """Shape of the notes of one layer.

    Args:
        every: rows that have a note together.
        width: numbers of a note, of each head of keys.
        dtype: of the numbers.
    """

    every: int
    width: int
    dtype: torch.dtype

    def position_bytes(self, heads: int) -> int:
        """Return the bytes of a row, rounded up."""
        return -(-heads * self.width * self.dtype.itemsize // self.every)


class LayerShape(NamedTuple):
    """Shape of the keys and values that one layer keeps of one position.

    Args:
        key: [heads, features], as the model computes them.
        value: [heads, features], likewise.
        dtype: of both, as the model computes them.
        device: of both.
        window: most positions that one sees in this layer, itself among them; 0 for all.
        room: positions that an empty slot has in a layer with a window, where it has no fewer in others; None for all.
        form: of the records in which they are kept; None where they are kept as they are.
        note: what a policy keeps beside them; None for nothing.
    """

    key: tuple[int, int]
    value: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    window: int = 0
    room: int | None = None
    form: KeyValueFormat | None = None
    note: Note | None = None

    @property
    def kept(self) -> tuple[tuple[int, int], tuple[int, int], torch.dtype]:
        """What lies in a slot: [heads, numbers] of keys and of values, and the numbers' dtype."""
        if self.form is None:
            return self.key, self.value, self.dtype
        keys = self.key[0], self.form.key.record_bytes(self.key[1])
        values = self.value[0], self.form.value.record_bytes(self.value[1])
        return keys, values, torch.uint8

    @property
    def position_bytes(self) -> int:
        """Bytes of one position."""
        return sum(self._sides)

    @property
    def copied_bytes(self) -> int:
        """Bytes of one position that lie twice while a slot is copied: its keys or its values, or both of a window."""
        return self.position_bytes if self.window else max(self._sides)

    @property
    def _sides(self) -> tuple[int, int]:
        key, value, dtype = self.kept
        return key[0] * key[1] * dtype.itemsize, value[0] * value[1] * dtype.itemsize

    @property
    def note_bytes(self) -> int:
        """Bytes of one position's notes, rounded up."""
        return 0 if self.note is None else self.note.position_bytes(self.key[0])

    def notes(self, num_rows: int) -> torch.Tensor:
        """Make room for the notes of so many rows, [1, heads, num_rows // every, width].

        Raises:
            RuntimeError: there is no memory.
        """
        assert self.note is not None, "a layer without notes"
        every, width, dtype = self.note
        return torch.empty(1, self.key[0], num_rows // every, width, dtype=dtype, device=self.device)
