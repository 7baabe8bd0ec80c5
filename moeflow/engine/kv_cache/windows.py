"""Windows: what layers that see a limited number of positions keep of a sequence, and where it can go on from that.

Knows positions and tensors. Knows nothing of slots, trees or budgets.

A place is a number of tokens that are there already. A sequence goes on at a place where the window before it is kept.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

MARGIN = 32  # places before a kept one at which a sequence may go on too: the next prompt may part a little sooner

Stretch = tuple[int, int]  # positions from the first up to, without it, the second


class WindowPart(NamedTuple):
    """Keys and values of neighbouring positions in the layers that have a window.

    Args:
        begin: the first position.
        end: the one behind the last.
        keys: of each such layer, [1, heads, end - begin, features].
        values: likewise.
    """

    begin: int
    end: int
    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensors in (self.keys, self.values) for tensor in tensors.values())

    def view(self, begin: int, end: int) -> "WindowPart":
        """Return some of its positions in the same memory."""
        chosen = slice(begin - self.begin, end - self.begin)
        keys, values = (
            {layer: one[:, :, chosen] for layer, one in tensors.items()} for tensors in (self.keys, self.values)
        )
        return WindowPart(begin, end, keys, values)

    def cut(self, begin: int, end: int) -> "WindowPart":
        """Copy some of its positions.

        Raises:
            RuntimeError: there is no memory.
        """
        _, _, *both = self.view(begin, end)
        keys, values = (
            {layer: one.clone(memory_format=torch.contiguous_format) for layer, one in tensors.items()}
            for tensors in both
        )
        return WindowPart(begin, end, keys, values)


def first_needed(place: int, window: int) -> int:
    """Return the first position whose keys a sequence needs that goes on at a place."""
    return max(0, place - window + 1)


def joined(stretches: Iterable[Stretch]) -> list[Stretch]:
    """Return stretches that do not overlap in their order, those that touch as one."""
    made: list[Stretch] = []
    for begin, end in sorted(stretches):
        if made and made[-1][1] >= begin:
            made[-1] = made[-1][0], max(end, made[-1][1])
        else:
            made.append((begin, end))
    return made


def last_place(stretches: Iterable[Stretch], window: int, most: int) -> int:
    """Return the last place, at most `most`, before which the window is kept; 0 for none."""
    if window == 1:
        return most
    for begin, end in reversed(joined(stretches)):
        place = min(end, most)
        if place > begin and first_needed(place, window) >= begin:
            return place
    return 0


def missing(stretches: Iterable[Stretch], begin: int, end: int) -> list[Stretch]:
    """Return what of the positions from `begin` to `end` is in none of these."""
    gaps: list[Stretch] = []
    for low, high in joined(stretches):
        if low > begin and min(low, end) > begin:
            gaps.append((begin, min(low, end)))
        begin = max(begin, high)
    return [*gaps, (begin, end)] if begin < end else gaps


def wanted(marks: Iterable[int], origin: int, place: int, window: int) -> list[Stretch]:
    """Return the positions that are worth keeping of a sequence.

    Args:
        marks: places at which others may go on.
        origin: the first position that there is.
        place: where the sequence goes on itself.
        window: positions that one sees, itself among them.

    Returns:
        Stretches that do not touch, the last one that before `place`.
    """
    begin = max(origin, first_needed(max(0, place - MARGIN), window))
    stretches = [(begin, place)]
    for mark in sorted(marks, reverse=True):
        if mark > place or first_needed(mark, window) < origin:
            continue
        low, (begin, end) = max(origin, first_needed(max(0, mark - MARGIN), window)), stretches[0]
        if mark >= begin:
            stretches[0] = min(low, begin), end
        elif low < mark:
            stretches.insert(0, (low, mark))
    return stretches


def cut(tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Copy positions of a [1, heads, positions, features] tensor into one of their own."""
    return tensor[:, :, begin:end].clone(memory_format=torch.contiguous_format)


def resized(tensor: torch.Tensor, before: int, room: Stretch, written: Stretch) -> torch.Tensor:
    """Return a tensor of other positions, with those that were written.

    Args:
        tensor: [1, heads, positions, features], from a position on.
        before: this position.
        room: the first position of the new one, and the one behind its last.
        written: likewise of those that are copied.
    """
    (begin, end), (first, last) = room, written
    new = tensor.new_empty(*tensor.shape[:2], end - begin, tensor.shape[3])
    if first < last:
        new[:, :, first - begin : last - begin] = tensor[:, :, first - before : last - before]
    return new


def chosen_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Copy some rows of each head.

    Args:
        tensor: [1, heads, rows, width].
        rows: [heads, chosen].

    Returns:
        [1, heads, chosen, width].
    """
    return tensor.gather(2, rows[None, :, :, None].expand(1, -1, -1, tensor.shape[3]))
