"""Slots: keys and values of positions of one sequence.

Knows shapes and tensors. Knows nothing of budgets, sequences or models.
"""

from typing import Any

import numpy as np
import torch

from moeflow.engine.kv_cache.kv_format import KeyValueFormat
from moeflow.engine.kv_cache.layer_shape import LayerShape
from moeflow.engine.kv_cache.windows import (
    MARGIN,
    Stretch,
    WindowPart,
    chosen_rows,
    cut,
    first_needed,
    joined,
    last_place,
    resized,
    wanted,
)


class KeyValueSlot:
    """Keys and values of one sequence's positions.

    Layers without a window have room for all positions, those with one for some of them, which move on. Where a policy
    lets rows of the others go, later ones move down. What is copied from slot to slot is copied as it is kept; only
    `write` and `read` know of formats.

    Args:
        keys: of each layer that keeps any, [1, heads, positions, features], or bytes of records in place of features.
        values: likewise.
        num_positions: room for so many in each layer without a window: its rows.
        window: most positions that one sees in the layers with a window.
        origins: of each layer with a window, the first position that it has room for.
        layout: of the layers; without one, of a slot of which others copy, all are as they are kept.

    Attributes:
        marks: places whose window is worth keeping while the sequence goes on.
        aside: windows before marked places that the sequence itself needs no more.
        forgotten: positions before the last rows that layers without a window have let go.
        notes: of each layer that has any, [1, heads, rows // every, width].
        found: what a policy found in the pass before, or knows of its notes, by layer.
    """

    def __init__(
        self,
        keys: dict[int, torch.Tensor],
        values: dict[int, torch.Tensor],
        num_positions: int,
        window: int = 0,
        origins: dict[int, int] | None = None,
        layout: dict[int, LayerShape] | None = None,
    ) -> None:
        self.keys, self.values, self.num_positions = keys, values, num_positions
        self.window = window
        self.layout = {} if layout is None else layout
        self.marks: set[int] = set()
        self.aside: list[WindowPart] = []
        self.forgotten = 0
        self.notes: dict[int, torch.Tensor] = {}
        self.found: dict[int, Any] = {}
        self._origins = {} if origins is None else origins
        self._addresses: dict[tuple[int, ...], np.ndarray] = {}

    @classmethod
    def empty(cls, layout: dict[int, LayerShape], num_positions: int) -> "KeyValueSlot":
        """Make room for so many positions, or in layers with a window for the first of them.

        Raises:
            RuntimeError: there is no memory.
        """
        return cls.behind(layout, num_positions, [])

    @classmethod
    def behind(cls, layout: dict[int, LayerShape], num_positions: int, runs: list["KeyValueSlot"]) -> "KeyValueSlot":
        """Make room likewise, with the positions of some runs, one behind the other, in layers without a window.

        The last run's tensors leave it one after the other, as they are copied; of the others nothing leaves.

        Raises:
            RuntimeError: there is no memory; the last run may have lost some layers.
        """
        keys: dict[int, torch.Tensor] = {}
        values: dict[int, torch.Tensor] = {}
        for layer, shape in layout.items():
            count = num_positions if shape.room is None else min(num_positions, shape.room)
            key, value, dtype = shape.kept
            for made, (heads, width) in ((keys, key), (values, value)):
                made[layer] = torch.empty(1, heads, count, width, dtype=dtype, device=shape.device)
                end = 0
                for run in runs if not shape.window else ():
                    begin, end, kept = end, end + run.num_positions, run.keys if made is keys else run.values
                    made[layer][:, :, begin:end] = kept.pop(layer) if run is runs[-1] else kept[layer]
        windows = {layer: shape.window for layer, shape in layout.items() if shape.window}
        slot = cls(keys, values, num_positions, max(windows.values(), default=0), dict.fromkeys(windows, 0), layout)
        slot.notes = {layer: shape.notes(num_positions) for layer, shape in layout.items() if shape.note is not None}
        return slot

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, those of notes rounded up to whole ones of each row."""
        of_tensors = sum(tensor.nbytes for tensors in (self.keys, self.values) for tensor in tensors.values())
        of_tensors += self.num_positions * sum(self.layout[layer].note_bytes for layer in self.notes)
        return of_tensors + sum(part.nbytes for part in self.aside)

    @property
    def plain_keys(self) -> dict[int, torch.Tensor]:
        """The keys of layers without a window."""
        return {layer: self.keys[layer] for layer in self._plain}

    @property
    def end(self) -> int:
        """The position behind the last one that layers without a window have room for."""
        return self.num_positions + self.forgotten

    @property
    def _plain(self) -> list[int]:
        """The layers without a window."""
        return [layer for layer in self.keys if layer not in self._origins]

    @property
    def in_window(self) -> Stretch:
        """The positions that every layer with a window has room for; as many as there may be where none has one."""
        if not self._origins:
            return 0, self.num_positions
        ends = (origin + self.keys[layer].shape[2] for layer, origin in self._origins.items())
        return max(self._origins.values()), min(ends)

    def write(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put keys and values, [1, heads, positions, features], from position `start` on."""
        form = self._form(layer)
        if form is not None:
            keys, values = form.key.encode(keys), form.value.encode(values)
        self._put(layer, start, keys, values)

    def _form(self, layer: int) -> KeyValueFormat | None:
        return self.layout[layer].form if layer in self.layout else None

    def _put(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        origin, end = self._origins.get(layer, self.forgotten), start + keys.shape[2]
        room = self.keys[layer].shape[2]
        assert origin <= start <= end <= origin + room, f"position {end - 1} of a slot of {room} from {origin} on"
        self.keys[layer][:, :, start - origin : end - origin] = keys
        self.values[layer][:, :, start - origin : end - origin] = values

    def read(self, layer: int, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first positions' keys and values, [1, heads, num_positions, features]; of rows, those not let go.

        They are views where they are kept as they are; where a window has moved on, copies with zeros in place of what
        it has left behind. No query sees these, and sums over all positions are rounded as if they were there.
        """
        keys, values = self._get(layer, num_positions)
        form = self._form(layer)
        if form is not None:
            shape = self.layout[layer]
            keys = form.key.decode(keys, shape.key[1], shape.dtype)
            values = form.value.decode(values, shape.value[1], shape.dtype)
        return keys, values

    def _get(self, layer: int, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        origin, both = self._origins.get(layer, 0), (self.keys[layer], self.values[layer])
        if origin:
            wholes = []
            for tensor in both:
                whole = tensor.new_zeros(*tensor.shape[:2], num_positions, tensor.shape[3])
                whole[:, :, origin:] = tensor[:, :, : num_positions - origin]
                wholes.append(whole)
            return wholes[0], wholes[1]
        num_rows = num_positions if layer in self._origins else num_positions - self.forgotten
        return both[0][:, :, :num_rows], both[1][:, :, :num_rows]

    def addresses(self, layers: tuple[int, ...]) -> np.ndarray:
        """Return where keys and values of each of these layers lie for a native step.

        Returns:
            [layers, 3] int64: addresses of position 0 of keys and of values, which is before the memory where a window
            has moved on, and the positions from one head to the next.
        """
        if layers not in self._addresses:
            rows = [(*self._firsts(layer), self.keys[layer].shape[2]) for layer in layers]
            self._addresses[layers] = np.array(rows, np.int64)
        return self._addresses[layers]

    def _firsts(self, layer: int) -> tuple[int, int]:
        origin, both = self._origins.get(layer, 0), (self.keys[layer], self.values[layer])
        keys, values = (one.data_ptr() - origin * one.shape[3] * one.element_size() for one in both)
        return keys, values

    def copy_from(self, other: "KeyValueSlot", num_positions: int, start: int = 0) -> None:
        """Copy the first positions of another slot, on any device, to the positions from `start` on.

        Of layers without a window; see `place_window` for the others.
        """
        for layer in self._plain:
            self._put(layer, start, *other._get(layer, num_positions))

    def grow(self, num_positions: int, num_written: int) -> None:
        """Make room for more rows in layers without a window, and keep the first `num_written`.

        Keys of one layer, its values, and so on, so that hardly more memory is taken than that of the larger slot.
        Every address changes.

        Raises:
            RuntimeError: there is no memory; what was written is still there.
        """
        for layer in self._plain:
            for tensors in (self.keys, self.values):
                if tensors[layer].shape[2] < num_positions:  # not where an attempt before ended behind it
                    tensors[layer] = resized(tensors[layer], 0, (0, num_positions), (0, num_written))
                    self._addresses.clear()
        for layer, notes in self.notes.items():
            larger = self.layout[layer].notes(num_positions)
            larger[:, :, : notes.shape[2]] = notes
            self.notes[layer] = larger
        self.num_positions = num_positions

    def let_go(self, kept: dict[int, torch.Tensor], num_computed: int) -> None:
        """Let go of all rows of layers without a window but some, which move down in their order.

        Args:
            kept: of each such layer, the rows that stay, [heads, as many in all layers]; notes go with their rows.
            num_computed: positions that there were.

        Raises:
            RuntimeError: there is no memory to move them; what is there is of no use any more.
        """
        for layer, rows in kept.items():
            both = [self.keys[layer], self.values[layer]]
            for tensor in [*both, self.notes[layer]] if layer in self.notes else both:
                tensor[:, :, : rows.shape[1]] = chosen_rows(tensor, rows)
            self.forgotten = num_computed - rows.shape[1]

    def move_window(self, aside: list[Stretch], room: Stretch, num_written: int) -> None:
        """Give the layers with a window room for other positions, and keep what they have of these.

        Args:
            aside: positions that are set aside before.
            room: the first position, and the one behind the last.
            num_written: positions that there are.

        Raises:
            RuntimeError: there is no memory; what was written is still there.
        """
        there = {(part.begin, part.end) for part in self.aside}
        for begin, end in aside:
            if (begin, end) not in there:
                self.aside.append(self.window_parts(num_written)[-1].cut(begin, end))
        for layer, origin in self._origins.items():
            if (origin, origin + self.keys[layer].shape[2]) != room:
                written = max(room[0], origin), num_written
                both = [resized(tensors[layer], origin, room, written) for tensors in (self.keys, self.values)]
                self.keys[layer], self.values[layer] = both
                self._origins[layer] = room[0]
                self._addresses.clear()

    def window_parts(self, num_written: int) -> list[WindowPart]:
        """Return what there is of the layers with a window: what was set aside, and views of what they have."""
        if not self._origins:
            return []
        begin = self.in_window[0]
        keys, values = (
            {layer: tensors[layer][:, :, begin - at : num_written - at] for layer, at in self._origins.items()}
            for tensors in (self.keys, self.values)
        )
        aside = [part for part in self.aside if part.end <= begin]
        return [*aside, WindowPart(begin, num_written, keys, values)] if begin < num_written else aside

    def worth_keeping(self, num_written: int) -> list[WindowPart]:
        """Return what `window_parts` does, without positions that serve neither a mark nor the end."""
        parts = self.window_parts(num_written)
        if not parts or parts[-1].end < num_written:
            return parts
        *aside, whole = parts
        return aside + [whole.view(*one) for one in wanted(self.marks, whole.begin, num_written, self.window)]

    def last_place(self, num_written: int, most: int) -> int:
        """Return the last place, at most `most`, at which another sequence can go on with what this one has."""
        if not self._origins:
            return most
        parts = self.window_parts(num_written)
        return last_place([(part.begin, part.end) for part in parts], self.window, most)

    def place_window(self, parts: list[WindowPart], place: int) -> None:
        """Copy the window before a place into a slot whose layers with a window have nothing.

        Args:
            parts: where it lies, with other positions.
            place: where the sequence goes on.
        """
        if not self._origins:
            return
        stretches = joined((part.begin, part.end) for part in parts)
        origin = next((begin for begin, end in stretches if begin < place <= end), place)
        origin = max(origin, first_needed(max(0, place - MARGIN), self.window))
        for layer in self._origins:
            self._origins[layer] = origin
        self._addresses.clear()
        for part in parts:
            begin, end = max(part.begin, origin), min(part.end, place)
            if begin < end:
                for layer in self._origins:
                    chosen = slice(begin - part.begin, end - part.begin)
                    self._put(layer, begin, part.keys[layer][:, :, chosen], part.values[layer][:, :, chosen])

    def set_aside(self, parts: list[WindowPart]) -> None:
        """Hold what lies before the window of these parts, whose memory nothing else uses from now on.

        Raises:
            RuntimeError: there is no memory for a part of one.
        """
        begin = self.in_window[0]
        self.aside = [one if one.end <= begin else one.cut(one.begin, begin) for one in parts if one.begin < begin]

    def part(self, begin: int, end: int) -> "KeyValueSlot":
        """Copy positions of layers without a window into a slot of their own.

        Raises:
            RuntimeError: there is no memory.
        """
        keys, values = (
            {layer: cut(tensors[layer], begin, end) for layer in self._plain} for tensors in (self.keys, self.values)
        )
        return KeyValueSlot(keys, values, end - begin)

    def give_up(self, begin: int, end: int) -> "KeyValueSlot":
        """Turn into a slot of these positions alone, of layers without a window; this one holds nothing any more.

        One layer after the other, and without a copy where these are all positions.

        Raises:
            RuntimeError: there is no memory.
        """
        given: tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]] = {}, {}
        plain = self._plain
        for own, others in zip((self.keys, self.values), given, strict=True):
            for layer in plain:
                tensor = own.pop(layer)
                others[layer] = tensor if end - begin == tensor.shape[2] else cut(tensor, begin, end)
            own.clear()
        self._addresses.clear()
        self.notes.clear()
        self.aside = []
        return KeyValueSlot(*given, end - begin)
