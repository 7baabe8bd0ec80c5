"""Sizes of slots: the bytes that sequences need, and where the windows of their layers go next.

Knows shapes, sequences and slots. Knows nothing of budgets or of what else lies in memory.
"""

from typing import NamedTuple

from moeflow.engine.kv_cache.layer_shape import LayerShape
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.kv_cache.windows import MARGIN, Stretch, first_needed, wanted
from moeflow.engine.sequence import Sequence

SPARE_POSITIONS = 64  # that a slot has beyond its sequence's tokens, where there is room


class WindowMove(NamedTuple):
    """How the layers with a window move on in a slot.

    Args:
        aside: positions to copy before.
        room: the positions that they have room for from then on.
        num_bytes: that the slot takes more; negative for less.
    """

    aside: list[Stretch]
    room: Stretch
    num_bytes: int


class SlotSizes:
    """Sizes of the slots of one layout.

    Args:
        layout: the layers that keep keys and values, by their number.
        most_new: most tokens of one sequence in one pass; None for no limit, and for windows that do not move.
        most_rows: most rows of a slot in layers without a window, where a policy lets some go; None for all positions.

    Attributes:
        layout: the same, with the room of empty slots in layers with a window.
        window: most positions that one sees in layers with a window; 0 where no layer has one that moves.
        plain_bytes: of one position in the layers without a window, with its notes.
        record_bytes: of the same without notes.
        window_bytes: of one position in those with one.
        copied_bytes: of one position, that lie twice while a slot is copied.
    """

    def __init__(self, layout: dict[int, LayerShape], most_new: int | None, most_rows: int | None = None) -> None:
        self.window = 0 if most_new is None else max((shape.window for shape in layout.values()), default=0)
        self._most_new, self._most_rows = most_new or 0, most_rows
        room = self.window - 1 + MARGIN + self._most_new
        self.layout = {
            layer: shape._replace(room=room) if self.window and shape.window else shape._replace(window=0)
            for layer, shape in layout.items()
        }
        self.window_bytes = sum(shape.position_bytes for shape in self.layout.values() if shape.window)
        self.record_bytes = sum(shape.position_bytes for shape in self.layout.values() if not shape.window)
        self.plain_bytes = self.record_bytes + sum(shape.note_bytes for shape in self.layout.values())
        self.copied_bytes = max((shape.copied_bytes for shape in self.layout.values()), default=0)
        self._room = room

    def bytes_of(self, num_positions: int) -> int:
        """Return the most bytes that a sequence of so many positions must have at once."""
        return self.plain_bytes * self.rows(num_positions) + self.window_bytes * min(num_positions, self._room)

    def rows(self, num_positions: int) -> int:
        """Return the most rows that a sequence of so many positions has at once in layers without a window."""
        return num_positions if self._most_rows is None else min(num_positions, self._most_rows)

    def num_fitting(self, sequence: Sequence, slot: KeyValueSlot, num_bytes: int) -> int:
        """Return how many of its computed positions a sequence may leave in so many bytes."""
        count, of_position = sequence.num_computed, self.plain_bytes
        left = num_bytes - sum(part.nbytes for part in slot.worth_keeping(count))
        if left >= count * of_position:
            return count
        return slot.last_place(count, left // of_position) if of_position and left > 0 else 0

    def next_end(self, sequence: Sequence) -> int:
        """Return the position up to which layers without a window must have room before the next pass."""
        if self._most_rows is None:
            return sequence.length
        return min(sequence.length, sequence.num_computed + self._most_new)

    def most_positions(self, num_bytes: int) -> int | None:
        """Return the most positions of a sequence that fit into so many bytes; None for any number."""
        if self._most_rows is not None and self.bytes_of(max(self._most_rows, self._room)) <= num_bytes:
            return None
        in_all = num_bytes // (self.plain_bytes + self.window_bytes)
        if not self.window or in_all <= self._room:
            return in_all
        return (num_bytes - self._room * self.window_bytes) // self.plain_bytes if self.plain_bytes else None

    def next_window(self, sequence: Sequence, slot: KeyValueSlot, *, sparing: bool) -> WindowMove | None:
        """Return how layers with a window get room for the next pass behind what it sees; None where they have it.

        Args:
            sequence: whose next pass.
            slot: its.
            sparing: whether to hold no more than that, nor anything for other sequences, which is let go at once.
        """
        if not self.window:
            return None
        place, (begin, end) = sequence.num_computed, slot.in_window
        next_end = min(sequence.length, place + self._most_new)
        has_room = begin <= first_needed(place, self.window) and next_end <= end
        if has_room and not sparing:
            return None
        if sparing or not place:
            slot.aside.clear()
        if sparing:
            slot.marks.clear()
        *aside, (first, _) = wanted(slot.marks, begin if place else 0, place, self.window)
        last = next_end if sparing else max(next_end, min(sequence.num_positions, next_end + SPARE_POSITIONS))
        more = sum(high - low for low, high in [*aside, (first, last)]) - (end - begin)
        return None if has_room and more >= 0 else WindowMove(aside, (first, last), more * self.window_bytes)


def roomy(sequence: Sequence) -> int:
    """Return the positions of a slot that holds a sequence's tokens and a few more."""
    return min(sequence.num_positions, sequence.length + SPARE_POSITIONS)
